"""Load a policy to train, or a trained run."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxppo import parallel, ppo, pretrained
from jaxppo.config import Config, RunConfig
from jaxppo.data.fetch import cache_folder
from jaxppo.errors import UserError
from jaxppo.models import copies, lora
from jaxppo.models.scan import unstack_layers
from jaxppo.parallel import processes, sharding
from jaxppo.pretrained.tiny import tiny_model
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.run import files, resume
from jaxppo.run.checkpoint import Checkpoints
from jaxppo.run.policy import Policy, check_same_tokenizer, make_policy
from jaxppo.run.settings import read_config
from jaxppo.types import Model, Params, TrainState

C = TypeVar("C", bound=RunConfig)


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
    options = {"dropout": dropout, "reward": reward, "mesh": mesh}
    again = lambda **changes: load_policy(dataclasses.replace(config, **changes), **options)[1]
    if mesh == "configured":
        mesh = configured_mesh(config)
    uses_reward = config.value_init == "reward" and config.value_loss != "none"
    if reward is None and uses_reward and config.reward_model:
        reward = _initial_critic(config)
    if config.model_kind == "classifier":
        raise UserError(f"{config.name} is a text classifier: it cannot write responses")
    if config.tiny:
        found = tiny_model(config.seed, config.model_kind)
    else:
        loaded = pretrained.load(config.model)
        shape = loaded.config
        if config.model_kind not in ("transformer", shape.kind):
            raise UserError(
                f"--model-kind {config.model_kind}: {config.model} is a {shape.kind}; train "
                "another kind from scratch, with experiments/pretrain.py or a task with --model ''"
            )
        shape = shape if dropout is None else dataclasses.replace(shape, dropout=dropout)
        found = shape, loaded.params, loaded.tokenizer
    own, policy = make_policy(config, *found, reward=reward, mesh=mesh)
    return own, dataclasses.replace(policy, reload=again)


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
    """Restore a run's best checkpoint: by validation score, or by training reward (or
    loss) in a run without validations. Its policy is the average of `ema_decay`, if
    there is one.

    Args:
      state: any state of the run.
    """
    checkpoints = Checkpoints(folder / "checkpoints", write=False)
    return copies.averaged(checkpoints.restore(state, step=checkpoints.best_step()))


def checkpoint_step(checkpoints: Checkpoints, checkpoint: str | int) -> int | None:
    """The step of a checkpoint: "best" (as `restore_best`), "newest", or a step's
    number. None is the newest undamaged one.

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
    resume.check_weights(stored, checkpoints, ["model"])
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
    check_same_tokenizer(f"--reward-model {config.reward_model}", policy.tokenizer, tokenizer)
    return policy.model, lora.merge(policy.frozen["base"], state.params)


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
