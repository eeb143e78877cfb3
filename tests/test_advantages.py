from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxppo import advantages, masked

ONES = jnp.ones((1, 3))
NAN = float("nan")


def test_gae_by_hand():
    # γ = 0.5, λ = 0.5; r = 1, 0, 2; V = 2, 4, 2
    # δ = 1 + 0.5·4 − 2 = 1,  0 + 0.5·2 − 4 = −3,  2 − 2 = 0
    # A = 1 + 0.25·(−3) = 0.25,  −3 + 0.25·0 = −3,  0
    adv, returns = advantages.gae(
        jnp.array([[1.0, 0.0, 2.0]]), jnp.array([[2.0, 4.0, 2.0]]), ONES, gamma=0.5, lam=0.5
    )
    np.testing.assert_allclose(adv, [[0.25, -3.0, 0.0]])
    np.testing.assert_allclose(returns, [[2.25, 1.0, 2.0]])  # A + V


def test_gae_skips_tokens_outside_the_mask():
    # With the second of three tokens an observation, the others are a sequence of two.
    junk = jnp.array([[1.0, NAN, 2.0]])
    adv, returns = advantages.gae(junk, junk, jnp.array([[1.0, 0.0, 1.0]]), gamma=0.9, lam=0.8)
    two, two_returns = advantages.gae(junk[:, ::2], junk[:, ::2], ONES[:, ::2], gamma=0.9, lam=0.8)
    np.testing.assert_array_equal(adv, [[two[0, 0], 0.0, two[0, 1]]])
    np.testing.assert_array_equal(returns, [[two_returns[0, 0], 0.0, two_returns[0, 1]]])


# two turns of two tokens and of one; what stands at the answer between them is not read
TURNS = jnp.array([[1.0, 1.0, 0.0, 1.0]])
TURN_REWARDS = jnp.array([[1.0, 2.0, NAN, 4.0]])


def test_turn_gae_by_hand():
    # γ = 0.5, λ = 0.5; r = 1 + 2, 4; V = 2, 3: those before the turns' first tokens
    # second turn: δ = 4 − 3 = 1, A = 1, R = 1 + 3 = 4
    # first: δ = 3 + 0.5·3 − 2 = 2.5, A = 2.5 + 0.25·1 = 2.75, R = 2.75 + 2 = 4.75
    values = jnp.array([[2.0, NAN, NAN, 3.0]])
    adv, returns = advantages.turn_gae(TURN_REWARDS, values, TURNS, gamma=0.5, lam=0.5)
    np.testing.assert_array_equal(adv, [[2.75, 2.75, 0.0, 1.0]])
    np.testing.assert_array_equal(returns, [[4.75, 4.75, 0.0, 4.0]])


def test_gae_with_a_discount_of_turns_by_hand():
    # λ = 0.5; γ = 0.5 within a turn, and 0.5 · 0.5 = 0.25 to the next; V = 2, 6, 3
    # third token: δ = 4 − 3 = 1, A = 1
    # second: δ = 2 + 0.25·3 − 6 = −3.25, A = −3.25 + 0.25·0.5·1 = −3.125
    # first: δ = 1 + 0.5·6 − 2 = 2, A = 2 + 0.5·0.5·(−3.125) = 1.21875
    values = jnp.array([[2.0, 6.0, NAN, 3.0]])
    gamma = advantages.turn_discounts(TURNS, gamma=0.5, turn_gamma=0.5)
    adv, returns = advantages.gae(TURN_REWARDS, values, TURNS, gamma=gamma, lam=0.5)
    np.testing.assert_array_equal(adv, [[1.21875, -3.125, 0.0, 1.0]])
    np.testing.assert_array_equal(returns, [[3.21875, 2.875, 0.0, 4.0]])


def test_lambda_1_gives_returns_minus_values():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 4, 6)).astype(np.float32)
    mask = rng.random((4, 6)) < 0.7
    rewards, values, mask = jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(mask)
    adv, returns = advantages.gae(rewards, values, mask, gamma=0.9, lam=1.0)
    to_go = advantages.returns_to_go(rewards, mask, gamma=0.9)
    np.testing.assert_allclose(returns, to_go, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(adv, masked.keep(to_go - values, mask), rtol=1e-5, atol=1e-6)


def test_gae_with_one_lambda_per_row():
    rewards, values, mask = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3)), jnp.ones((2, 3))
    both, _ = advantages.gae(rewards, values, mask, gamma=1.0, lam=jnp.array([[0.5], [0.9]]))
    for row, lam in enumerate((0.5, 0.9)):
        alone, _ = advantages.gae(
            rewards, values, mask, gamma=jnp.float32(1.0), lam=jnp.float32(lam)
        )
        np.testing.assert_array_equal(both[row], alone[row])


def test_returns_to_go_by_hand():
    # 1 + 0.5 · (0 + 0.5 · 4) = 2; the last reward is padding
    rewards = jnp.array([[1.0, 0.0, 4.0, NAN]])
    mask = jnp.array([[True, True, True, False]])
    np.testing.assert_array_equal(
        advantages.returns_to_go(rewards, mask, gamma=0.5), [[2.0, 2.0, 4.0, 0.0]]
    )


def test_reinforce_plus_plus():
    # Returns 3 and 1: mean 2, deviation √2 with ddof = 1
    adv = advantages.reinforce_plus_plus(
        jnp.array([[2.0, 1.0, NAN]]), jnp.array([[1.0, 1.0, 0.0]]), gamma=1.0
    )
    np.testing.assert_allclose(adv, [[0.5**0.5, -(0.5**0.5), 0.0]], rtol=1e-6)


def test_remax():
    adv = advantages.remax(
        jnp.array([[0.5, 3.0, NAN]]), jnp.array([1.0]), jnp.array([[1.0, 1.0, 0.0]])
    )
    np.testing.assert_array_equal(adv, [[2.5, 2.0, 0.0]])  # 3.5 − 1, 3 − 1


SCORES = jnp.array([1.0, 3.0, 8.0, 2.0, 2.0, 2.0])


def test_group():
    # Mean 4, differences −3, −1, 4; variance (9 + 1 + 16) / 2 = 13. The second group has nothing to
    # tell.
    expected = np.array([-3.0, -1.0, 4.0, 0.0, 0.0, 0.0])
    adv = advantages.group(SCORES, group_size=3, eps=0.5)
    np.testing.assert_allclose(adv, expected / (np.sqrt(13) + 0.5), rtol=1e-6)
    plain = advantages.group(SCORES, group_size=3, normalise_std=False)
    np.testing.assert_allclose(plain, expected, atol=1e-6)


def test_group_over_batch():
    # Mean of all 3, squares 4 + 0 + 25 + 1 + 1 + 1 = 32, variance 32 / 5 = 6.4
    expected = np.array([-3.0, -1.0, 4.0, 0.0, 0.0, 0.0]) / (np.sqrt(6.4) + 0.5)
    adv = advantages.group_over_batch(SCORES, group_size=3, eps=0.5)
    np.testing.assert_allclose(adv, expected, rtol=1e-6)
    f = partial(advantages.group_over_batch, group_size=3, eps=0.5, axis_name="d")
    split = jax.vmap(f, axis_name="d")(SCORES.reshape(2, 3))
    np.testing.assert_allclose(split.reshape(-1), expected, rtol=1e-6)


def test_max_rl():
    # Means 1 / 3 and 2 / 3: (1 − 1/3) / (1/3) = 2, −1; (1 − 2/3) / (2/3) = 1/2, −1. All wrong: 0.
    scores = jnp.array([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    adv = advantages.max_rl(scores, group_size=3, eps=0.0)
    np.testing.assert_allclose(adv, [-1, 2, -1, 0.5, 0.5, -1, 0, 0, 0], rtol=1e-6)
    # A mean of 0 or less has no meaning: 0, not a division by it
    for low in ([-1.0, 1.0], [-3.0, 1.0]):
        np.testing.assert_array_equal(advantages.max_rl(jnp.array(low), group_size=2), 0.0)


def test_pass_at_k():
    # 8 − 3 = 5 over √13 + 0.5; two best have no lead
    plain = advantages.pass_at_k(SCORES, group_size=3, normalise_std=False)
    np.testing.assert_allclose(plain, [0.0, 0.0, 5.0, 0.0, 0.0, 0.0], atol=1e-6)
    adv = advantages.pass_at_k(SCORES, group_size=3, eps=0.5)
    np.testing.assert_allclose(adv[2], 5 / (np.sqrt(13) + 0.5), rtol=1e-6)
    tied = advantages.pass_at_k(jnp.array([4.0, 1.0, 4.0]), group_size=3)
    np.testing.assert_array_equal(tied, 0.0)


def test_rloo_is_group_without_deviation_times_g_over_g_minus_1():
    # 1 − (3 + 8) / 2 = −4.5, 3 − 4.5 = −1.5, 8 − 2 = 6
    adv = advantages.rloo(SCORES, group_size=3)
    np.testing.assert_allclose(adv, [-4.5, -1.5, 6.0, 0.0, 0.0, 0.0], atol=1e-6)
    plain = advantages.group(SCORES, group_size=3, normalise_std=False)
    np.testing.assert_allclose(adv * 2 / 3, plain, atol=1e-6)


def test_opo():
    # Σ n R / Σ n = (1 · 1 + 2 · 3 + 1 · 8) / 4 = 3.75; with equal lengths the mean
    adv = advantages.opo(SCORES, jnp.array([1, 2, 1, 0, 0, 0]), group_size=3)
    np.testing.assert_allclose(adv, [-2.75, -0.75, 4.25, 0.0, 0.0, 0.0], atol=1e-6)
    equal = advantages.opo(SCORES, jnp.full(6, 7.0), group_size=3)
    np.testing.assert_allclose(
        equal, advantages.group(SCORES, group_size=3, normalise_std=False), atol=1e-6
    )


def test_gpg():
    # α = 6 rows / 3 of groups whose scores differ
    np.testing.assert_allclose(
        advantages.gpg(SCORES, group_size=3), [-6.0, -2.0, 8.0, 0.0, 0.0, 0.0], atol=1e-5
    )
    np.testing.assert_array_equal(advantages.gpg(jnp.ones(4), group_size=2), 0.0)
    split = jax.vmap(partial(advantages.gpg, group_size=3, axis_name="d"), axis_name="d")(
        SCORES.reshape(2, 3)
    )
    np.testing.assert_allclose(split.reshape(-1), [-6.0, -2.0, 8.0, 0.0, 0.0, 0.0], atol=1e-5)


def test_gdpo():
    # Each column in its group is ∓1/√2 by its order, whatever its size; sums −√2, √2, 0, 0; the
    # last has deviation √(4 / 3)
    scores = jnp.array([[0.0, 100.0], [1.0, 900.0], [0.0, 5.0], [1.0, 4.0]])
    expected = np.array([-np.sqrt(2), np.sqrt(2), 0.0, 0.0]) / np.sqrt(4 / 3)
    np.testing.assert_allclose(advantages.gdpo(scores, group_size=2), expected, atol=1e-5)
    # With weights 1 and 0 only the first column counts: ∓1/√2 four times, deviation √(2 / 3)
    first = advantages.gdpo(scores, group_size=2, weights=jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(first, np.array([-1.0, 1.0, -1.0, 1.0]) / np.sqrt(4 / 3), atol=1e-5)


def with_lengths(f):
    return lambda s, **kw: f(s, jnp.full(s.shape, 2.0, s.dtype), **kw)


ESTIMATORS = {
    "group": advantages.group,
    "plain": partial(advantages.group, normalise_std=False),
    "group_over_batch": advantages.group_over_batch,
    "max_rl": advantages.max_rl,
    "pass_at_k": advantages.pass_at_k,
    "rloo": advantages.rloo,
    "opo": with_lengths(advantages.opo),
    "gpg": advantages.gpg,
    "gdpo": lambda s, **kw: advantages.gdpo(s[:, None], **kw),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_invalid_rows_do_not_count(name):
    # Without its second row the first group is the pair 1, 8; the second group has one row left,
    # the third none.
    scores = jnp.array([1.0, NAN, 8.0, 2.0, 5.0, 7.0, NAN, 1.0, 2.0])
    valid = jnp.array([True, False, True, True, False, False, False, False, False])
    adv = ESTIMATORS[name](scores, group_size=3, valid=valid)
    pair = ESTIMATORS[name](jnp.array([1.0, 8.0]), group_size=2)
    assert (adv[0] < 0 or name == "pass_at_k") and adv[1] == 0.0
    np.testing.assert_array_equal(adv[3:], 0.0)
    if name == "gpg":  # of three valid rows two are in a group that tells something
        pair = pair * 3 / 2
    if name == "gdpo":  # the batch has a third row at 0: deviation 1/√2 in place of 1
        pair = pair * np.sqrt(2)
    if name == "group_over_batch":  # 1, 8, 2: variance 43 / 3 in place of 49 / 2
        pair = pair * np.sqrt(49 / 2 * 3 / 43)
    np.testing.assert_allclose(adv[jnp.array([0, 2])], pair, rtol=1e-4)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_equal_scores_give_no_advantage(name):
    # In float32 the mean of three times 0.9 is not 0.9, and a tiny difference over a tiny deviation
    # is not small.
    np.testing.assert_array_equal(ESTIMATORS[name](jnp.full(6, 0.9), group_size=3), 0.0)
    if name != "gdpo":
        np.testing.assert_array_equal(ESTIMATORS[name](SCORES, group_size=1), 0.0)


def test_rows_must_be_whole_groups():
    for f in ESTIMATORS.values():
        with pytest.raises(ValueError, match=r"6 rows .* group_size 4"):
            f(SCORES, group_size=4)


def test_last_acting():
    mask = jnp.array(
        [[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    )
    last = advantages.last_acting(mask)
    np.testing.assert_array_equal(jnp.argmax(last, 1), [1, 2, 0, 3])
    np.testing.assert_array_equal(last.sum(1), [1, 1, 0, 1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("mask_dtype", [bool, jnp.float32])
def test_dtype_is_kept(dtype, mask_dtype):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        x, mask = jnp.ones((2, 3), dtype), jnp.ones((2, 3), mask_dtype)
        lam, valid = jnp.full((2, 1), 0.9, jnp.float32), jnp.array([True, False])
        found = jax.eval_shape(lambda x: advantages.gae(x, x, mask, gamma=1.0, lam=lam), x)
        found += (jax.eval_shape(lambda x: advantages.reinforce_plus_plus(x, mask, gamma=0.9), x),)
        found += (jax.eval_shape(lambda x: advantages.remax(x, x[:, 0], mask), x),)
        found += tuple(
            jax.eval_shape(partial(f, group_size=2, valid=valid), x[:, 0])
            for f in ESTIMATORS.values()
        )
        assert {a.dtype for a in found} == {jnp.dtype(dtype)}


UNSHIFTED, UNCENTRED = {"max_rl"}, {"pass_at_k"}


@jax.jit
def on_groups(scores):
    return {name: f(scores, group_size=3) for name, f in ESTIMATORS.items()}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.floats(-100, 100, width=32))
def test_group_advantages_ignore_shifts_and_sum_to_zero(seed, shift):
    scores = np.random.default_rng(seed).integers(0, 4, size=6).astype(np.float32)
    moved = on_groups(scores + np.float32(shift))
    for name, adv in on_groups(scores).items():
        if name not in UNSHIFTED:
            np.testing.assert_allclose(adv, moved[name], atol=2e-3, err_msg=name)
        if name not in UNCENTRED:
            np.testing.assert_allclose(adv.reshape(2, 3).sum(1), 0.0, atol=1e-4, err_msg=name)
