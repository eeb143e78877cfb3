from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo import advantages, aggregate, algorithms, estimators, kl, losses, masked, presets
from jaxppo.config import Config
from jaxppo.errors import UserError
from jaxppo.losses import correction, token, value
from jaxppo.rewards.in_program import count_token
from jaxppo.rewards.shaping import token_rewards

REWARD = count_token(3)


def test_defaults_are_ppo():
    parts = algorithms.make_parts(Config(), REWARD)
    assert parts.reward is REWARD
    assert parts.token_rewards is token_rewards
    assert parts.aggregate is aggregate.token_mean
    assert parts.kl is kl.k1
    assert parts.correction is None
    assert (
        parts.policy_loss.func is token.clip and parts.policy_loss.keywords == {}
    )  # its own bounds
    assert parts.value_loss.func is value.value_clipped and parts.value_loss.keywords == {
        "eps": 0.2
    }


@pytest.mark.parametrize(
    ("field", "table"),
    [
        ("loss", algorithms.POLICY_LOSSES),
        ("advantage", algorithms.ADVANTAGES),
        ("aggregate", algorithms.AGGREGATES),
        ("kl", algorithms.KLS | algorithms.FULL_KLS),
        ("correction", algorithms.CORRECTIONS),
        ("rejection", algorithms.REJECTIONS),
        ("update", algorithms.UPDATES),
        ("value_loss", algorithms.VALUE_LOSSES),
    ],
)
def test_every_name_works_and_a_wrong_one_names_them_all(field, table):
    for name in table:
        algorithms.make_parts(replace(Config(group_size=2), **{field: name}), REWARD)
    with pytest.raises(UserError) as caught:
        algorithms.make_parts(replace(Config(), **{field: "nonsense"}), REWARD)
    assert "'nonsense'" in str(caught.value)
    for name in table:
        assert name in str(caught.value)


def test_group_estimators_need_groups():
    """In groups of one their advantages are 0 everywhere."""
    for name, choice in algorithms.ADVANTAGES.items():
        if choice.grouped:
            with pytest.raises(UserError, match=f"--advantage {name} .*--group-size 2"):
                algorithms.make_parts(Config(advantage=name), REWARD)


ONES = jnp.ones((2, 3))
LOGPROBS, OLD = (
    jnp.log(jnp.array([[0.5, 0.2, 0.4], [0.9, 0.1, 0.3]])),
    jnp.log(jnp.full((2, 3), 0.3)),
)


@pytest.mark.parametrize(
    "name",
    [
        "clip",
        "dual_clip",
        "gspo",
        "gspo_token",
        "cispo",
        "gmpo",
        "clip_cov",
        "dppo_tv",
        "dppo_kl",
        "rloo_clip",
        "two_sided",
    ],
)
def test_bounds_are_the_losses_own_unless_given(name):
    """So that `--loss gspo` alone is GSPO, and not GSPO with PPO's bounds."""
    loss, key = getattr(losses, name), jax.random.key(0)
    own = algorithms.make_parts(Config(loss=name), REWARD).policy_loss(
        LOGPROBS, OLD, ONES, ONES, key=key
    )
    np.testing.assert_array_equal(own[0], loss(LOGPROBS, OLD, ONES, ONES, key=key)[0])
    given = algorithms.make_parts(
        Config(loss=name, clip_low=0.1, clip_high=0.45), REWARD
    ).policy_loss
    want = loss(LOGPROBS, OLD, ONES, ONES, low=0.1, high=0.45, key=key)
    np.testing.assert_array_equal(given(LOGPROBS, OLD, ONES, ONES, key=key)[0], want[0])


def test_any_other_setting_of_a_loss_goes_by_its_name():
    config = Config(loss="sapo", loss_settings=(("tau_positive", 2.0),))
    got = algorithms.make_parts(config, REWARD).policy_loss(LOGPROBS, OLD, ONES, ONES)
    np.testing.assert_array_equal(
        got[0], token.sapo(LOGPROBS, OLD, ONES, ONES, tau_positive=2.0)[0]
    )
    with pytest.raises(
        UserError, match="--loss sapo has no setting 'tau': choose from tau_positive, tau_negative"
    ):
        algorithms.check(replace(config, loss_settings=(("tau", 2.0),)))


def test_straight_through_estimators():
    x, ref = jnp.array([-1.0, -3.0]), jnp.array([-2.0, -1.5])
    for name, plain in (("k1+", kl.k1), ("k3+", kl.k3), ("absolute+", kl.absolute)):
        estimator = algorithms.KLS[name]
        np.testing.assert_array_equal(estimator(x, ref), plain(x, ref))
        slope = jax.grad(lambda x, f=estimator: f(x, ref).sum())(x)
        np.testing.assert_allclose(slope, x - ref)  # that of (x − ref)² / 2


def test_a_correction_by_name():
    config = Config(correction="masked_geometric", correction_low=0.5, correction_normalise=True)
    made = algorithms.make_parts(config, REWARD).correction
    want = {"level": "geometric", "rule": "mask", "low": 0.5, "high": 2.0, "normalise": True}
    assert made.func is correction.importance and made.keywords == want
    assert algorithms.make_parts(Config(), REWARD).correction is None


def test_a_rejection_by_name():
    config = Config(rejection="row_max_k3", rejection_high=0.1)
    made = algorithms.make_parts(config, REWARD).rejection
    want = {"over": "row_max", "estimator": "k3", "low": None, "high": 0.1}
    assert made.func is correction.rejection and made.keywords == want
    assert algorithms.make_parts(Config(), REWARD).rejection is None


def test_value_losses_are_called_alike():
    values, old, returns = jnp.array([[1.0]]), jnp.array([[0.0]]), jnp.array([[2.0]])
    names = {
        "clipped": 1.62,
        "mse": 0.5,
        "huber": 0.5,
    }  # (.2 − 2)² / 2 since the value is held at .2; (1 − 2)² / 2
    for name, expected in names.items():
        loss = algorithms.make_parts(Config(value_loss=name), REWARD).value_loss
        assert loss is not None
        assert float(loss(values, old, returns)[0, 0]) == pytest.approx(expected)
    assert algorithms.make_parts(Config(value_loss="none"), REWARD).value_loss is None


def test_constant_divides_by_the_response_length():
    parts = algorithms.make_parts(Config(aggregate="constant", response_length=8), REWARD)
    np.testing.assert_allclose(parts.aggregate(ONES), jnp.full((2, 3), 1 / 16))  # 1 / (8 · 2 rows)


def test_gae_leaves_out_invalid_rows(llama):
    """Their advantages and returns are 0, and those of the other rows are whitened without them."""
    rolled = toys.roll(llama, toys.prompts())
    rewards = jnp.asarray(np.random.default_rng(0).standard_normal((8, 5)), jnp.float32)
    valid = jnp.arange(8) != 2
    config = Config(gamma=0.9, lam=0.8)
    run = lambda rewards, **changes: estimators.gae(replace(config, **changes))(
        rewards, rewards.sum(1), rolled, valid=valid, statistics={"x": 1}, axis_name=None
    )
    adv, returns, statistics = run(rewards)
    assert statistics == {"x": 1}
    assert not adv[2].any() and not returns[2].any()
    mask = rolled.mask * valid[:, None]
    assert float(masked.mean(adv, mask)) == pytest.approx(0, abs=1e-6)
    assert float(masked.var(adv, mask)) == pytest.approx(1, abs=1e-5)
    toys.assert_same(run(rewards.at[2].set(1e6))[:2], (adv, returns))
    plain, same, _ = run(rewards, whiten_advantages=False)
    np.testing.assert_array_equal(same, returns)
    want = advantages.gae(rewards, rolled.values, mask, gamma=0.9, lam=0.8)
    np.testing.assert_array_equal(plain, want[0])


def test_a_setting_that_no_part_reads_is_told():
    """Unless the default or the preset has it so."""
    told = algorithms.without_effect
    assert told(Config()) == told(Config(lam=0.9, clip_low=0.1)) == []
    found = told(Config(advantage="rloo", loss="sapo", value_loss="none", lam=0.9, clip_high=0.3))
    assert found == [
        "lam 0.9 has no effect with advantage rloo",
        "clip_high 0.3 has no effect with loss sapo",
    ]
    assert told(Config(correction_high=3.0)) == [
        "correction_high 3.0 has no effect with correction none"
    ]
    assert told(Config(kl_adaptive=False, kl_target=3.0)) == [
        "kl_target 3.0 has no effect with kl_adaptive False"
    ]
    for name in presets.ALGORITHMS:
        assert told(presets.preset(Config(), name)) == []


def test_the_table_of_readers_is_that_of_the_parts():
    tables = {
        "advantage": algorithms.ADVANTAGES,
        "loss": algorithms.POLICY_LOSSES,
        "value_loss": algorithms.VALUE_LOSSES,
        "correction": algorithms.CORRECTIONS,
        "rejection": algorithms.REJECTIONS,
        "distil": algorithms.DIVERGENCES,
        "kl_adaptive": {True, False},
    }
    for choice, readers in algorithms.READ_BY.values():
        assert readers and readers <= {*tables[choice]}
    for name, loss in algorithms.POLICY_LOSSES.items():
        made = loss.make(Config(clip_low=0.123))
        clips = getattr(made, "keywords", {}).get("low") == 0.123
        assert clips == (name in algorithms.READ_BY["clip_low"][1])
