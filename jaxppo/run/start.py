"""What a run needs before its first step: the compiled step, the first state, the
checkpoints; and what its errors mean.
"""

import hashlib
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxppo import algorithms, parallel, ppo, presets, types
from jaxppo import supervised as objectives
from jaxppo.config import RunConfig, validate, validate_run
from jaxppo.costs import chips, memory
from jaxppo.data import rows
from jaxppo.data.prompts import BatchSource, PromptSet
from jaxppo.errors import RunError, UserError, first_line
from jaxppo.parallel import processes, sharding
from jaxppo.rewards import shaping
from jaxppo.rollout import sample_responses
from jaxppo.run import files, load, profiling, resume, trackers
from jaxppo.run.checkpoint import Checkpoints
from jaxppo.run.log import Log
from jaxppo.run.policy import Policy
from jaxppo.run.samples import SampleLog
from jaxppo.run.settings import to_dict
from jaxppo.supervised import Objective
from jaxppo.types import Parts, Prompts, TrainState


def open_checkpoints(
    config: RunConfig, folder: Path, prompts: BatchSource, *, write: bool
) -> Checkpoints:
    """The run's checkpoints, with what every manifest says of it."""
    settings = json.dumps(to_dict(config), sort_keys=True)
    about = {
        "config": hashlib.sha256(settings.encode()).hexdigest()[:16],
        "versions": files.versions(),
        "weights": resume.weight_hashes(config),
        "data": rows.identity(prompts),
    }
    return Checkpoints(
        folder / "checkpoints", about=about, keep_every=config.keep_every, write=write
    )


def open_log(
    config: RunConfig, policy: Policy, parts: Parts | Objective, folder: Path, *, first_step: int
) -> Log:
    """The log of the process that writes the run: its files, and trackers."""
    samples = None
    if config.log_samples and not isinstance(parts, Objective):
        samples = SampleLog(
            folder,
            policy.tokenizer.decode_batch,
            show_prompts=partial(policy.tokenizer.decode_batch, skip_special=not config.chats),
            prompt_length=config.prompt_length,
            length=config.length,
            weights=parts.score_weights,
            first_step=first_step,
        )
    steps = {"first_step": first_step, "total_steps": config.steps}
    return trackers.TrackedLog(config, folder, **steps, sample_log=samples)


def make_meter(
    config: RunConfig, policy: Policy, parts: Parts | Objective, step: parallel.CompiledStep
) -> profiling.Meter:
    """A meter that knows the operations of a step, and the peak of the devices."""
    flops = profiling.step_flops(config, policy.shape, supervised=isinstance(parts, Objective))
    devices = jax.devices()[: 1 if config.parallel == "jit" else None]
    peaks = [chips.peak_flops(device.device_kind) for device in devices]
    return profiling.Meter(step, flops=flops, peak=sum(peaks) if all(peaks) else 0.0)


def explain(error: Exception, config: RunConfig, checkpoints: Checkpoints) -> Exception:
    """Turn a full disk, a missing folder or too little memory into a RunError of one
    line; return any other error as it is.
    """
    steps = checkpoints.steps()
    newest = (
        f"step {steps[-1]} is safe, continue with --resume" if steps else "nothing was saved yet"
    )
    reason = first_line(error)
    if isinstance(error, OSError):
        return RunError(f"cannot write ({reason}); {newest}")
    out_of_memory = "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)
    if isinstance(error, MemoryError) or out_of_memory:
        return RunError(
            f"out of memory ({reason}); lower it with {'; '.join(memory.suggestions(config))}; "
            f"{newest}"
        )
    return error


def check_run(config: RunConfig, *, supervised: bool = False) -> None:
    """Raise UserError for settings with which a run cannot begin on these devices. Call
    it before anything is downloaded or trained.
    """
    validate_run(config)
    algorithms.check(config)
    if supervised and config.epochs * config.minibatches != 1:
        raise UserError("a supervised step is one update: use --epochs 1 --minibatches 1")
    if config.reward_model:
        load.reward_run(config)
    found = len(jax.devices())
    if config.expect_devices and found != config.expect_devices:
        raise UserError(
            f"--expect-devices {config.expect_devices}, but there are {found}; is the "
            "accelerator's JAX installed?"
        )
    if config.parallel == "jit" and jax.process_count() > 1:
        raise UserError(
            f"--parallel jit is for one process, but there are {jax.process_count()}; use pmap "
            "or mesh"
        )
    validate(config, devices=parallel.row_shards(config.parallel, config.mesh))
    if parallel.uses_mesh(config.parallel, config.mesh):
        sharding.make_mesh(config.mesh)


def build_step(
    config: RunConfig, policy: Policy, parts: Parts | Objective
) -> parallel.CompiledStep:
    """Compile the step in the configured mode. Raises UserError if the devices are not
    those expected, or the batch does not divide over them.
    """
    check_run(config, supervised=isinstance(parts, Objective))

    def make(axis_name: str | None):
        if isinstance(parts, Objective):
            train_step = objectives.make_train_step(
                policy.model, parts, config, axis_name=axis_name
            )
        else:
            train_step = ppo.make_train_step(policy.model, parts, config, axis_name=axis_name)
        return train_step if config.steps_per_call == 1 else ppo.repeat(train_step)

    step = parallel.compile_for_mode(
        make, mode=config.parallel, mesh=config.mesh, leading=int(config.steps_per_call > 1)
    )
    if config.parallel == "auto" and processes.is_main():
        print(f"--parallel auto: {step.name}")
    if not isinstance(parts, Objective) and processes.is_main():
        print(f"algorithm {presets.describe(config, config.functions)}")
        for text in algorithms.without_effect(config):
            print(f"note: {text}")
    if config.start and processes.is_main():
        print(f"prompts begin with {spelled(policy, config.start)}, unless they are chats")
    if isinstance(config.eos, tuple) and processes.is_main():
        print(f"responses end with any of {spelled(policy, config.eos)}")
    slow_bfloat16 = jax.default_backend() == "cpu" and chips.lacks_bfloat16()
    if config.dtype == "bfloat16" and slow_bfloat16 and processes.is_main():
        print("note: this CPU has no unit for bfloat16: --dtype float32 is faster here")
    return step


def spelled(policy: Policy, ids: tuple[int, ...]) -> str:
    """Tokens as a text, such as "'<s>'"."""
    return ", ".join(repr(policy.tokenizer.token(i)) for i in ids)


def untrained_state(config: RunConfig, policy: Policy, step: parallel.CompiledStep) -> TrainState:
    """The state before the first step. Raises UserError if the devices have too little
    memory for it.
    """
    params = policy.initial_params()
    state = ppo.init_state(config, params, policy.frozen, jax.random.key(config.seed))
    del params  # frees them, if they were loaded again
    memory.check_fits(
        config,
        policy.model,
        state,
        shares=parallel.row_shards(config.parallel, config.mesh),
        replicated=isinstance(step, parallel.PmapStep),
    )
    return state


def initial_state(
    config: RunConfig,
    policy: Policy,
    parts: Parts | Objective,
    prompts: BatchSource,
    state: TrainState,
) -> TrainState:
    """The first state of a run: with `reward_reference`, rewards are normalised to the
    untrained policy's.
    """
    if not config.reward_reference or isinstance(parts, Objective):
        return state
    assert isinstance(prompts, PromptSet)
    scores = reference_scores(config, policy, parts, prompts, state)
    return state.replace(statistics=shaping.normalise_to_reference(state.statistics, scores))


def reference_scores(
    config: RunConfig, policy: Policy, parts: Parts, prompts: PromptSet, state: TrainState
) -> jax.Array:
    """Scores of `reward_reference` rollouts of the untrained policy, NaN if invalid.

    Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593, section 2.1) give them mean 0
    and standard deviation 1. Prompts come from the end of the data's order.
    """

    parts = types.checked(parts)
    world = parts.environment

    def program(params, frozen, batch: Prompts, key):
        rolled = sample_responses(
            config, policy.model, params, frozen, batch, key, environment=world
        )
        scores, valid = parts.reward(frozen["reward"], rolled)
        scores = shaping.weight_columns(scores, parts.score_weights)
        return jnp.where(valid, shaping.row_scores(scores), jnp.nan)

    compiled, out = jax.jit(program), []
    for number in range(-(-config.reward_reference // config.rows)):
        last = 2**31 - 1 - number  # far from the keys and prompts of any step
        key = jax.random.fold_in(state.key, last)
        batch = prompts.batch(config, last * config.rows)
        with sharding.rows_on_mesh(state.params, batch) as batch:
            out.append(processes.to_host(compiled(state.params, state.frozen, batch, key)))
    return jnp.concatenate(out)[: config.reward_reference]
