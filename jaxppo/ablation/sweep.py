"""Many runs as one program: `vmap` of the whole train step over seeds and settings.

    8 seeds x clip_high .2, .28, .4  =  24 runs that compile once and step together

Only the settings in `SWEPT` can be traced, so only they may differ inside one program;
`group_by_program` splits a list of runs accordingly. Every run takes the same steps as
it would alone, also if it diverges. A sweep has no folder: it neither evaluates nor
saves checkpoints, and does not stop early.

Several devices share the runs. If these do not divide evenly, the last one is computed
more than once.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxppo import ppo
from jaxppo.config import Config, RunConfig, validate_run
from jaxppo.data.prompts import BatchSource
from jaxppo.errors import UserError
from jaxppo.run.policy import Policy
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

LoadPolicy = Callable[[Any], Policy]
MakeParts = Callable[[Any], Parts]


class Run(NamedTuple):
    """One run of a sweep."""

    arm: str  # a name for its settings
    seed: int
    settings: Mapping[str, Any]  # replace the common ones
    task: str = ""  # names its prompts


class Result(NamedTuple):
    """The outcome of a run."""

    run: Run
    metrics: dict[str, np.ndarray]  # [steps] each, as in metrics.jsonl
    state: TrainState  # after the last step, on the host


def parse_values(texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Parse settings and their values from the command line. Raises UserError for a
    setting that cannot be swept, or a value that is not a number.

    >>> parse_values(["clip_high=.2,.28", "lr=1e-3"])
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
                f"--sweep {text!r}: {name} is not one of {', '.join(SWEPT)}; "
                "other settings need runs of their own"
            )
        try:
            found[name] = tuple(float(x) for x in values.split(","))
        except ValueError:
            raise UserError(f"--sweep {text!r}: write it as {name}=.1,.2") from None
    return found


def grid(swept: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> list[Run]:
    """A run for every combination of values and every seed.

    >>> [run.arm for run in grid({"gamma": [0.9, 1.0]}, seeds=[0])]
    ['gamma 0.9', 'gamma 1']
    """
    runs = []
    for values in itertools.product(*swept.values()):
        settings = dict(zip(swept, values))
        name = ", ".join(f"{key} {x:.9g}" for key, x in settings.items()) or "as configured"
        runs += [Run(name, seed, settings) for seed in seeds]
    return runs


def group_by_program(runs: Sequence[Run], config: Any) -> list[list[Run]]:
    """Group the runs that can share one program. If only some runs of a group name a
    setting, the others get its value from `config`.

    >>> a, b = Run("a", 0, {}), Run("b", 0, {"lr": 2.0})
    >>> c = Run("c", 0, {"lr": 1.0, "loss": "gspo"})
    >>> groups = group_by_program([a, b, c], Config(lr=0.5))
    >>> [[(run.arm, run.settings["lr"]) for run in group] for group in groups]
    [[('a', 0.5), ('b', 2.0)], [('c', 1.0)]]
    """
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        fixed = {name: x for name, x in run.settings.items() if name not in SWEPT or x is None}
        groups.setdefault(tuple(sorted(fixed.items())), []).append(run)
    out: dict[tuple, list[Run]] = {}
    for fixed, group in groups.items():
        swept = dict.fromkeys(name for run in group for name in run.settings if name in SWEPT)
        default = {name: getattr(config, name) for name in swept}
        for run in group:
            settings = {**default, **run.settings}
            # None means "the loss's own default", which no traced number can say.
            none = tuple(sorted(name for name in swept if settings[name] is None))
            out.setdefault((*fixed, none), []).append(run._replace(settings=settings))
    return list(out.values())


def stack_policies(configs: Sequence[RunConfig], load: LoadPolicy) -> tuple[Model, Any, Any, bool]:
    """Load the policy of each seed. Returns (model, params, frozen, shared), with a
    leading dimension N; frozen weights that all seeds share are stored once, without.
    """
    first = load(configs[0])
    found = {configs[0].seed: (first.params, first.frozen)}
    for config in configs:
        if config.seed not in found:
            other = load(config)
            frozen = first.frozen if trees_equal(other.frozen, first.frozen) else other.frozen
            found[config.seed] = (other.params, frozen)
    stack = lambda trees: jax.tree.map(lambda *x: np.stack(x), *map(jax.device_get, trees))
    params, frozen = zip(*(found[config.seed] for config in configs))
    shared = all(tree is first.frozen for tree in frozen)
    return first.model, stack(params), first.frozen if shared else stack(frozen), shared


def trees_equal(one: Any, other: Any) -> bool:
    """Whether two trees have the same structure and numbers."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)))


def make_sweep_step(
    model: Model, make_parts: MakeParts, config: Any, *, shared: bool = True
) -> Callable:
    """step(values, live, frozen, prompts) -> (live, metrics): the train step of N runs.

    values: the swept settings, [N] each. live, prompts: states without `frozen`, and
    prompts, with a leading dimension N; so has `frozen` unless it is `shared`. The step
    is built inside the mapped function, from settings that hold tracers.
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


def init_states(
    config: Config, params: Any, values: dict[str, jax.Array], seeds: Sequence[int]
) -> TrainState:
    """The first states of N runs, without `frozen`; `params` have a leading dimension
    N.
    """

    def one(values, params, key):
        settings = dataclasses.replace(config, **values)
        return ppo.init_state(settings, params, {}, key).replace(frozen=None)

    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    return jax.jit(jax.vmap(one))(values, params, keys)


def run(
    config: RunConfig,
    runs: Sequence[Run],
    load: LoadPolicy,
    make_parts: MakeParts,
    prompts: Callable[[Run], BatchSource],
    *,
    devices: Sequence | None = None,
    on_step: Callable[[int, dict[str, np.ndarray]], None] | None = None,
) -> list[Result]:
    """Train the runs of one program (`group_by_program`) to `config.steps`.

    `load` and `make_parts` get a run's settings; those of `make_parts` may hold
    tracers. `on_step` is called after each dispatch with the number of steps done and
    their metrics, [N] or [N, steps_per_call] each. Raises UserError for settings that
    cannot run, before anything is compiled.
    """
    if len(group_by_program(runs, config)) > 1:
        raise UserError("these runs need more than one program; split them by group_by_program")
    asked, sharding = len(runs), run_sharding(len(runs), devices)
    runs = [*runs, *[runs[-1]] * (-len(runs) % sharding.num_devices)]
    configs = [dataclasses.replace(config, **run.settings, seed=run.seed) for run in runs]
    for each in configs:
        validate_run(each)
    config = configs[0]  # the number of steps and rows is the same for all

    model, params, frozen, shared = stack_policies(configs, load)
    names = [name for name, x in runs[0].settings.items() if name in SWEPT and x is not None]
    column = lambda name: np.asarray([run.settings[name] for run in runs], np.float32)
    values = {name: column(name) for name in names}
    values, params = jax.device_put((values, params), sharding)
    live = init_states(config, params, values, [run.seed for run in runs])
    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    placed = jax.device_put(frozen, replicated if shared else sharding)
    step = make_sweep_step(model, make_parts, config, shared=shared)
    step = jax.jit(step, donate_argnums=1)

    rows: list[dict] = []
    for done in range(0, config.steps, config.steps_per_call):
        cursor = done * config.rows // config.group_size
        batches = [prompts(run).batches(each, cursor) for run, each in zip(runs, configs)]
        batch = jax.device_put(jax.tree.map(lambda *x: np.stack(x), *batches), sharding)
        live, metrics = step(values, live, placed, batch)
        rows.append(metrics)
        if on_step:
            metrics = jax.tree.map(lambda x: x[:asked], jax.device_get(metrics))
            on_step(done + config.steps_per_call, metrics)

    join = lambda *x: np.stack(x, 1) if config.steps_per_call == 1 else np.concatenate(x, 1)
    metrics, live = jax.tree.map(join, *jax.device_get(rows)), jax.device_get(live)
    pick = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    kept = lambda i: frozen if shared else pick(frozen, i)
    return [
        Result(run, pick(metrics, i), pick(live, i).replace(frozen=kept(i)))
        for i, run in enumerate(runs[:asked])
    ]


def run_sharding(runs: int, devices: Sequence | None = None) -> NamedSharding:
    """The sharding of arrays with a leading dimension of runs: equal shares, as small
    as possible, on as few devices as they need.

    >>> run_sharding(6, jax.devices()[:1]).num_devices
    1
    """
    found = list(jax.devices() if devices is None else devices)
    share = -(-runs // len(found))
    count = -(-runs // share)
    mesh = jax.make_mesh((count,), (AXIS,), devices=found[:count], axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(AXIS))
