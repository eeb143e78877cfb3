"""Load a policy to train, or a run that was trained."""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxppo import algorithms, parallel, ppo, pretrained
from jaxppo import policy as policies
from jaxppo.config import Config, RunConfig
from jaxppo.data.fetch import cache_folder
from jaxppo.errors import UserError
from jaxppo.models import lora, make_model
from jaxppo.models.critic import init_value
from jaxppo.models.scan import stack, unstack
from jaxppo.models.shapes import ModelConfig
from jaxppo.parallel import processes, sharding
from jaxppo.pretrained.tiny import tiny
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.run import files, resume
from jaxppo.run.checkpoint import Checkpoints
from jaxppo.run.settings import from_file
from jaxppo.types import Model, Params, TrainState

C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class Policy:
    """A model with its weights, cut into what is trained and what is not."""

    model: Model
    params: Params  # trained
    frozen: dict[str, Any]  # base, reference, and a place for the reward model
    tokenizer: Tokenizer
    shape: ModelConfig


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache, readable by the user alone: who can
    write there can run code here. A folder that belongs to somebody else, or that
    others can write to, is not used, and a line says so.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = cache_folder() / "xla"
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        print(
            f"warning: others can write to {folder}: compiled programs are not kept; chmod 700 it, or set JAXPPO_CACHE"
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def put_together(
    config: C,
    model_config: ModelConfig,
    weights: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    reward: Params | None = None,
    mesh: Mesh | None = None,
) -> tuple[C, Policy]:
    """`load_policy` of weights that are at hand: a network's without a value head."""
    if (
        config.length > model_config.max_length
    ):  # positions beyond the table would be clamped without a word
        raise UserError(
            f"--prompt-length {config.prompt_length} + --response-length {config.response_length} = {config.length} tokens, "
            f"but the model takes {model_config.max_length}; lower one of them"
        )
    largest = max(tokenizer.vocab_size - 1, tokenizer.eos_id, tokenizer.pad_id)
    # an embedding beyond its end is NaN, without a word
    if largest >= model_config.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {largest}, but the model's vocabulary has {model_config.vocab_size}; use its own"
        )
    weights = stack(dict(weights)) if config.scan_layers else dict(weights)
    algorithms.check(config)  # a wrong name is found before anything is compiled
    model, separate = make_model(config, model_config)
    if separate:
        weights = {
            **weights,
            "critic": weights,
        }  # it starts from the same weights; with adapters it shares them
    key = jax.random.key(config.seed)
    known = {path for path, _ in _leaves(weights)}
    # Only the leaves that the checkpoint lacks (adapters, value head) are computed; the
    # rest is dead code to the compiler.
    new = jax.jit(lambda key: lora.split(model.init(key), lambda path: path not in known)[0])(key)
    copied = lambda tree: (
        jax.tree.map(jnp.array, tree) if mesh is None else sharding.place(tree, mesh)
    )
    has_critic = config.value_loss != "none"
    if config.lora:
        # The base is only ever an operand: rounded here once, it takes half the memory
        # and no time in the step.
        own = {name: x for name, x in weights.items() if name != "critic"}
        base = policies.cast(
            jax.tree.map(jnp.asarray, own) if mesh is None else copied(own), model.dtype
        )
        base = {**base, "critic": base} if "critic" in weights else base
        params, frozen = new, {"base": base, "reference": None, "reward": {}}
    else:
        # `params` is donated to each step, the reference is not, so each has buffers of
        # its own.
        reference = copied({name: x for name, x in weights.items() if name != "critic"})
        params = lora.merge(copied(weights), new)
        frozen = {"base": {}, "reference": reference, "reward": {}}
    if has_critic and config.value_init != "zero":
        params = init_value(params, jax.random.fold_in(key, 1), config.value_init, reward)
    params = params if mesh is None else sharding.place(params, mesh)
    config = dataclasses.replace(config, eos=tokenizer.eos_id, pad=tokenizer.pad_id)
    return config, Policy(model, params, frozen, tokenizer, model_config)


def language_model(config: Config, policy: Policy, state: TrainState) -> Params:
    """The trained network as a checkpoint's parameters (`pretrained.save`): adapters
    folded in, layers unrolled, no critic.
    """
    merged = lora.merge(policy.frozen["base"], state.params)
    own = {name: x for name, x in merged.items() if name not in ("value", "critic")}
    return jax.tree.map(
        lambda x: x.astype(jnp.float32), unstack(lora.fold(own, alpha=config.lora_alpha))
    )


def keep_model(config: Config, policy: Policy, state: TrainState, place: Path) -> Path:
    """The trained network as a checkpoint in a folder, which is returned, in place of
    the one that is there; of several processes the first writes.
    """
    whole = jax.device_get(processes.to_host(language_model(config, policy, state)))
    if processes.is_main():
        shutil.rmtree(place, ignore_errors=True)
        pretrained.save(place, policy.shape, whole, policy.tokenizer)
    processes.wait_for_all(f"{place.parent.name}/{place.name} is kept")
    return place


def _leaves(tree: Mapping, path: tuple = ()):
    for name, leaf in tree.items():
        if isinstance(leaf, Mapping):
            yield from _leaves(leaf, (*path, name))
        else:
            yield (*path, name), leaf


def best(folder: Path, state: TrainState) -> TrainState:
    """The state of a run's best checkpoint, by the score of its evaluations; of the
    newest one where none has a score, since nothing was evaluated. `state` is any of
    the run's.
    """
    checkpoints = Checkpoints(folder / "checkpoints", write=False)
    return checkpoints.restore(state, step=checkpoints.chosen())


def restore(
    folder: Path, *, kind: type[C] = RunConfig, newest: bool = False, mesh: Mesh | None = None
) -> tuple[C, Policy, TrainState]:
    """Load a run at its best checkpoint (`best`), or at the newest one, from its folder
    alone.

    Args:
      folder: of one run, or of a task's stages. Nothing is changed there.
      kind: the class of settings that `config.json` is read as.
      mesh: where arrays are placed; None is one device.
    """
    place = files.find_run(folder)
    stored = from_file(kind, place / "config.json")
    checkpoints = Checkpoints(place / "checkpoints", write=False)
    resume.check_weights(stored, checkpoints)
    # How the value head started no longer matters: the checkpoint has it.
    config, policy = load_policy(dataclasses.replace(stored, value_init="zero"), mesh=mesh)
    like = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(config.seed))
    return config, policy, checkpoints.restore(like, step=None if newest else checkpoints.chosen())


def load_policy(
    config: C,
    *,
    dropout: float | None = None,
    reward: Params | None = None,
    mesh: Mesh | Literal["configured"] | None = "configured",
) -> tuple[C, Policy]:
    """The policy that the settings name, and the settings with the tokenizer's ids
    filled in.

    With adapters the checkpoint is the base, and the base alone is the reference.
    Without, every weight is trained and the reference is a second copy.

    Args:
      dropout: replaces the dropout rate of the checkpoint. reward: parameters of a
      reward model of the policy's shape, for `value_init` reward. By
        default those of the run `config.reward_model`.
      mesh: the mesh over which arrays are placed (`sharding.place`) as they are read,
      so that no
        device holds more than its share. None places them on one device.

    Raises:
      UserError: if `model_kind` is not the checkpoint's, or the checkpoint is a
      classifier.
    """
    if mesh == "configured":
        mesh = mesh_asked_for(config)
    if (
        reward is None
        and config.value_init == "reward"
        and config.value_loss != "none"
        and config.reward_model
    ):
        judge, policy, state = _reward_run(config)
        # A policy with adapters shares the base, and its critic's adapters start as the
        # judge's. A policy without adapters has whole matrices.
        own = (
            state.params
            if config.lora
            else lora.fold(lora.merge(policy.frozen["base"], state.params), alpha=judge.lora_alpha)
        )
        reward = dict(own)
    if config.model_kind == "classifier":
        raise UserError(
            f"{config.name} is a classifier of texts: it says which they are, and writes none"
        )
    if config.tiny:
        return put_together(config, *tiny(config.seed, config.model_kind), reward=reward, mesh=mesh)
    loaded = pretrained.load(config.model)
    if config.model_kind not in ("transformer", loaded.config.kind):
        raise UserError(
            f"--model-kind {config.model_kind}: {config.model} is a {loaded.config.kind}; another kind is made anew, by "
            "experiments/pretrain.py or by a task with --model ''"
        )
    shape = (
        loaded.config if dropout is None else dataclasses.replace(loaded.config, dropout=dropout)
    )
    return put_together(config, shape, loaded.params, loaded.tokenizer, reward=reward, mesh=mesh)


def mesh_asked_for(config: RunConfig) -> Mesh | None:
    """The mesh over which a run's step is to be cut, if it is."""
    return (
        sharding.make_mesh(config.mesh)
        if parallel.over_mesh(config.parallel, config.mesh)
        else None
    )


def load_reward_model(config: RunConfig, tokenizer: Tokenizer) -> tuple[Model, Params]:
    """(network, its whole parameters) of the run of --reward-model at its best
    checkpoint, for `rewards.learned`.

    Raises UserError for a run that has learned no scores, and for one whose tokenizer
    is not the policy's.
    """
    _, policy, state = _reward_run(config)
    text = "The film: déjà vu, 12 times - or 3.5?\n"
    if policy.tokenizer.vocab_size != tokenizer.vocab_size or policy.tokenizer.encode(
        text
    ) != tokenizer.encode(text):
        raise UserError(
            f"--reward-model {config.reward_model} reads other tokens than the policy writes; train it on --model's"
        )
    return policy.model, lora.merge(policy.frozen["base"], state.params)


def _reward_run(config: RunConfig) -> tuple[RunConfig, Policy, TrainState]:
    folder = Path(config.reward_model)
    if not (folder / "config.json").exists():
        raise UserError(
            f"--reward-model {folder}: there is no run; give the folder of one of experiments/reward_model.py"
        )
    found = restore(folder, mesh=mesh_asked_for(config))
    if "value" not in found[2].params:
        raise UserError(
            f"--reward-model {folder}: that run has learned no scores; train one with experiments/reward_model.py"
        )
    return found
