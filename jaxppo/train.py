"""A run: begun or gone on with, in its folder. `assemble` makes the policy, `loop` goes round, `ppo` has the mathematics."""

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxppo import (
    chips,
    loop,
    memory,
    parallel,
    ppo,
    pretrained,
    processes,
    profiling,
    replay,
    resume,
    sharding,
    supervised,
    trackers,
    tracking,
)
from jaxppo.assemble import C, Policy, make_model, put_together, use_compilation_cache
from jaxppo.checkpoint import Checkpoints
from jaxppo.config import Diverged, RunConfig, RunError, UserError, from_file, to_dict, validate, validate_run
from jaxppo.lock import RunLock
from jaxppo.models import lora
from jaxppo.pretrained.tiny import tiny
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.rewards import shaping
from jaxppo.sampler import PromptSet, Sample, Sampler, encode, responses, start_of
from jaxppo.supervised import Objective
from jaxppo.types import Model, Params, Parts, Prompts, TrainState

__all__ = [
    "Policy", "PromptSet", "Sample", "Sampler", "best", "compiled", "encode", "first_scores", "fit", "load_policy",
    "load_reward_model", "make_model", "restore", "start_of", "use_compilation_cache",
]  # fmt: skip


def fit(
    config: RunConfig,
    policy: Policy,
    parts: Parts | Objective,
    prompts: loop.Batches,
    *,
    folder: Path,
    evaluate: loop.Evaluate | None = None,
) -> TrainState:
    """Train to `config.steps` steps, from the newest checkpoint when `config.resume`; writes metrics, checkpoints and curves.

    `parts` are those of a policy gradient with a `PromptSet`, or the objective of a supervised stage with `data.rows.Rows`.

    `evaluate(state)` returns numbers for validation prompts; they are logged as `validation_<name>`, and `score` among them
    (without an `evaluate`, the batch's reward or loss) decides which checkpoint is the best. Of several processes the first
    alone writes. How it may end before its last step is in `loop.run`.
    """
    validate_run(config)
    step = compiled(config, policy, parts)
    state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(config.seed))
    shares, replicated = parallel.count(config.parallel, config.mesh), isinstance(step, parallel.PmapStep)
    memory.check(config, policy.model, state, shares=shares, replicated=replicated)
    # For a second look at the checkpoints: the first step destroys these arrays.
    like = jax.eval_shape(lambda: state.replace(frozen=None, key=None))
    like = like.replace(frozen=state.frozen, key=jax.random.key(config.seed))
    writer = processes.is_main()
    with contextlib.ExitStack() as stack:
        if writer:
            stack.callback(RunLock(folder).release)
        about = {"config": fingerprint(config), "versions": tracking.versions(), "weights": resume.weights_of(config)}
        checkpoints = Checkpoints(folder / "checkpoints", about=about, keep_every=config.keep_every, write=writer)
        stack.callback(checkpoints.close)
        resuming = config.resume and not resume.never_began(folder, checkpoints)
        state = resume.go_on(config, checkpoints, state, folder) if resuming else begin(config, policy, parts, prompts, state)
        if resuming and evaluate is not None:
            resume.make_up(config, checkpoints, state, folder, evaluate)
        steps = tracking.read_lines(folder / "metrics.jsonl") if resuming else []
        past = [row for row in steps if row["step"] <= int(state.step)]
        if writer:
            tracking.write_config(folder, to_dict(config))
            tracking.write_command(folder)
        if not resuming:
            checkpoints.save(state, score=None)  # from here on the run can be gone on with
        log = tracking.Tracker(folder, first_step=int(state.step), total_steps=config.steps) if writer else tracking.Log()
        log = trackers.beside(log, config, folder) if writer else log
        stack.callback(log.close)
        meter, trace = measured(config, policy, parts, step), profiling.Trace(config, folder)
        stack.callback(meter.close)
        stack.callback(trace.close)
        try:
            return loop.run(
                config, step, state, prompts, log=log, checkpoints=checkpoints, evaluate=evaluate, meter=meter, trace=trace,
                past=past,
            )  # fmt: skip
        except loop.NotFinite as bad:
            if isinstance(parts, Objective):
                raise Diverged(f"the update of step {bad.args[0]} is not finite; lower --lr") from None
            assert isinstance(prompts, PromptSet)
            text = replay.diagnose(config, policy, parts, prompts, checkpoints, like, step=bad.args[0])
            raise Diverged(text) from None
        except (OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
            raise explained(error, config, checkpoints) from error
        finally:
            # On a full disk the reason to end is another one than that there is no picture.
            with contextlib.suppress(OSError):
                if writer and (folder / "metrics.jsonl").stat().st_size:
                    tracking.plot_curves(folder)


def measured(config: RunConfig, policy: Policy, parts: Parts | Objective, step: parallel.CompiledStep) -> profiling.Meter:
    """What knows how many operations a step has, and how many the devices could do."""
    flops = profiling.flops_of(config, policy.shape, supervised=isinstance(parts, Objective))
    used = jax.devices()[: 1 if config.parallel == "jit" else None]
    return profiling.Meter(step, flops=flops, peak=profiling.peak_of(used))


def best(folder: Path, state: TrainState) -> TrainState:
    """The state of a run's best checkpoint, by the score of its evaluations; of the newest one where none has a score, since
    nothing was evaluated. `state` is any of the run's."""
    checkpoints = Checkpoints(folder / "checkpoints", write=False)
    return checkpoints.restore(state, step=checkpoints.chosen())


def begin(config: RunConfig, policy: Policy, parts: Parts | Objective, prompts: loop.Batches, state: TrainState) -> TrainState:
    """The first state of a run."""
    if not config.reward_reference or isinstance(parts, Objective):
        return state
    assert isinstance(prompts, PromptSet)
    scores = first_scores(config, policy, parts, prompts, state)
    return state.replace(statistics=shaping.normalise_to_reference(state.statistics, scores))


def fingerprint(config: RunConfig) -> str:
    """A hash of every setting."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:16]


def explained(error: Exception, config: RunConfig, checkpoints: Checkpoints) -> Exception:
    """A full disk, a vanished folder or too little memory in one line; any other error as it is."""
    newest = f"step {checkpoints.steps()[-1]} is safe, go on with --resume" if checkpoints.steps() else "nothing was saved yet"
    reason = processes.first_line(error)
    if isinstance(error, OSError):
        return RunError(f"cannot write ({reason}); {newest}")
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error):
        return RunError(f"out of memory ({reason}); lower it with {'; '.join(memory.cures(config))}; {newest}")
    return error


def compiled(config: RunConfig, policy: Policy, parts: Parts | Objective) -> parallel.CompiledStep:
    """The step in the configured mode, after a check that the devices are there and the batch divides over them."""
    found = len(jax.devices())
    if config.expect_devices and found != config.expect_devices:
        raise UserError(f"--expect-devices {config.expect_devices}, but there are {found}; is the accelerator's JAX installed?")
    if config.parallel == "jit" and jax.process_count() > 1:
        raise UserError(f"--parallel jit is for one process, but there are {jax.process_count()}; use pmap or mesh")
    validate(config, devices=parallel.count(config.parallel, config.mesh))

    def make(axis_name: str | None):
        if isinstance(parts, Objective):
            train_step = supervised.make_train_step(policy.model, parts, config, axis_name=axis_name)
        else:
            train_step = ppo.make_train_step(policy.model, parts, config, axis_name=axis_name)
        return train_step if config.steps_per_call == 1 else ppo.repeat(train_step)

    step = parallel.prepare(make, mode=config.parallel, mesh=config.mesh, leading=int(config.steps_per_call > 1))
    if config.parallel == "auto" and processes.is_main():
        print(f"--parallel auto: {step.name}")
    if config.dtype == "bfloat16" and jax.default_backend() == "cpu" and chips.rounds_in_software() and processes.is_main():
        print("note: this CPU has no unit for bfloat16: --dtype float32 takes less time here")
    return step


def first_scores(config: RunConfig, policy: Policy, parts: Parts, prompts: PromptSet, state: TrainState) -> jax.Array:
    """Raw scores of `reward_reference` rollouts of the policy as it is, NaN where invalid: what Ziegler et al. 2019
    (https://arxiv.org/abs/1909.08593, section 2.1) give mean 0 and deviation 1. Prompts from the end of the data's order."""

    def program(params, frozen, batch: Prompts, key):
        rolled = responses(config, policy.model, params, frozen, batch, key)
        scores, valid = parts.reward(frozen["reward"], rolled)
        return jnp.where(valid, ppo.row_scores(scores), jnp.nan)

    compiled, out = jax.jit(program), []
    for number in range(-(-config.reward_reference // config.rows)):
        key = jax.random.fold_in(state.key, 2**31 - 1 - number)  # far from any step's
        with sharding.beside(state.params, prompts.batch(config, (2**31 - 1 - number) * config.rows)) as batch:
            out.append(processes.here(compiled(state.params, state.frozen, batch, key)))
    return jnp.concatenate(out)[: config.reward_reference]


def restore(
    folder: Path, *, kind: type[C] = RunConfig, newest: bool = False, mesh: Mesh | None = None
) -> tuple[C, Policy, TrainState]:
    """Load a run at its best checkpoint (`best`), or at the newest one, from its folder alone.

    Args:
      folder: of one run, or of a task's stages. Nothing is changed there.
      kind: the class of settings that `config.json` is read as.
      mesh: where arrays are placed; None is one device.
    """
    place = tracking.place_of(folder)
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
    """The policy that the settings name, and the settings with the tokenizer's ids filled in.

    With adapters the checkpoint is the base, and the base alone is the reference. Without, every
    weight is trained and the reference is a second copy.

    Args:
      dropout: replaces the dropout rate of the checkpoint.
      reward: parameters of a reward model of the policy's shape, for `value_init` reward. By
        default those of the run `config.reward_model`.
      mesh: the mesh over which arrays are placed (`sharding.place`) as they are read, so that no
        device holds more than its share. None places them on one device.

    Raises:
      UserError: if `model_kind` is not the checkpoint's, or the checkpoint is a classifier.
    """
    if mesh == "configured":
        mesh = mesh_asked_for(config)
    if reward is None and config.value_init == "reward" and config.value_loss != "none" and config.reward_model:
        judge, policy, state = _reward_run(config)
        # A policy with adapters shares the base, and its critic's adapters start as the judge's.
        # A policy without adapters has whole matrices.
        own = state.params if config.lora else lora.fold(lora.merge(policy.frozen["base"], state.params), alpha=judge.lora_alpha)
        reward = dict(own)
    if config.model_kind == "classifier":
        raise UserError(f"{config.name} is a classifier of texts: it says which they are, and writes none")
    if config.tiny:
        return put_together(config, *tiny(config.seed, config.model_kind), reward=reward, mesh=mesh)
    loaded = pretrained.load(config.model)
    if config.model_kind not in ("transformer", loaded.config.kind):
        raise UserError(
            f"--model-kind {config.model_kind}: {config.model} is a {loaded.config.kind}; another kind is made anew, by "
            "experiments/pretrain.py or by a task with --model ''"
        )
    shape = loaded.config if dropout is None else dataclasses.replace(loaded.config, dropout=dropout)
    return put_together(config, shape, loaded.params, loaded.tokenizer, reward=reward, mesh=mesh)


def mesh_asked_for(config: RunConfig) -> Mesh | None:
    """The mesh over which a run's step is to be cut, if it is."""
    return sharding.make_mesh(config.mesh) if parallel.over_mesh(config.parallel, config.mesh) else None


def load_reward_model(config: RunConfig, tokenizer: Tokenizer) -> tuple[Model, Params]:
    """(network, its whole parameters) of the run of --reward-model at its best checkpoint, for `rewards.learned`.

    Raises UserError for a run that has learned no scores, and for one whose tokenizer is not the policy's.
    """
    _, policy, state = _reward_run(config)
    text = "The film: déjà vu, 12 times - or 3.5?\n"
    if policy.tokenizer.vocab_size != tokenizer.vocab_size or policy.tokenizer.encode(text) != tokenizer.encode(text):
        raise UserError(f"--reward-model {config.reward_model} reads other tokens than the policy writes; train it on --model's")
    return policy.model, lora.merge(policy.frozen["base"], state.params)


def _reward_run(config: RunConfig) -> tuple[RunConfig, Policy, TrainState]:
    folder = Path(config.reward_model)
    if not (folder / "config.json").exists():
        raise UserError(f"--reward-model {folder}: there is no run; give the folder of one of experiments/reward_model.py")
    found = restore(folder, mesh=mesh_asked_for(config))
    if "value" not in found[2].params:
        raise UserError(f"--reward-model {folder}: that run has learned no scores; train one with experiments/reward_model.py")
    return found
