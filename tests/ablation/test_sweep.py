from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
import worlds
from runs import RUN, TEXTS

from jaxppo import algorithms, parallel, ppo, sampling
from jaxppo.ablation import sweep, toy_tasks
from jaxppo.ablation.sweep import Run
from jaxppo.data.prompts import encode
from jaxppo.errors import UserError
from jaxppo.rollout import rollout
from jaxppo.run.load import load_policy

CONFIG = replace(RUN, steps=3, lr=1e-4, batch_size=8, kl_coef=0.05, kl_adaptive=False)


def reward(params, rollout):
    """A score that depends on every token; sums of it are exact."""
    places = jnp.arange(1, rollout.response.shape[1] + 1)[None]
    score = ((rollout.response * places % 101 + 1) * rollout.mask).sum(1) / 1024
    return score, score > -1


def make_parts(config):
    return algorithms.make_parts(config, reward)


def load(settings):
    return load_policy(settings)[1]


@pytest.fixture(scope="module")
def prompts():
    return encode(TEXTS, load(CONFIG).tokenizer, 4, too_long="last")


def alone(config, prompts, load=load, make_parts=make_parts):
    """(the metrics of each step, the final parameters) of one run by itself."""
    policy = load(config)
    state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(config.seed))
    step = parallel.compile_step(ppo.make_train_step(policy.model, make_parts(config), config))
    rows = []
    for number in range(config.steps):
        state, metrics = step(state, jax.device_put(prompts.batches(config, number * config.rows)))
        rows.append(jax.device_get(metrics))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}, jax.device_get(
        state.params
    )


def everything(config, runs, prompts, load=load, make_parts=make_parts, **options):
    found = []
    for group in sweep.group_by_program(runs, config):
        found += sweep.run(config, group, load, make_parts, lambda run: prompts, **options)
    return found


FAST = {"lr": 3e-4, "temperature": 0.7}
DIVERGES = {"lr": 3e38}
RUNS = [
    Run(name, seed, settings)
    for name, settings in (("fast", FAST), ("diverges", DIVERGES))
    for seed in (0, 3)
]


@pytest.fixture(scope="module")
def four(prompts):
    """Four runs on one device, two seeds each: other settings, and a rate that diverges."""
    return everything(CONFIG, RUNS, prompts, devices=jax.devices()[:1])


def same_as_alone(config, result, prompts, load=load, make_parts=make_parts):
    own = replace(config, seed=result.run.seed, **result.run.settings)
    metrics, params = alone(own, prompts, load, make_parts)
    np.testing.assert_array_equal(result.metrics["reward"], metrics["reward"])  # of the same tokens
    np.testing.assert_allclose(result.metrics["kl"], metrics["kl"], atol=1e-5)
    toys.assert_close(result.state.params, params, atol=1e-5)
    assert not result.metrics["skipped"].any() and int(result.state.step) == 3


@pytest.mark.ci
def test_a_run_in_a_sweep_equals_the_run_alone(four, prompts):
    same_as_alone(CONFIG, four[1], prompts)


@pytest.mark.slow
def test_int8_decoding_in_a_sweep(prompts):
    config = replace(CONFIG, decode_dtype="int8", old_logprobs="scorer", correction="truncated")
    results = everything(config, RUNS[:2], prompts, devices=jax.devices()[:1])
    same_as_alone(config, results[1], prompts)


@pytest.mark.ci
def test_episodes_in_a_sweep(prompts):
    """Two seeds, whose episodes end in other turns."""
    config = replace(CONFIG, response_length=worlds.LENGTH, epochs=1)
    in_turns = lambda config: make_parts(config)._replace(environment=worlds.counting())
    runs = sweep.grid({}, seeds=[0, 3])
    results = everything(config, runs, prompts, make_parts=in_turns, devices=jax.devices()[:1])
    assert (results[0].metrics["length"] != results[1].metrics["length"]).any()
    for result in results:
        same_as_alone(config, result, prompts, make_parts=in_turns)


@pytest.mark.ci
def test_new_networks_differ_between_seeds():
    """Without adapters each seed also has its own reference policy."""
    config = replace(toy_tasks.ToyConfig(), steps=3, batch_size=8, minibatches=2, save_every=3)
    prompts = toy_tasks.RandomPrompts("token")
    results = everything(config, sweep.grid({}, seeds=[0, 3]), prompts, toy_tasks.load)
    references = [x.state.frozen["reference"] for x in results]
    assert not sweep.trees_equal(*references)
    same_as_alone(config, results[1], prompts, toy_tasks.load)


@pytest.mark.ci
def test_seeds_differ_and_a_diverged_run_stays_in(four):
    assert [(x.run.arm, x.run.seed) for x in four] == [(run.arm, run.seed) for run in RUNS]
    assert (
        four[0].metrics["reward"].tolist() != four[1].metrics["reward"].tolist()
    )  # other seeds, other tokens
    assert [bool(x.metrics["skipped"].any()) for x in four] == [False] * 2 + [True] * 2
    assert all(len(x.metrics["reward"]) == 3 for x in four)


@pytest.mark.ci
def test_devices_share_the_runs(four, prompts):
    """Three runs on two devices: the last one is computed twice and returned once."""
    seen = []
    on_step = lambda done, metrics: seen.append((done, metrics["reward"].shape))
    many = everything(CONFIG, RUNS[:3], prompts, devices=jax.devices()[:2], on_step=on_step)
    assert [(x.run.arm, x.run.seed) for x in many] == [(run.arm, run.seed) for run in RUNS[:3]]
    assert seen == [(1, (3,)), (2, (3,)), (3, (3,))]
    assert sweep.run_sharding(6, jax.devices()[:8]).num_devices == 6
    assert (
        sweep.run_sharding(5, jax.devices()[:4]).num_devices == 3
    )  # two on each: a fourth would have none
    assert (
        sweep.run_sharding(9, jax.devices()[:8]).num_devices == 5
    )  # two on each, the last one twice
    for a, b in zip(four[:2], many):
        np.testing.assert_array_equal(a.metrics["reward"], b.metrics["reward"])
        toys.assert_close(a.state.params, b.state.params, atol=1e-6)


@pytest.mark.slow
def test_several_steps_in_one_dispatch(four, prompts):
    config, seen = replace(CONFIG, steps_per_call=3, save_every=3, eval_every=3), []
    results = everything(
        config,
        RUNS[:2],
        prompts,
        on_step=lambda done, metrics: seen.append((done, metrics["reward"].shape)),
    )
    assert seen == [(3, (2, 3))]
    for a, b in zip(four, results):
        np.testing.assert_array_equal(a.metrics["reward"], b.metrics["reward"])
        toys.assert_close(a.state.params, b.state.params, atol=1e-6)


@pytest.mark.parametrize(
    ("environment", "copies"), [(None, 2), (worlds.counting(), 10)], ids=["a turn", "three turns"]
)
@pytest.mark.ci
def test_the_decode_loop_does_not_copy_its_cache(environment, copies):
    """Under vmap a stop test for each run turns every write to the cache into a select: there must
    be one stop test for all.
    """
    toy, prompts = toys.llama(), toys.prompts()
    length = environment.length if environment else 5

    def selects(axis):
        def one(key):
            noise = sampling.row_uniforms(key, prompts.index, length)
            frozen = {"base": {}, "reference": toy.params}
            options = {"length": length, "sample": toys.SETTINGS, "stop_axis": axis}
            options |= {"environment": environment}
            options |= {"world_keys": sampling.world_keys(key, prompts.index)}
            return rollout(toy.model, toy.params, frozen, prompts, noise, **options).tokens

        keys = jax.random.split(jax.random.key(0), 3)
        text = jax.jit(jax.vmap(one, axis_name="seeds")).lower(keys).as_text()
        return sum(
            "select" in line and f"3x8x2x{length}x4xf32" in line for line in text.splitlines()
        )  # keys and values of 3 runs, 5 or 15 slots a row

    assert selects("seeds") == 0
    assert selects(None) == copies


EVERY = replace(
    CONFIG,
    clip_low=0.2,
    clip_high=0.2,
    critic_lr=1e-3,
    critic_lam=1.0,
    optimizer="adamw",
    kl_adaptive=True,
    lr=1e-2,
)
OTHER = {
    "lr": 3e-2,
    "critic_lr": 1e-2,
    "weight_decay": 0.5,
    "adam_eps": 1e-2,
    "max_grad_norm": 1e-2,
    "clip_low": 1e-3,
    "clip_high": 1e-3,
    "value_clip": 1e-3,
    "kl_coef": 0.4,
    "kl_target": 1e-3,
    "kl_horizon": 10.0,
    "gamma": 0.5,
    "lam": 0.1,
    "critic_lam": 0.2,
    "value_coef": 0.9,
    "entropy_coef": 0.3,
    "temperature": 0.5,
    "missing_eos_penalty": 0.7,
    "baseline_decay": 0.5,
    "beta": 0.3,
}


def every_setting(prompts):
    runs = [Run("base", 0, {})] + [Run(name, 0, {name: x}) for name, x in OTHER.items()]
    return everything(EVERY, runs, prompts)


@pytest.mark.ci
def test_every_swept_setting_has_an_effect(prompts):
    """Each is a tracer. Settings of a loss or an advantage that is not in use change nothing."""
    assert set(OTHER) == set(sweep.SWEPT)
    base, *others = every_setting(prompts)
    alike = [x.run.arm for x in others if sweep.trees_equal(x.state.params, base.state.params)]
    assert alike == [
        "baseline_decay",
        "beta",
    ]  # settings of the loss kl_penalty and the advantage moving_average


@pytest.mark.slow
def test_every_swept_setting_equals_the_run_alone(prompts):
    for result in every_setting(prompts)[1:]:
        config = replace(EVERY, **{result.run.arm: OTHER[result.run.arm]})
        toys.assert_close(result.state.params, alone(config, prompts)[1], atol=1e-5)


def test_runs_that_cannot_share_a_program():
    runs = [
        Run("a", 0, {"loss": "clip"}),
        Run("b", 0, {"loss": "gspo"}),
        Run("a", 1, {"loss": "clip"}),
        Run("c", 0, {"lr": 1.0}),
    ]
    groups = sweep.group_by_program(runs, CONFIG)
    assert [[(run.arm, run.seed) for run in group] for group in groups] == [
        [("a", 0), ("a", 1)],
        [("b", 0)],
        [("c", 0)],
    ]
    # None means the loss's own default, which cannot be traced
    runs = [Run("default", 0, {}), Run("higher", 0, {"clip_high": 0.3})]
    assert [len(group) for group in sweep.group_by_program(runs, CONFIG)] == [1, 1]
    assert [
        len(group) for group in sweep.group_by_program(runs, replace(CONFIG, clip_high=0.2))
    ] == [2]
    with pytest.raises(UserError, match="more than one program"):
        sweep.run(CONFIG, runs, load, make_parts, lambda run: None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss=clip,gspo", "loss is not one of lr, .*other settings need runs of their own"),
        ("lr=fast", "write it as lr=.1,.2"),
        ("lr", "write it as lr=.1,.2"),
        ("lr=", "write it as lr=.1,.2"),
    ],
)
def test_wrong_values_on_the_command_line(text, message):
    with pytest.raises(UserError, match=message):
        sweep.parse_values([text])


def test_a_setting_given_twice():
    with pytest.raises(
        UserError, match="--sweep has lr twice; write all its values together: lr=.1,.2"
    ):
        sweep.parse_values(["lr=1e-3", "lr=3e-3"])
    near = sweep.grid({"lr": [1e-3, 1.0000001e-3]}, seeds=[0])
    assert [run.arm for run in near] == ["lr 0.001", "lr 0.0010000001"]  # two arms


def test_a_wrong_value_is_refused_before_anything_is_compiled(prompts):
    with pytest.raises(UserError, match="--temperature must be above 0"):
        everything(CONFIG, sweep.grid({"temperature": [1.0, 0.0]}, seeds=[0]), prompts)
