import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo import advantages, algorithms, estimators, masked
from jaxppo.config import Config
from jaxppo.types import Rollout

MASK = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
REWARDS = jnp.array(
    [[0.0, 1.0, 0.0], [-0.5, 0.0, 3.0], [5.0, 0.0, 0.0], [0.0, 0.0, 2.0]]
)  # sums 1, 2.5, 5, 2
VALUES = jnp.array([[0.5, 0.25, 9.0], [0.0, 1.0, 2.0], [4.0, 9.0, 9.0], [1.0, 1.0, 1.0]])
SCORES = jnp.array([1.0, 3.0, 5.0, 2.0])
ALL = jnp.ones(4, bool)


def rollout(**extra) -> Rollout:
    zeros = jnp.zeros((4, 3))
    return Rollout(
        jnp.zeros((4, 4), jnp.int32),
        jnp.ones((4, 4), bool),
        MASK,
        ALL,
        zeros,
        zeros,
        zeros,
        VALUES,
        extra,
    )


def estimate(
    name,
    config=None,
    *,
    scores=SCORES,
    valid=ALL,
    statistics=None,
    rolled=None,
    rewards=REWARDS,
    **settings,
):
    settings = {"group_size": 2, "gamma": 1.0} | settings
    made = algorithms.ADVANTAGES[name].make(config or Config(**settings))
    return made(
        rewards,
        scores,
        rollout() if rolled is None else rolled,
        valid=valid,
        statistics=statistics or {},
        axis_name=None,
    )


def on_tokens(*rows):
    return np.asarray(rows, np.float32)[:, None] * np.asarray(MASK)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        (
            "batch_mean",
            (1 - 2.625, 2.5 - 2.625, 5 - 2.625, 2 - 2.625),
        ),  # (1 + 2.5 + 5 + 2) / 4 = 2.625
        ("group_mean", (-0.75, 0.75, 1.5, -1.5)),  # means 1.75 and 3.5
        ("rloo", (-1.5, 1.5, 3.0, -3.0)),
        (
            "opo",
            (1 - 1.9, 2.5 - 1.9, 5 - 2.75, 2 - 2.75),
        ),  # (2 · 1 + 3 · 2.5) / 5 = 1.9; (1 · 5 + 3 · 2) / 4 = 2.75
        ("gpg", (-0.75, 0.75, 1.5, -1.5)),  # both groups teach something: factor 1
        (
            "group",
            (-0.70710677, 0.70710677, 0.70710677, -0.70710677),
        ),  # of two, each is 1 / √2 deviations off
    ],
)
def test_estimators_on_rows_use_the_sum_of_rewards(name, rows):
    """So that a KL penalty in the reward reaches them: the scores alone would give other
    numbers.
    """
    adv, returns, statistics = estimate(name)
    np.testing.assert_allclose(adv, on_tokens(*rows), rtol=1e-5)
    np.testing.assert_allclose(returns, advantages.returns_to_go(REWARDS, MASK, gamma=1.0))
    assert statistics == {}


def test_an_invalid_row_is_out_of_its_group():
    adv, _, _ = estimate("group_mean", valid=jnp.array([True, True, True, False]))
    np.testing.assert_allclose(adv, on_tokens(-0.75, 0.75, 0.0, 0.0))


def test_an_invalid_row_is_out_of_the_batch():
    """Row 3, in each estimator that has a statistic of all rows."""
    valid = jnp.array([True, True, True, False])
    run = lambda name, **settings: estimate(name, valid=valid, **settings)
    # 1, 2.5 and 5 have the mean 8.5 / 3
    want = on_tokens(1 - 8.5 / 3, 2.5 - 8.5 / 3, 5 - 8.5 / 3, 0.0)
    np.testing.assert_allclose(run("batch_mean")[0], want, rtol=1e-5)
    # in groups −.7071, .7071 and, alone, 0; over the batch the deviation is √(1 / 2) = .7071
    np.testing.assert_allclose(run("gdpo")[0], on_tokens(-1.0, 1.0, 0.0, 0.0), atol=1e-4)
    # returns minus values: 1 − .5, 1 − .25 | 2.5 − 0, 3 − 1, 3 − 2 | 5 − 4
    left = np.array([0.5, 0.75, 2.5, 2.0, 1.0, 1.0])
    found = np.asarray(run("gae", lam=1.0)[0])
    white = (left - left.mean()) / left.std()
    np.testing.assert_allclose(found[np.asarray(MASK) * valid[:, None] > 0], white, rtol=1e-4)
    assert not found[3].any()
    start = {"baseline": {"mean": jnp.float32(0), "weight": jnp.float32(0)}}
    after = run("moving_average", statistics=start)[2]["baseline"]
    assert float(after["mean"]) == pytest.approx(0.1 * 8.5 / 3)  # decay .9


@pytest.mark.ci
@pytest.mark.parametrize("name", sorted(algorithms.ADVANTAGES))
def test_the_critics_targets_are_discounted(name):
    """−.5 + .5² · 3 = .25, .5 · 3 = 1.5, and 3; GAE's with 1 for the critic's λ. As one turn:
    −.5 + 3, without a discount.
    """
    start = {"baseline": {"mean": jnp.float32(0), "weight": jnp.float32(0)}}
    greedy = rollout(greedy_scores=SCORES)
    found = estimate(name, gamma=0.5, critic_lam=1.0, statistics=start, rolled=greedy)[1]
    want = [2.5, 2.5, 2.5] if name == "turn_gae" else [0.25, 1.5, 3.0]
    np.testing.assert_allclose(found[1], want, rtol=1e-6)


def test_returns_have_no_baseline():
    adv, returns, _ = estimate("returns", gamma=0.5)
    np.testing.assert_allclose(adv[1], [-0.5 + 0.25 * 3, 1.5, 3.0])
    np.testing.assert_array_equal(adv, returns)


def test_remax_takes_the_greedy_score_away():
    adv, _, _ = estimate("remax", rolled=rollout(greedy_scores=jnp.array([1.0, 0.5, 5.0, 0.0])))
    np.testing.assert_allclose(
        adv, np.asarray([[0, 0, 0], [2, 2.5, 2.5], [0, 0, 0], [2, 2, 2]], np.float32)
    )


def test_gdpo_takes_columns():
    columns = jnp.stack([SCORES, -2 * SCORES], 1)
    adv, _, _ = estimate("gdpo", scores=columns)
    want = advantages.gdpo(columns, group_size=2)
    np.testing.assert_allclose(adv, on_tokens(*want.tolist()), atol=1e-6)
    one, _, _ = estimate("gdpo")  # a single reward is one column
    np.testing.assert_allclose(
        one, on_tokens(*advantages.gdpo(SCORES[:, None], group_size=2).tolist()), rtol=1e-6
    )


def test_reinforce_plus_plus_baseline_is_whitened_over_tokens():
    adv, _, _ = estimate("reinforce_plus_plus_baseline")
    want = masked.whiten(jnp.asarray(on_tokens(-0.75, 0.75, 1.5, -1.5)), MASK)
    np.testing.assert_allclose(adv, want, rtol=1e-5)


def test_the_critic_may_have_a_lambda_of_its_own():
    """Targets with λ 1 are the returns; the policy's advantages keep λ .5."""
    adv, returns, _ = estimate("gae", lam=0.5, critic_lam=1.0, whiten_advantages=False)
    np.testing.assert_allclose(
        returns, advantages.returns_to_go(REWARDS, MASK, gamma=1.0), rtol=1e-6
    )
    np.testing.assert_allclose(
        adv, advantages.gae(REWARDS, VALUES, MASK, gamma=1.0, lam=0.5)[0], rtol=1e-6
    )


def test_lambda_by_length():
    """α .5: lengths 2, 3, 1, 3 give λ 0, 1/3, 0, 1/3."""
    adv, _, _ = estimate("gae", lam_alpha=0.5, whiten_advantages=False)
    lam = jnp.array([[0.0], [1 / 3], [0.0], [1 / 3]])
    np.testing.assert_allclose(
        adv, advantages.gae(REWARDS, VALUES, MASK, gamma=1.0, lam=lam)[0], rtol=1e-5
    )


def test_moving_average_lags_one_step_behind():
    """Decay .9: b starts at 0; after means m₁ it is m₁; after m₁, m₂ it is (.09 m₁ + .1 m₂) /
    .19.
    """
    statistics = {"baseline": {"mean": jnp.float32(0), "weight": jnp.float32(0)}}
    first, _, statistics = estimate("moving_average", statistics=statistics)
    np.testing.assert_allclose(first, on_tokens(1.0, 2.5, 5.0, 2.0))
    second, _, statistics = estimate("moving_average", statistics=statistics, rewards=2 * REWARDS)
    np.testing.assert_allclose(
        second, on_tokens(2 - 2.625, 5 - 2.625, 10 - 2.625, 4 - 2.625), rtol=1e-6
    )
    third, _, _ = estimate("moving_average", statistics=statistics)
    level = (0.09 * 2.625 + 0.1 * 5.25) / 0.19
    np.testing.assert_allclose(
        third, on_tokens(1 - level, 2.5 - level, 5 - level, 2 - level), rtol=1e-5
    )


def test_moving_average_of_an_empty_batch_stays():
    before = {"baseline": {"mean": jnp.float32(2), "weight": jnp.float32(1)}}
    _, _, after = estimate("moving_average", statistics=before, valid=jnp.zeros(4, bool))
    toys.assert_same(after, before)


@pytest.mark.ci
@pytest.mark.parametrize("name", sorted(algorithms.ADVANTAGES))
def test_halves_under_an_axis_equal_the_whole(name):
    """Statistics are over the global batch, whatever the number of devices."""
    config = Config(group_size=2, gamma=0.9, whiten_advantages=True)
    statistics = {"baseline": {"mean": jnp.float32(1), "weight": jnp.float32(0.5)}}
    rolled = rollout(greedy_scores=SCORES / 2)
    whole = estimate(name, config, rolled=rolled, statistics=statistics)
    halves = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (REWARDS, SCORES, rolled, ALL))
    made = algorithms.ADVANTAGES[name].make(config)
    run = lambda r, s, o, v: made(r, s, o, valid=v, statistics=statistics, axis_name="devices")
    adv, returns, after = jax.vmap(run, axis_name="devices")(*halves)
    np.testing.assert_allclose(adv.reshape(4, 3), whole[0], atol=1e-5)
    np.testing.assert_allclose(returns.reshape(4, 3), whole[1], atol=1e-5)
    toys.assert_close(jax.tree.map(lambda x: x[1], after), whole[2], rtol=1e-5)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("shift", [True, False])
def test_whitening_settings(ddof, shift):
    adv, _, _ = estimate("returns", whiten_advantages=True, whiten_ddof=ddof, whiten_shift=shift)
    plain = advantages.returns_to_go(REWARDS, MASK, gamma=1.0)
    np.testing.assert_allclose(
        adv, masked.whiten(plain, MASK, ddof=ddof, shift_mean=shift), rtol=1e-6
    )


def test_on_rows_is_for_your_own():
    mine = estimators.on_rows(lambda total, *, valid: jnp.where(valid, 2 * total, 0.0))
    adv, _, _ = mine(Config())(REWARDS, SCORES, rollout(), valid=ALL, statistics={}, axis_name=None)
    np.testing.assert_allclose(adv, on_tokens(2, 5, 10, 4))
