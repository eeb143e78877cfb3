"""Many runs as one program: `vmap` of the whole train step over seeds and over settings
that may be traced.

    8 seeds x clip_high .2, .28, .4  =  24 runs that compile once and decode, score and update together

What `SWEPT` lists may differ inside of a program. Settings that change the program (a
loss, an estimator, a network) cannot: `programs` cuts a list of runs into those that
can share one. Every run's steps are what they would be alone: its own seed, order of
the data, noise, optimizer and counters; one that diverges stays in, with what it did.
Frozen weights exist once. There is no folder, so what a training run does besides its
steps is not done: evaluation, checkpoints, and ending early.

With several devices the runs are dealt out to them; they have nothing to say to each
other but when to stop decoding. Where they do not divide, the last run is done more
than once.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxppo import ppo
from jaxppo.config import Config, RunConfig, validate_run
from jaxppo.data.prompts import Batches
from jaxppo.errors import UserError
from jaxppo.run.load import Policy
from jaxppo.types import Model, Parts, Prompts, TrainState

AXIS = "seeds"

SWEPT = (
    "lr",
    "critic_lr",
    "weight_decay",
    "adam_eps",
    "max_grad_norm",
    "clip_low",
    "clip_high",
    "value_clip",
    "beta",
    "kl_coef",
    "kl_target",
    "kl_horizon",
    "gamma",
    "lam",
    "critic_lam",
    "value_coef",
    "entropy_coef",
    "temperature",
    "missing_eos_penalty",
    "baseline_decay",
)

MakeParts = Callable[[Any], Parts]


class Run(NamedTuple):
    """One run of a sweep: settings in place of the common ones; `arm` is the name of
    what it tries, `task` of its prompts.
    """

    arm: str
    seed: int
    settings: Mapping[str, Any]
    task: str = ""


class Result(NamedTuple):
    """What became of a run."""

    run: Run
    metrics: dict[str, np.ndarray]  # [steps] each, as metrics.jsonl has them
    state: TrainState  # the last one; its parameters are on the host

    @property
    def diverged(self) -> bool:
        """Whether an update was left out since it was not finite."""
        return bool(np.sum(self.metrics["skipped"]) > 0)


def parse(texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Settings and their values from the command line. Raises UserError for a setting
    that cannot be swept, or no number.

    >>> parse(["clip_high=.2,.28", "lr=1e-3"])
    {'clip_high': (0.2, 0.28), 'lr': (0.001,)}
    """
    found: dict[str, tuple[float, ...]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        name = name.replace("-", "_")
        if name in found:
            raise UserError(
                f"--sweep has {name} twice; write all its values together: {name}=.1,.2"
            )
        if name not in SWEPT:
            raise UserError(
                f"--sweep {text!r}: {name} is not one of {', '.join(SWEPT)}; other settings need runs of their own"
            )
        try:
            found[name] = tuple(float(x) for x in values.split(","))
        except ValueError:
            raise UserError(f"--sweep {text!r}: write it as {name}=.1,.2") from None
    return found


def grid(swept: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> list[Run]:
    """A run for every seed and combination of values.

    >>> [run.arm for run in grid({"gamma": [0.9, 1.0]}, seeds=[0])]
    ['gamma 0.9', 'gamma 1']
    """
    chosen = [dict(zip(swept, values)) for values in itertools.product(*swept.values())]
    name = lambda settings: (
        ", ".join(f"{key} {x:.9g}" for key, x in settings.items()) or "as configured"
    )
    return [Run(name(settings), seed, settings) for settings in chosen for seed in seeds]


def programs(runs: Sequence[Run], config: Any) -> list[list[Run]]:
    """The runs, grouped by what cannot differ inside of one program; each group in its
    order. A setting that only some runs of a group name is filled in for the others
    from `config`.

    >>> runs = [
    ...     Run("a", 0, {}),
    ...     Run("b", 0, {"lr": 2.0}),
    ...     Run("c", 0, {"lr": 1.0, "loss": "gspo"}),
    ... ]
    >>> [
    ...     [(run.arm, run.settings["lr"]) for run in group]
    ...     for group in programs(runs, Config(lr=0.5))
    ... ]
    [[('a', 0.5), ('b', 2.0)], [('c', 1.0)]]
    """
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        fixed = {name: x for name, x in run.settings.items() if name not in SWEPT or x is None}
        groups.setdefault(tuple(sorted(fixed.items())), []).append(run)
    out: dict[tuple, list[Run]] = {}
    for fixed, group in groups.items():
        common = {
            name: getattr(config, name) for run in group for name in run.settings if name in SWEPT
        }
        for run in group:
            whole = run._replace(settings={**common, **run.settings})
            # what is None stays so in its own program: no number says "as the loss has
            # it"
            none = tuple(sorted(name for name in common if whole.settings[name] is None))
            out.setdefault((*fixed, none), []).append(whole)
    return list(out.values())


class Start(NamedTuple):
    """The policy of many runs: what is trained of each, and what is not, once if it is
    the same for all.
    """

    policy: Policy  # of the first
    params: Any  # leading dimension N
    frozen: Any  # with a leading dimension N unless `shared`
    shared: bool


def start(each: Sequence[RunConfig], load: Callable[[Any], Policy]) -> Start:
    """The policies of runs that differ in seed and swept settings alone: one is loaded
    for each seed.
    """
    first, found = load(each[0]), {}
    found[each[0].seed] = (first.params, first.frozen)
    for settings in each:
        if settings.seed not in found:
            other = load(settings)
            # the same weights for every seed, as of a checkpoint, are kept once
            found[settings.seed] = (
                other.params,
                first.frozen if same(other.frozen, first.frozen) else other.frozen,
            )
    shared = all(frozen is first.frozen for _, frozen in found.values())
    stack = lambda trees: jax.tree.map(
        lambda *x: np.stack(x), *(jax.device_get(tree) for tree in trees)
    )
    params = stack([found[settings.seed][0] for settings in each])
    return Start(
        first,
        params,
        first.frozen if shared else stack([found[settings.seed][1] for settings in each]),
        shared,
    )


def same(one: Any, other: Any) -> bool:
    """Whether two trees are equal in structure and numbers.

    >>> (
    ...     same({"a": np.ones(2)}, {"a": np.ones(2)}),
    ...     same({"a": np.ones(2)}, {"a": np.zeros(2)}),
    ...     same({"a": None}, {}),
    ... )
    (True, False, False)
    """
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)))


def make_step(model: Model, make_parts: MakeParts, config: Any, *, shared: bool = True) -> Callable:
    """step(values, live, frozen, prompts) -> (live, metrics): the train step of many
    runs.

    values: the swept settings, [N] each. live: states without `frozen`, and prompts,
    with a leading dimension N; `frozen` has one unless it is `shared`. The step is
    built inside of the mapped function, from settings that hold tracers.
    """

    def one(
        values: dict[str, jax.Array], live: TrainState, frozen: dict, prompts: Prompts
    ) -> tuple[TrainState, dict]:
        settings = dataclasses.replace(config, **values)
        step = ppo.make_train_step(model, make_parts(settings), settings, stop_axis=AXIS)
        step = step if config.steps_per_call == 1 else ppo.repeat(step)
        new, metrics = step(live.replace(frozen=frozen), prompts)
        return new.replace(frozen=None), metrics

    return jax.vmap(one, in_axes=(0, 0, None if shared else 0, 0), axis_name=AXIS)


def begin(
    config: Config, params: Any, frozen: dict, values: dict[str, jax.Array], seeds: Sequence[int]
) -> TrainState:
    """The first states of many runs, without `frozen`; `params` have a leading
    dimension N.
    """
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))

    def one(values, params, key):
        return ppo.init_state(dataclasses.replace(config, **values), params, frozen, key).replace(
            frozen=None
        )

    return jax.jit(jax.vmap(one))(values, params, keys)


def run(
    config: RunConfig,
    runs: Sequence[Run],
    load: Callable[[Any], Policy],
    make_parts: MakeParts,
    prompts: Callable[[Run], Batches],
    *,
    devices: Sequence | None = None,
    tell: Callable[[int, dict[str, np.ndarray]], None] | None = None,
) -> list[Result]:
    """Train all runs of one program to `config.steps`.

    Args:
        runs: one group of `programs`. load: the policy of a run from its settings, its
        own seed among them. make_parts: the parts from settings that may hold tracers.
        prompts: what deals a run's batches. tell: called after each dispatch with the
        number of steps done and their metrics, [N] or [N, steps_per_call] each.

    Raises UserError for settings that cannot run, before anything is compiled.
    """
    if len(programs(runs, config)) > 1:
        raise UserError("these runs need more than one program; cut them by sweep.programs")
    asked, where = len(runs), placement(len(runs), devices)
    runs = [*runs, *[runs[-1]] * (-len(runs) % where.num_devices)]
    each = [dataclasses.replace(config, **run.settings, seed=run.seed) for run in runs]
    for settings in each:
        validate_run(settings)
    names = [name for name, x in runs[0].settings.items() if name in SWEPT and x is not None]
    begun = start(each, load)
    values, params = jax.device_put(
        (
            {name: np.asarray([run.settings[name] for run in runs], np.float32) for name in names},
            begun.params,
        ),
        where,
    )
    live = begin(each[0], params, {}, values, [run.seed for run in runs])
    frozen = jax.device_put(
        begun.frozen, NamedSharding(where.mesh, PartitionSpec()) if begun.shared else where
    )
    step = jax.jit(
        make_step(begun.policy.model, make_parts, each[0], shared=begun.shared), donate_argnums=1
    )
    rows: list[dict] = []
    config = each[0]  # how many steps, and of how many rows, is the same for all
    for done in range(0, config.steps, config.steps_per_call):
        cursor = done * config.rows // config.group_size
        batches = [prompts(run).call(settings, cursor) for run, settings in zip(runs, each)]
        live, metrics = step(
            values,
            live,
            frozen,
            jax.device_put(jax.tree.map(lambda *x: np.stack(x), *batches), where),
        )
        rows.append(metrics)
        if tell:
            tell(
                done + config.steps_per_call,
                jax.tree.map(lambda x: x[:asked], jax.device_get(metrics)),
            )
    join = lambda *x: np.stack(x, 1) if config.steps_per_call == 1 else np.concatenate(x, 1)
    metrics, live = jax.tree.map(join, *jax.device_get(rows)), jax.device_get(live)
    pick = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    kept = lambda i: begun.frozen if begun.shared else pick(begun.frozen, i)
    return [
        Result(run, pick(metrics, i), pick(live, i).replace(frozen=kept(i)))
        for i, run in enumerate(runs[:asked])
    ]


def placement(runs: int, devices: Sequence | None = None) -> NamedSharding:
    """Where arrays with a leading dimension of runs go: in equal shares, as small as
    they can be, on as few devices as have them.

    >>> placement(6, jax.devices()[:1]).num_devices
    1
    """
    found = list(jax.devices() if devices is None else devices)
    share = -(-runs // len(found))
    count = -(-runs // share)
    mesh = jax.make_mesh((count,), (AXIS,), devices=found[:count], axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(AXIS))


def saved(
    config: RunConfig,
    runs: Sequence[Run],
    load: Callable,
    make_parts: MakeParts,
    prompts: Callable,
    *,
    steps: int = 10,
) -> str:
    """Seconds of a step of all runs at once and of the first one alone, compilation
    aside, in a line.
    """
    short = dataclasses.replace(
        config, steps=steps * config.steps_per_call, save_every=steps * config.steps_per_call
    )
    seconds = []
    for group in (runs, runs[:1]):
        times: list[float] = []
        run(
            short,
            group,
            load,
            make_parts,
            prompts,
            tell=lambda done, metrics, times=times: times.append(time.monotonic()),
        )
        seconds.append(float(np.median(np.diff(times))))  # the first dispatch compiled
    together, alone = seconds
    return (
        f"a step of {len(runs)} runs at once: {together:.3f} s; of one alone: {alone:.3f} s; one after the other they would "
        f"take {len(runs) * alone / together:.1f} times as long"
    )
