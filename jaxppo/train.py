"""A run: begun or gone on with, in its folder. `assemble` makes the policy, `loop` goes
round, `ppo` has the mathematics.
"""

import contextlib
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxppo import parallel, ppo, supervised
from jaxppo.config import RunConfig, validate, validate_run
from jaxppo.costs import chips, memory
from jaxppo.data import prompts
from jaxppo.data.prompts import PromptSet
from jaxppo.errors import Diverged, RunError, UserError
from jaxppo.parallel import processes, sharding
from jaxppo.rewards import shaping
from jaxppo.run import files, loop, profiling, replay, resume, trackers
from jaxppo.run.checkpoint import Checkpoints
from jaxppo.run.load import Policy
from jaxppo.run.lock import RunLock
from jaxppo.run.log import Log, Tracker, plot_curves
from jaxppo.run.sampler import responses
from jaxppo.run.settings import to_dict
from jaxppo.supervised import Objective
from jaxppo.types import Parts, Prompts, TrainState


def fit(
    config: RunConfig,
    policy: Policy,
    parts: Parts | Objective,
    prompts: prompts.Batches,
    *,
    folder: Path,
    evaluate: loop.Evaluate | None = None,
) -> TrainState:
    """Train to `config.steps` steps, from the newest checkpoint when `config.resume`;
    writes metrics, checkpoints and curves.

    `parts` are those of a policy gradient with a `PromptSet`, or the objective of a
    supervised stage with `data.rows.Rows`.

    `evaluate(state)` returns numbers for validation prompts; they are logged as
    `validation_<name>`, and `score` among them (without an `evaluate`, the batch's
    reward or loss) decides which checkpoint is the best. Of several processes the first
    alone writes. How it may end before its last step is in `loop.run`.
    """
    validate_run(config)
    step = build_step(config, policy, parts)
    state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(config.seed))
    shares, replicated = (
        parallel.count(config.parallel, config.mesh),
        isinstance(step, parallel.PmapStep),
    )
    memory.check(config, policy.model, state, shares=shares, replicated=replicated)
    # For a second look at the checkpoints: the first step destroys these arrays.
    like = jax.eval_shape(lambda: state.replace(frozen=None, key=None))
    like = like.replace(frozen=state.frozen, key=jax.random.key(config.seed))
    writer = processes.is_main()
    with contextlib.ExitStack() as stack:
        if writer:
            stack.callback(RunLock(folder).release)
        about = {
            "config": fingerprint(config),
            "versions": files.versions(),
            "weights": resume.weight_hashes(config),
        }
        checkpoints = Checkpoints(
            folder / "checkpoints", about=about, keep_every=config.keep_every, write=writer
        )
        stack.callback(checkpoints.close)
        resuming = config.resume and not resume.not_started(folder, checkpoints)
        state = (
            resume.load_newest(config, checkpoints, state, folder)
            if resuming
            else initial_state(config, policy, parts, prompts, state)
        )
        if resuming and evaluate is not None:
            resume.finish_evaluation(config, checkpoints, state, folder, evaluate)
        steps = files.read_lines(folder / "metrics.jsonl") if resuming else []
        past = [row for row in steps if row["step"] <= int(state.step)]
        if writer:
            files.write_config(folder, to_dict(config))
            files.write_command(folder)
        if not resuming:
            # from here on the run can be gone on with
            checkpoints.save(state, score=None)
        log = (
            Tracker(folder, first_step=int(state.step), total_steps=config.steps)
            if writer
            else Log()
        )
        log = trackers.with_trackers(log, config, folder) if writer else log
        stack.callback(log.close)
        meter, trace = make_meter(config, policy, parts, step), profiling.Trace(config, folder)
        stack.callback(meter.close)
        stack.callback(trace.close)
        try:
            return loop.run(
                config,
                step,
                state,
                prompts,
                log=log,
                checkpoints=checkpoints,
                evaluate=evaluate,
                meter=meter,
                trace=trace,
                past=past,
            )
        except loop.NotFinite as bad:
            if isinstance(parts, Objective):
                raise Diverged(
                    f"the update of step {bad.args[0]} is not finite; lower --lr"
                ) from None
            assert isinstance(prompts, PromptSet)
            text = replay.diagnose(
                config, policy, parts, prompts, checkpoints, like, step=bad.args[0]
            )
            raise Diverged(text) from None
        except (OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
            raise explain(error, config, checkpoints) from error
        finally:
            # On a full disk the reason to end is another one than that there is no
            # picture.
            with contextlib.suppress(OSError):
                if writer and (folder / "metrics.jsonl").stat().st_size:
                    plot_curves(folder)


def make_meter(
    config: RunConfig, policy: Policy, parts: Parts | Objective, step: parallel.CompiledStep
) -> profiling.Meter:
    """What knows how many operations a step has, and how many the devices could do."""
    flops = profiling.flops_of(config, policy.shape, supervised=isinstance(parts, Objective))
    used = jax.devices()[: 1 if config.parallel == "jit" else None]
    return profiling.Meter(step, flops=flops, peak=profiling.peak_of(used))


def initial_state(
    config: RunConfig,
    policy: Policy,
    parts: Parts | Objective,
    prompts: prompts.Batches,
    state: TrainState,
) -> TrainState:
    """The first state of a run."""
    if not config.reward_reference or isinstance(parts, Objective):
        return state
    assert isinstance(prompts, PromptSet)
    scores = first_scores(config, policy, parts, prompts, state)
    return state.replace(statistics=shaping.normalise_to_reference(state.statistics, scores))


def fingerprint(config: RunConfig) -> str:
    """A hash of every setting."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:16]


def explain(error: Exception, config: RunConfig, checkpoints: Checkpoints) -> Exception:
    """A full disk, a vanished folder or too little memory in one line; any other error
    as it is.
    """
    newest = (
        f"step {checkpoints.steps()[-1]} is safe, go on with --resume"
        if checkpoints.steps()
        else "nothing was saved yet"
    )
    reason = processes.first_line(error)
    if isinstance(error, OSError):
        return RunError(f"cannot write ({reason}); {newest}")
    if (
        isinstance(error, MemoryError)
        or "RESOURCE_EXHAUSTED" in str(error)
        or "Out of memory" in str(error)
    ):
        return RunError(
            f"out of memory ({reason}); lower it with {'; '.join(memory.cures(config))}; {newest}"
        )
    return error


def build_step(
    config: RunConfig, policy: Policy, parts: Parts | Objective
) -> parallel.CompiledStep:
    """The step in the configured mode, after a check that the devices are there and the
    batch divides over them.
    """
    found = len(jax.devices())
    if config.expect_devices and found != config.expect_devices:
        raise UserError(
            f"--expect-devices {config.expect_devices}, but there are {found}; is the accelerator's JAX installed?"
        )
    if config.parallel == "jit" and jax.process_count() > 1:
        raise UserError(
            f"--parallel jit is for one process, but there are {jax.process_count()}; use pmap or mesh"
        )
    validate(config, devices=parallel.count(config.parallel, config.mesh))

    def make(axis_name: str | None):
        if isinstance(parts, Objective):
            train_step = supervised.make_train_step(
                policy.model, parts, config, axis_name=axis_name
            )
        else:
            train_step = ppo.make_train_step(policy.model, parts, config, axis_name=axis_name)
        return train_step if config.steps_per_call == 1 else ppo.repeat(train_step)

    step = parallel.prepare(
        make, mode=config.parallel, mesh=config.mesh, leading=int(config.steps_per_call > 1)
    )
    if config.parallel == "auto" and processes.is_main():
        print(f"--parallel auto: {step.name}")
    if (
        config.dtype == "bfloat16"
        and jax.default_backend() == "cpu"
        and chips.rounds_in_software()
        and processes.is_main()
    ):
        print("note: this CPU has no unit for bfloat16: --dtype float32 takes less time here")
    return step


def first_scores(
    config: RunConfig, policy: Policy, parts: Parts, prompts: PromptSet, state: TrainState
) -> jax.Array:
    """Raw scores of `reward_reference` rollouts of the policy as it is, NaN where
    invalid: what Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593, section 2.1)
    give mean 0 and deviation 1. Prompts from the end of the data's order.
    """

    def program(params, frozen, batch: Prompts, key):
        rolled = responses(config, policy.model, params, frozen, batch, key)
        scores, valid = parts.reward(frozen["reward"], rolled)
        return jnp.where(valid, ppo.row_scores(scores), jnp.nan)

    compiled, out = jax.jit(program), []
    for number in range(-(-config.reward_reference // config.rows)):
        key = jax.random.fold_in(state.key, 2**31 - 1 - number)  # far from any step's
        with sharding.rows_on_mesh(
            state.params, prompts.batch(config, (2**31 - 1 - number) * config.rows)
        ) as batch:
            out.append(processes.to_host(compiled(state.params, state.frozen, batch, key)))
    return jnp.concatenate(out)[: config.reward_reference]
