"""The training loop around the compiled step: batches, metrics, evaluations,
checkpoints, and every reason to stop.
"""

from collections.abc import Callable, Sequence

from jaxppo.config import RunConfig
from jaxppo.data.prompts import BatchSource
from jaxppo.errors import Diverged, Interrupted, RunError, UserError
from jaxppo.models.copies import averaged
from jaxppo.parallel import CompiledStep, processes
from jaxppo.run.checkpoint import Checkpoints
from jaxppo.run.log import Log
from jaxppo.run.profiling import Meter, Trace
from jaxppo.run.signals import StopSignals
from jaxppo.run.stopwatch import Stopwatch
from jaxppo.types import TrainState

Evaluate = Callable[[TrainState], dict[str, float]]


def run(
    config: RunConfig,
    step: CompiledStep,
    state: TrainState,
    prompts: BatchSource,
    *,
    log: Log,
    checkpoints: Checkpoints,
    evaluate: Evaluate | None,
    meter: Meter,
    trace: Trace,
    past: Sequence[dict[str, float]] = (),
) -> TrainState:
    """Train to `config.steps`, and return the final state (`step.unreplicate`).

    The host works on step N-1's metrics while the devices run step N.

    Args:
      past: rows of the steps before, from which early stopping restores its count.

    Raises:
      Interrupted: after a signal; the state is saved.
      Diverged: after `config.max_bad_steps` steps without a finite update.
      UserError: too many rewards are invalid.
      RunError: three saves in a row failed, or the last one.
      NonFiniteUpdate: with `config.debug_nans`, after an update that is not finite.
    """
    done, cursor = int(state.step), int(state.cursor)
    state = step.place(state)
    stopwatch, early = Stopwatch(config, meter), EarlyStopping(config.patience)
    flat = FlatRewards()
    early.restore(past_evaluations(config, past, validated=evaluate is not None))
    no_better = f"no better validation in {config.patience} evaluations"
    if done < config.steps and early.exhausted:
        log.say(f"already stopped early, at step {done}: {no_better}")
        return step.unreplicate(state)

    def report(rows: list[dict[str, float]], signals: StopSignals) -> None:
        log.log(rows)
        for number, samples in stopwatch.samples:
            log.samples(number, samples)
        for row in rows:
            check_metrics(config, row)
        slow, again = signals.slow_warning(stopwatch.longest), stopwatch.recompilation_warning()
        equal = "" if config.teacher else flat.warning(rows)
        for text in (checkpoints.pop_error(), slow, again, equal):
            if text:
                log.say(f"warning: {text}")

    with StopSignals() as signals:
        while done < config.steps:
            with stopwatch.fetching_batch():
                batch = step.put(prompts.batches(config, cursor))
            rows = stopwatch.finish()
            trace.before(done + 1, done + config.steps_per_call)
            state, metrics = step(state, batch)
            report(rows, signals)  # of the dispatch before
            stopwatch.start(done + 1, metrics)
            done += config.steps_per_call
            cursor += config.steps_per_call * config.rows // config.group_size

            last, due = done == config.steps, done % config.save_every == 0
            stop = signals.should_stop(done)
            evaluating = evaluation_due(config, done) and not stop
            if not (stop or last or due or evaluating):
                continue
            rows, snapshot = stopwatch.finish(), step.unreplicate(state)
            if evaluating and evaluate is not None:
                rows[-1] |= validation_metrics(evaluate, snapshot)
            report(rows, signals)
            ended = evaluating and early.update(rows[-1])
            chooses = evaluate is not None or config.patience > 0
            better = evaluating and early.improved and chooses
            if stop or last or due or ended or better:
                log.flush()
                # beside validation scores, a training batch's reward is no score
                scored = evaluating or evaluate is None
                checkpoints.save(snapshot, score=checkpoint_score(rows[-1]) if scored else None)
            stopwatch.restart()
            if ended:
                log.say(f"stopped after step {done}: {no_better}")
                break
            if stop:
                finish_saving(checkpoints)
                raise Interrupted(
                    f"stopped after step {done}, which is saved; continue with --resume"
                )
    finish_saving(checkpoints)
    processes.wait_for_all("the last step is saved")
    return step.unreplicate(state)


def finish_saving(checkpoints: Checkpoints) -> None:
    """Wait for the last save. Raises RunError if it failed."""
    checkpoints.wait()
    if error := checkpoints.pop_error():
        raise RunError(error)


def evaluation_due(config: RunConfig, step: int) -> bool:
    """Whether an evaluation follows a step."""
    return config.eval_every > 0 and (step % config.eval_every == 0 or step == config.steps)


def validation_metrics(evaluate: Evaluate, state: TrainState) -> dict[str, float]:
    """The metrics of an evaluation, under the names of the log."""
    return {f"validation_{name}": x for name, x in evaluate(averaged(state)).items()}


def checkpoint_score(row: dict[str, float]) -> float:
    """The score that ranks checkpoints: the validation's, else the batch's reward, else
    minus its loss.
    """
    if "validation_score" in row:
        return row["validation_score"]
    return row["reward"] if "reward" in row else -row["loss"]


def past_evaluations(
    config: RunConfig, past: Sequence[dict[str, float]], *, validated: bool
) -> list[dict[str, float]]:
    """The rows of earlier steps that an evaluation followed."""
    every = config.eval_every
    return [
        row
        for row in past
        if ("validation_score" in row if validated else every and row["step"] % every == 0)
    ]


class EarlyStopping:
    """Counts evaluations in a row without a better score than the best so far.

    `patience` is how many of them end the run; 0 = never.
    """

    def __init__(self, patience: int):
        self.patience, self.best, self.worse = patience, float("-inf"), 0

    def update(self, row: dict[str, float]) -> bool:
        """Count an evaluation, and return whether the run ends."""
        score = checkpoint_score(row)
        self.worse = 0 if score > self.best else self.worse + 1
        self.best = max(self.best, score)
        return self.exhausted

    def restore(self, rows: Sequence[dict[str, float]]) -> None:
        """Count earlier evaluations, as process 0 knows them from its file."""
        for row in rows:
            self.update(row)
        self.best, worse = processes.broadcast_floats([self.best, self.worse])
        self.worse = int(worse)

    @property
    def exhausted(self) -> bool:
        return 0 < self.patience <= self.worse

    @property
    def improved(self) -> bool:
        """Whether the last evaluation was the best so far."""
        return self.worse == 0


class FlatRewards:
    """Warns, once, if the rewards of the first steps leave nothing to learn from."""

    STEPS = 3

    def __init__(self) -> None:
        self.flat = self.equal = 0

    def warning(self, rows: Sequence[dict[str, float]]) -> str:
        """A warning after `STEPS` first steps whose rewards were all equal, or in which
        no group had different rewards; else "".
        """
        for row in (row for row in rows if row["step"] <= self.STEPS and "reward_std" in row):
            self.equal += row["reward_std"] == 0
            self.flat += row.get("informative", 1.0) == 0
            if self.equal == self.STEPS:
                return (
                    f"all rewards of the first {self.STEPS} steps are equal ({row['reward']:g} at "
                    "last): there is nothing to learn from; check the reward on samples.jsonl"
                )
            if self.flat == self.STEPS:
                return (
                    f"in the first {self.STEPS} steps all samples of a prompt had the same reward: "
                    "the advantages are 0; use easier prompts, a graded reward, or a larger "
                    "--group-size"
                )
        return ""


class NonFiniteUpdate(Exception):
    """The number of a step whose update was not finite, to be replayed."""


def check_metrics(config: RunConfig, row: dict[str, float]) -> None:
    """Raise an error if a step's metrics do not allow the run to continue."""
    step = int(row["step"])
    if config.debug_nans and row.get("skipped", 0) > 0:
        raise NonFiniteUpdate(step)
    if row.get("barren_steps", 0) >= config.max_bad_steps:
        raise Diverged(
            f"no finite update in the {int(row['barren_steps'])} steps up to step {step}; the "
            "newest checkpoint is good. Lower --lr, or find the cause with --resume --debug-nans"
        )
    share = row.get("invalid_rows", 0) / config.rows
    if share > config.max_invalid_rewards:
        if 2 * row.get("nonfinite_rows", 0) >= row["invalid_rows"]:
            raise UserError(
                f"{row['nonfinite_rows'] / config.rows:.0%} of the rows of step {step} have logits "
                f"that are NaN or infinite (--max-invalid-rewards {config.max_invalid_rewards:.0%})"
                ": it is not the reward; start another run with a lower --lr or in --dtype float32"
            )
        raise UserError(
            f"{share:.0%} of the rewards of step {step} are invalid (--max-invalid-rewards "
            f"{config.max_invalid_rewards:.0%}); fix the reward function and start again"
        )
