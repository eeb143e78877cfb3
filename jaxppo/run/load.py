"""Load a policy to train, or a trained run."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from jaxppo import algorithms, parallel, ppo, pretrained
from jaxppo import policy as policies
from jaxppo.config import Config, RunConfig
from jaxppo.data.fetch import cache_folder
from jaxppo.data.prompts import BatchSource, PromptSet
from jaxppo.errors import UserError
from jaxppo.models import copies, int8, lora, make, make_model, missing
from jaxppo.models.critic import init_value
from jaxppo.models.scan import stack_layers, unstack_layers
from jaxppo.models.shapes import ModelConfig
from jaxppo.parallel import processes, sharding
from jaxppo.pretrained import token_bytes
from jaxppo.pretrained.tiny import tiny_model
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.run import files, resume
from jaxppo.run.checkpoint import Checkpoints
from jaxppo.run.settings import read_config
from jaxppo.types import Model, Params, Parts, TrainState

C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class Policy:
    """A model with its weights, split into what is trained and what is frozen."""

    model: Model
    params: Params  # trained
    # base, reference, a place for the reward model; with stop texts "stop"
    frozen: dict[str, Any]
    tokenizer: Tokenizer
    shape: ModelConfig
    # loads the policy once more, with changed settings, or None
    reload: Callable[..., "Policy"] | None = None

    def initial_params(self) -> Params:
        """`params`, loaded once more if a training step has deleted them. Raises
        UserError if they cannot be.
        """
        if not any(x.is_deleted() for x in jax.tree.leaves(self.params)):
            return self.params
        if self.reload is None:
            raise UserError("the policy was trained and its parameters are gone; load it again")
        return self.reload().params

    def exact_base(self, config: Config) -> Params:
        """The frozen base below adapters as the checkpoint stores it, before it was
        rounded to the compute dtype or to 8 bits.
        """
        exact = config.dtype == "float32" and config.base_dtype == "same"
        if not self.frozen["base"] or exact or self.reload is None:
            return self.frozen["base"]
        return self.reload(dtype="float32", base_dtype="same").frozen["base"]


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder.

    Whoever can write there can run code here, so a folder that others own or can write
    to is not used; a warning says so.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = cache_folder() / "xla"
    folder.mkdir(mode=0o700, exist_ok=True)
    stat = folder.stat()
    if stat.st_uid != os.getuid() or stat.st_mode & 0o022:
        print(
            f"warning: others can write to {folder}: compiled programs are not kept; chmod 700 it, "
            "or set JAXPPO_CACHE"
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def load_policy(
    config: C,
    *,
    dropout: float | None = None,
    reward: Params | None = None,
    mesh: Mesh | Literal["configured"] | None = "configured",
) -> tuple[C, Policy]:
    """Load the policy that the settings name. Returns the settings with the tokenizer's
    ids, and the policy.

    With adapters, the checkpoint is the base and also the reference. Without, every
    weight is trained, and the reference is a second copy.

    Args:
      dropout: replaces the dropout rate of the checkpoint.
      reward: parameters of a reward model of the policy's shape, for `value_init`
        reward. Default: those of the run `config.reward_model`.
      mesh: arrays are placed on it as they are read, so that no device holds more than
        its share. None is one device.

    Raises:
      UserError: `model_kind` differs from the checkpoint's, or is a classifier.
    """
    asked = config
    again = lambda **changes: _load_policy(
        dataclasses.replace(asked, **changes), dropout, reward, mesh
    )[1]
    config, policy = _load_policy(config, dropout, reward, mesh)
    return config, dataclasses.replace(policy, reload=again)


def _load_policy(
    config: C,
    dropout: float | None,
    reward: Params | None,
    mesh: Mesh | Literal["configured"] | None,
) -> tuple[C, Policy]:
    if mesh == "configured":
        mesh = configured_mesh(config)
    uses_reward = config.value_init == "reward" and config.value_loss != "none"
    if reward is None and uses_reward and config.reward_model:
        reward = _initial_critic(config)
    if config.model_kind == "classifier":
        raise UserError(f"{config.name} is a text classifier: it cannot write responses")
    if config.tiny:
        shape, weights, tokenizer = tiny_model(config.seed, config.model_kind)
        return make_policy(config, shape, weights, tokenizer, reward=reward, mesh=mesh)
    loaded = pretrained.load(config.model)
    shape = loaded.config
    if config.model_kind not in ("transformer", shape.kind):
        raise UserError(
            f"--model-kind {config.model_kind}: {config.model} is a {shape.kind}; train another "
            "kind from scratch, with experiments/pretrain.py or a task with --model ''"
        )
    shape = shape if dropout is None else dataclasses.replace(shape, dropout=dropout)
    return make_policy(config, shape, loaded.params, loaded.tokenizer, reward=reward, mesh=mesh)


def make_policy(
    config: C,
    shape: ModelConfig,
    weights: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    reward: Params | None = None,
    mesh: Mesh | None = None,
) -> tuple[C, Policy]:
    """`load_policy` with given weights, which have no value head."""
    check_fits(config, shape, tokenizer)
    algorithms.check(config)  # find a wrong name before anything is compiled
    own = stack_layers(dict(weights)) if config.scan_layers else dict(weights)
    model, separate = make_model(config, shape)
    model = missing.without(model, tokenizer.missing(shape.vocab_size))
    # a separate critic starts from the same weights; with adapters it shares them
    weights = {**own, "critic": own} if separate else own
    key = jax.random.key(config.seed)
    known = set(flatten_dict(weights))
    # Only the leaves that the checkpoint lacks (adapters, value head) are computed: the
    # rest is dead code to the compiler.
    new = jax.jit(lambda key: lora.split(model.init(key), lambda path: path not in known)[0])(key)
    on_devices = lambda tree, array: (
        jax.tree.map(array, tree) if mesh is None else sharding.place(tree, mesh)
    )
    still = own  # what is not trained
    if config.base_dtype == "int8":
        if shape.kind != "transformer":
            raise UserError(f"a {shape.kind} policy has no --base-dtype int8: leave it out")
        still = int8.quantise(own)
    if config.lora:
        # The base is never updated, so it is rounded once, here.
        base = policies.cast(on_devices(still, jnp.asarray), model.dtype)
        base = {**base, "critic": base} if separate else base
        params, frozen = new, {"base": base, "reference": None, "reward": {}}
    else:
        # Two copies: `params` is donated to each step, the reference is not.
        reference = on_devices(still, jnp.array)
        params = lora.merge(on_devices(weights, jnp.array), new)
        frozen = {"base": {}, "reference": reference, "reward": {}}
    if config.stop:
        stops = token_bytes.make_stops(config.stop, tokenizer, vocab_size=shape.vocab_size)
        frozen["stop"] = on_devices(stops, jnp.asarray)
    if config.value_loss != "none" and config.value_init != "zero":
        params = init_value(params, jax.random.fold_in(key, 1), config.value_init, reward)
    params = params if mesh is None else sharding.place(params, mesh)
    config = with_token_ids(_as_recorded(config), tokenizer)
    return config, Policy(model, params, frozen, tokenizer, shape)


def _as_recorded(config: C) -> C:
    """The settings with the token ids that the run to resume has recorded, if any."""
    path = Path(config.runs) / config.name / "config.json"
    if not config.resume or not path.exists():
        return config
    stored = read_config(type(config), path)
    return dataclasses.replace(config, eos=stored.eos, start=stored.start)


def with_token_ids(config: C, tokenizer: Tokenizer) -> C:
    """Return the settings with the ids of the tokenizer: the ends of text, padding, and
    what begins each prompt. That is what the tokenizer itself puts before a text; with
    `prompt_start` and a tokenizer that puts nothing, the token that starts a document.

    A run that was made before `start` was recorded keeps what it had: one end of text,
    and no token of the tokenizer's own.
    """
    before = config.eos != -1 and config.start is None
    several = len(tokenizer.eos_ids) > 1 and config.eos != tokenizer.eos_id
    document = () if tokenizer.start_id is None else (tokenizer.start_id,)
    return dataclasses.replace(
        config,
        eos=tokenizer.eos_ids if several else tokenizer.eos_id,
        pad=tokenizer.pad_id,
        start=(not before and tokenizer.start_ids) or document * config.prompt_start,
    )


def own_start(config: RunConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return what the tokenizer itself puts before a text, unless the run has not: what
    reward models read begins with it too.
    """
    return tokenizer.start_ids if config.start == tokenizer.start_ids else ()


def check_fits(config: Config, shape: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError for what JAX would silently clamp or turn into NaN."""
    if config.length > shape.max_length:
        raise UserError(
            f"--prompt-length {config.prompt_length} + --response-length {config.response_length} "
            f"= {config.length} tokens, but the model takes {shape.max_length}; lower one of them"
        )
    largest = max(tokenizer.vocab_size - 1, tokenizer.eos_id, tokenizer.pad_id)
    if largest >= shape.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {largest}, but the model's vocabulary has "
            f"{shape.vocab_size}; use its own"
        )


def export_params(config: Config, policy: Policy, state: TrainState) -> Params:
    """The trained network for `pretrained.save`: adapters merged into their kernels,
    layers unstacked, without critic.
    """
    merged = lora.merge(policy.exact_base(config), state.params)
    own = {name: x for name, x in merged.items() if name not in ("value", "critic")}
    return jax.tree.map(
        lambda x: x.astype(jnp.float32), unstack_layers(lora.fold(own, alpha=lora.alpha_of(config)))
    )


def save_model(config: Config, policy: Policy, state: TrainState, place: Path) -> Path:
    """Save the trained network as a checkpoint folder, replacing `place`, which is
    returned. Of several processes the first writes.
    """
    params = jax.device_get(processes.to_host(export_params(config, policy, state)))
    if processes.is_main():
        shutil.rmtree(place, ignore_errors=True)
        pretrained.save(place, policy.shape, params, policy.tokenizer)
    processes.wait_for_all(f"{place.parent.name}/{place.name} is saved")
    return place


def restore_best(folder: Path, state: TrainState) -> TrainState:
    """Restore a run's best checkpoint by validation score, or the newest if none has a
    score; its policy is the average of `ema_decay`, if there is one.

    Args:
      state: any state of the run.
    """
    checkpoints = Checkpoints(folder / "checkpoints", write=False)
    return copies.averaged(checkpoints.restore(state, step=checkpoints.best_step()))


def checkpoint_step(checkpoints: Checkpoints, checkpoint: str | int) -> int | None:
    """The step of a checkpoint: "best" by validation score, "newest", or a step's
    number. None is the newest undamaged one, which is also the best if none has a
    score.

    Raises UserError for a step that is not there.
    """
    steps = checkpoints.steps()
    if checkpoint == "newest" or not steps:  # `Checkpoints.restore` says that there is none
        return None
    if checkpoint == "best":
        return checkpoints.best_step()
    if str(checkpoint) not in map(str, steps):
        raise UserError(
            f"--checkpoint {checkpoint}: there is no such step; choose best, newest, or one of "
            f"{', '.join(map(str, steps))}"
        )
    return int(checkpoint)


def restore(
    folder: Path,
    *,
    kind: type[C] = RunConfig,
    checkpoint: str | int = "best",
    mesh: Mesh | None = None,
    raw: bool = False,
) -> tuple[C, Policy, TrainState]:
    """Load a run at a checkpoint (`checkpoint_step`) from its folder, where nothing is
    changed.

    Args:
      folder: of a run, or of a task's stages.
      kind: the class of the settings.
      checkpoint: best, newest or a step.
      mesh: where arrays are placed; None is one device.
      raw: the weights of the last step, not their average (`ema_decay`).
    """
    place = files.find_run(folder)
    stored = read_config(kind, place / "config.json")
    checkpoints = Checkpoints(place / "checkpoints", write=False)
    step = checkpoint_step(checkpoints, checkpoint)
    resume.check_weights(stored, checkpoints)
    # The checkpoint has the value head, however it was initialised.
    config, policy = load_policy(dataclasses.replace(stored, value_init="zero"), mesh=mesh)
    like = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(config.seed))
    state = checkpoints.restore(like, step=step)
    return config, policy, state if raw else copies.averaged(state)


def configured_mesh(config: RunConfig) -> Mesh | None:
    """The mesh of the settings, if they use one."""
    uses_mesh = parallel.uses_mesh(config.parallel, config.mesh)
    return sharding.make_mesh(config.mesh) if uses_mesh else None


def load_reward_model(config: RunConfig, tokenizer: Tokenizer) -> tuple[Model, Params]:
    """(network, all its parameters) of the run of --reward-model at its best
    checkpoint, for `in_program.reward_model`.

    Raises UserError if that run has no value head, or another tokenizer.
    """
    _, policy, state = _restore_reward_run(config)
    _check_same(f"--reward-model {config.reward_model}", policy.tokenizer, tokenizer)
    return policy.model, lora.merge(policy.frozen["base"], state.params)


def _check_same(option: str, own: Tokenizer, tokenizer: Tokenizer) -> None:
    """Raise UserError if the tokenizers differ."""
    text = "The film: déjà vu, 12 times - or 3.5?\n"
    if own.vocab_size != tokenizer.vocab_size or own.encode(text) != tokenizer.encode(text):
        raise UserError(f"{option} has another tokenizer than the policy; train it on --model's")


def with_teacher(
    config: RunConfig, policy: Policy, parts: Parts, prompts: BatchSource
) -> tuple[Policy, Parts]:
    """The policy and the parts with --teacher: its parameters, in the compute dtype,
    are frozen["teacher"]; `self` reads with those of the reference.

    Raises UserError if it has another tokenizer, or its prompts are too long for it.
    """
    name, model, shape, params = config.teacher, policy.model, policy.shape, None
    if name != "self":
        shape, weights, tokenizer = _read_teacher(config)
        _check_same(f"--teacher {name}", tokenizer, policy.tokenizer)
        check_fits(config, shape, tokenizer)
        model = make(shape, dtype=config.dtype, scan=config.scan_layers)
        model = missing.without(model, tokenizer.missing(shape.vocab_size))
        own = stack_layers(dict(weights)) if config.scan_layers else dict(weights)
        mesh = configured_mesh(config)
        own = jax.tree.map(jnp.asarray, own) if mesh is None else sharding.place(own, mesh)
        params = policies.cast(own, model.dtype)
    hinted = prompts.extra.get("hint_tokens") if isinstance(prompts, PromptSet) else None
    if hinted is not None and hinted.shape[1] + config.response_length > shape.max_length:
        raise UserError(
            f"--teacher {name} takes {shape.max_length} tokens, but prompts with hints have up to "
            f"{hinted.shape[1]}, and responses {config.response_length}; shorten the hints"
        )
    frozen = {**policy.frozen, "teacher": params}
    return dataclasses.replace(policy, frozen=frozen), parts._replace(teacher=model)


def _read_teacher(config: RunConfig) -> tuple[ModelConfig, Mapping[str, Any], Tokenizer]:
    """Shape, weights and tokenizer of a checkpoint, or of a run at its best step."""
    folder = files.trained_run(config.teacher)
    if folder is None:
        loaded = pretrained.load(config.teacher)
        return loaded.config, loaded.params, loaded.tokenizer
    stored, policy, state = restore(folder, mesh=configured_mesh(config))
    return policy.shape, export_params(stored, policy, state), policy.tokenizer


def _initial_critic(config: RunConfig) -> Params:
    """The reward model's parameters that a critic starts from."""
    reward_config, policy, state = _restore_reward_run(config)
    if config.lora:  # the critic shares the base, and starts from the adapters
        return dict(state.params)
    merged = lora.merge(policy.frozen["base"], state.params)
    return dict(lora.fold(merged, alpha=lora.alpha_of(reward_config)))


def reward_run(config: RunConfig) -> Path:
    """The folder of the reward model's run. Raises UserError if there is none, or if it
    trained a policy on pairs (--dpo): its value head is as new.
    """
    folder = Path(config.reward_model)
    if not config.reward_model or not (folder / "config.json").exists():
        raise UserError(
            f"--reward-model {config.reward_model or '(none)'}: there is no run; give the folder "
            "of one of experiments/reward_model.py"
        )
    if json.loads((folder / "config.json").read_text()).get("dpo"):
        raise UserError(
            f"--reward-model {folder}: that run has no value head; train one with "
            "experiments/reward_model.py, without --dpo"
        )
    return folder


def _restore_reward_run(config: RunConfig) -> tuple[RunConfig, Policy, TrainState]:
    folder = reward_run(config)
    found = restore(folder, mesh=configured_mesh(config))
    if "value" not in found[2].params:
        raise UserError(
            f"--reward-model {folder}: that run has no value head; train one with "
            "experiments/reward_model.py"
        )
    return found
