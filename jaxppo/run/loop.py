"""The loop around the compiled step: prompts in, metrics out, evaluations, checkpoints,
and every reason to stop.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import jax

from jaxppo.config import RunConfig
from jaxppo.data.prompts import Batches
from jaxppo.errors import Diverged, Interrupted, RunError, UserError
from jaxppo.parallel import CompiledStep, processes
from jaxppo.run.checkpoint import Checkpoints
from jaxppo.run.log import Log
from jaxppo.run.profiling import Meter, Trace
from jaxppo.run.signals import Stopping
from jaxppo.types import TrainState

Evaluate = Callable[[TrainState], dict[str, float]]


def run(
    config: RunConfig,
    step: CompiledStep,
    state: TrainState,
    prompts: Batches,
    *,
    log: Log,
    checkpoints: Checkpoints,
    evaluate: Evaluate | None,
    meter: Meter,
    trace: Trace,
    past: Sequence[dict[str, float]] = (),
) -> TrainState:
    """Train to `config.steps`, and return the state as `step.whole` shows it. `past`:
    the numbers of the steps before, of which early stopping remembers its evaluations.

    Raises:
        Interrupted: after a signal, with the state saved. Diverged: after
        `config.max_bad_steps` steps without an update; the newest checkpoint is good.
        UserError: too many rewards are invalid. RunError: three saves in a row failed.
        NotFinite: an update was not finite, and `config.debug_nans` wants to know why.
    """
    done, cursor = int(state.step), int(state.cursor)
    state = step.place(state)
    clock, patience = Stopwatch(config, meter), Patience(config.patience)
    patience.remember(evaluations(config, past, validated=evaluate is not None))
    if done < config.steps and patience.spent:
        log.say(
            f"ended at step {done} when it ran before: no better validation in {config.patience} evaluations"
        )
        return step.whole(state)

    def tell(rows: list[dict[str, float]], stopping: Stopping) -> None:
        log.log(rows)
        for row in rows:
            judge(config, row)
        for text in (checkpoints.news(), stopping.too_slow(clock.longest), clock.again()):
            if text:
                log.say(f"warning: {text}")

    with Stopping() as stopping:
        while done < config.steps:
            with clock.fetching():
                batch = step.put(prompts.call(config, cursor))
            rows = clock.settle()
            trace.before(done + 1, done + config.steps_per_call)
            state, metrics = step(state, batch)
            # the last step's numbers are written while this one runs
            tell(rows, stopping)
            clock.watch(done + 1, metrics)
            done += config.steps_per_call
            cursor += config.steps_per_call * config.rows // config.group_size
            last, stop = done == config.steps, stopping.due(done)
            evaluating = evaluates(config, done) and not stop
            if evaluating or stop or last or done % config.save_every == 0:
                rows, seen = clock.settle(), step.whole(state)
                if evaluating and evaluate is not None:
                    rows[-1] |= validated(evaluate, seen)
                tell(rows, stopping)
                ended = evaluating and patience.over(rows[-1])
                better = (
                    evaluating
                    and patience.improved
                    and (evaluate is not None or config.patience > 0)
                )
                if stop or last or ended or done % config.save_every == 0 or better:
                    log.settle()
                    # where there is a validation, a batch's own numbers are no score
                    # beside its
                    checkpoints.save(
                        seen, score=None if evaluate and not evaluating else score(rows[-1])
                    )
                clock.restart()
                if ended:
                    log.say(
                        f"stopped after step {done}: no better validation in {config.patience} evaluations"
                    )
                    break
            if stop:
                checkpoints.wait()
                if text := checkpoints.news():
                    raise RunError(text)
                raise Interrupted(
                    f"stopped after step {done}, which is saved; continue with --resume"
                )
    checkpoints.wait()
    # the last one: nothing comes after it that could tell
    if text := checkpoints.news():
        raise RunError(text)
    processes.wait_for_all("the last step is saved")
    return step.whole(state)


def evaluates(config: RunConfig, step: int) -> bool:
    """Whether a step is followed by an evaluation."""
    return config.eval_every > 0 and (step % config.eval_every == 0 or step == config.steps)


def validated(evaluate: Evaluate, state: TrainState) -> dict[str, float]:
    """An evaluation's numbers as the log has them."""
    return {f"validation_{name}": x for name, x in evaluate(state).items()}


def score(row: dict[str, float]) -> float:
    """What says which checkpoint is the best: the validation's score, or the batch's
    reward, or its loss turned round.
    """
    return (
        row["validation_score"]
        if "validation_score" in row
        else row["reward"]
        if "reward" in row
        else -row["loss"]
    )


def evaluations(
    config: RunConfig, past: Sequence[dict[str, float]], *, validated: bool
) -> list[dict[str, float]]:
    """The steps among those before at which there was an evaluation."""
    every = config.eval_every
    return [
        row
        for row in past
        if ("validation_score" in row if validated else every and row["step"] % every == 0)
    ]


class Patience:
    """Whether `most` evaluations in a row were no better than the best before them
    (early stopping); 0 = never.
    """

    def __init__(self, most: int):
        self.most, self.best, self.worse = most, float("-inf"), 0

    def over(self, row: dict[str, float]) -> bool:
        """After an evaluation, whose step's numbers are `row`."""
        now = score(row)
        self.worse = 0 if now > self.best else self.worse + 1
        self.best = max(self.best, now)
        return self.spent

    def remember(self, rows: Sequence[dict[str, float]]) -> None:
        """Take up where earlier evaluations have left it: process 0's, since others may
        not have the file.
        """
        for row in rows:
            self.over(row)
        self.best, worse = processes.numbers_from_main([self.best, self.worse])
        self.worse = int(worse)

    @property
    def spent(self) -> bool:
        """Whether it is at its end."""
        return 0 < self.most <= self.worse

    @property
    def improved(self) -> bool:
        """Whether the last evaluation was the best so far: its state is kept, whenever
        the next save is due.
        """
        return self.worse == 0


class NotFinite(Exception):
    """The number of a step with an update that was not finite: it is to be looked
    into.
    """


def judge(config: RunConfig, row: dict[str, float]) -> None:
    """Whether a step's numbers allow to go on."""
    if config.debug_nans and row.get("skipped", 0) > 0:
        raise NotFinite(int(row["step"]))
    if row.get("barren_steps", 0) >= config.max_bad_steps:
        raise Diverged(
            f"no finite update in the {int(row['barren_steps'])} steps up to step {int(row['step'])}; the newest checkpoint is "
            "good. Lower --lr, or see where it comes from with --resume --debug-nans"
        )
    share = row.get("invalid_rows", 0) / config.rows
    if share > config.max_invalid_rewards:
        raise UserError(
            f"{share:.0%} of the rewards of step {int(row['step'])} are invalid (--max-invalid-rewards "
            f"{config.max_invalid_rewards:.0%}); mend the reward function and continue with --resume"
        )


class Stopwatch:
    """Waits for the dispatch in flight and turns its metrics into numbers, with its
    seconds and what they went to.
    """

    def __init__(self, config: RunConfig, meter: Meter):
        self.config, self.meter, self.flying = config, meter, None
        self.recompiled, self.news, self.idle = 0.0, False, 0.0
        self.first, self.longest = True, 0.0  # seconds of a dispatch
        self.restart()

    def restart(self) -> None:
        self.started = time.monotonic()
        self.meter.forget()

    def watch(self, first_step: int, metrics: dict) -> None:
        self.flying = (first_step, metrics)

    @contextlib.contextmanager
    def fetching(self) -> Iterator[None]:
        """Around the making of the next batch: when the dispatch in flight ends before
        it is there, the devices wait for it.
        """
        began = time.monotonic()
        yield
        late = self.flying is not None and all(
            x.is_ready() for x in jax.tree.leaves(self.flying[1])
        )
        self.idle = time.monotonic() - began if late else 0.0

    def settle(self) -> list[dict[str, float]]:
        """One dict for each step of the dispatch in flight; none when nothing flies."""
        if self.flying is None:
            return []
        first, metrics = self.flying
        metrics = jax.device_get(metrics)
        whole = time.monotonic() - self.started
        seconds = whole / self.config.steps_per_call
        spent = self.meter.numbers(whole, self.config.steps_per_call, idle=self.idle)
        self.idle = 0.0
        self.news, self.recompiled = (
            spent["recompilations"] > self.recompiled,
            spent["recompilations"],
        )
        # The first dispatch compiles, too.
        self.flying, self.longest, self.first = (
            None,
            0.0 if self.first else max(self.longest, whole),
            False,
        )
        self.restart()
        rows = []
        for k in range(self.config.steps_per_call):
            row = {
                name: float(x if self.config.steps_per_call == 1 else x[k])
                for name, x in metrics.items()
            }
            speed = row["length"] * self.config.rows / seconds
            rows.append(
                {"step": first + k, **row, "seconds": seconds, "tokens_per_second": speed, **spent}
            )
        return rows

    def again(self) -> str:
        """A line when the step was compiled once more."""
        if not self.news:
            return ""
        self.news = False
        times = f"{self.recompiled:.0f} times so far"
        return f"the step was compiled again ({times}): give every step batches of one shape, that lie on the devices alike"
