"""Properties for all inputs: padding is never read, rows and groups are independent, and nothing
becomes NaN.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxppo import advantages, aggregate, kl, masked
from jaxppo.losses import correction, covariance, preference, sequence, token, value

ROWS, LENGTH = 4, 5
JUNK = st.sampled_from([np.nan, np.inf, -np.inf, 3e38])

named = lambda *functions, **others: {f.__name__: f for f in functions} | others
POLICY = named(
    token.reinforce,
    token.clip,
    token.dual_clip,
    token.cispo,
    token.sapo,
    sequence.gmpo,
    token.dppo_tv,
    token.dppo_kl,
    token.awr,
    kl_penalty=partial(token.kl_penalty, beta=0.5),
    rloo_clip=sequence.rloo_clip,
    vespo=sequence.vespo,
    two_sided=token.two_sided,
    gspo=partial(sequence.gspo, low=0.2, high=0.2),
    gspo_token=partial(sequence.gspo_token, low=0.2, high=0.2),
    clip_cov=partial(
        covariance.clip_cov, lower=0.0, upper=1e9, fraction=0.3, key=jax.random.key(0)
    ),
    kl_cov=partial(covariance.kl_cov, fraction=0.3),
    dro=partial(token.dro, beta=0.5),
)
AGGREGATE = named(
    aggregate.token_mean,
    aggregate.token_sum,
    aggregate.sequence_mean,
    aggregate.sequence_sum,
    constant=partial(aggregate.constant, length=7),
)
by_turn = partial(advantages.turn_discounts, gamma=0.9, turn_gamma=0.7)
# Three arrays of numbers and a mask, all [B T], to arrays [B T] or []; x is differentiated.
TOKENS = POLICY | {
    "value_mse": lambda x, y, z, m: value.value_mse(x, y, mask=m),
    "value_clipped": lambda x, y, z, m: value.value_clipped(x, y, z, mask=m),
    "value_huber": lambda x, y, z, m: value.value_huber(x, y, mask=m),
    "importance": lambda x, y, z, m: tuple(
        correction.importance(x, y, m, level=level, rule=rule, normalise=True)
        for level in ("token", "sequence", "geometric")
        for rule in ("truncate", "mask")
    ),
    "rejection": lambda x, y, z, m: tuple(
        correction.rejection(x, y, m, estimator=estimator, over=over, high=1.5)
        for estimator in ("k1", "k3")
        for over in ("token", "row_sum", "row_mean", "row_max")
    ),
    "off_policy_mask": lambda x, y, z, m: correction.off_policy_mask(x, y, z, m, threshold=0.1),
    "top_entropy": lambda x, y, z, m: correction.top_entropy(x, m, fraction=0.3),
    "total": lambda x, y, z, m: masked.total(x, m),
    "mean": lambda x, y, z, m: masked.mean(x, m),
    "var": lambda x, y, z, m: masked.var(x, m, ddof=1),
    "whiten": lambda x, y, z, m: masked.whiten(x, m),
    "gae": lambda x, y, z, m: advantages.gae(x, y, m, gamma=0.9, lam=0.8),
    "turn_gae": lambda x, y, z, m: advantages.turn_gae(x, y, m, gamma=0.9, lam=0.8),
    "gae_by_turn": lambda x, y, z, m: advantages.gae(x, y, m, gamma=by_turn(m), lam=0.8),
    "returns_to_go": lambda x, y, z, m: advantages.returns_to_go(x, m, gamma=0.9),
    "reinforce_plus_plus": lambda x, y, z, m: advantages.reinforce_plus_plus(x, m, gamma=0.9),
    "remax": lambda x, y, z, m: advantages.remax(x, masked.mean(y, m, axis=1), m),
}
for f in (
    kl.k1,
    kl.k2,
    kl.k3,
    kl.absolute,
):  # these take no mask: the caller replaces what may be infinite
    TOKENS[f.__name__] = lambda x, y, z, m, f=f: f(masked.keep(x, m), masked.keep(y, m))
for name, f in AGGREGATE.items():
    TOKENS[name] = lambda x, y, z, m, f=f: (f(m) * token.clip(x, y, z, m)[0], f(m))
BY_POSITION = {"clip_cov"}  # draws tokens at random, by their place in the batch
BY_TURN = {"turn_gae", "gae_by_turn"}  # without a gap, two turns are one


@jax.jit
def everything(x, y, z, mask):
    """Name -> (what the function returns, the gradient in x of its first array, its elements
    weighted by z).
    """

    def one(f):
        def total(x):
            found = f(x, y, z, mask)
            first = found[0] if isinstance(found, tuple) else found
            return jnp.sum(masked.keep(z, mask) * first) if first.ndim else first, found

        (_, found), gradient = jax.value_and_grad(total, has_aux=True)(x)
        return found, gradient

    return {name: one(f) for name, f in TOKENS.items()}


def numpy(tree):
    """Name -> list of NumPy arrays."""
    return {name: [np.asarray(x) for x in jax.tree.leaves(found)] for name, found in tree.items()}


def numbers(seed):
    """Log-probs, old log-probs and advantages; or rewards, values and anything."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(size=(ROWS, LENGTH))
    return [
        a.astype(np.float32)
        for a in (old + 0.5 * rng.normal(size=old.shape), old, rng.normal(size=old.shape))
    ]


SEEDS = st.integers(0, 2**32 - 1)
MASKS = hnp.arrays(bool, (ROWS, LENGTH)).map(lambda m: m.astype(np.float32))
EMPTY_ROWS = np.eye(ROWS, LENGTH, dtype=np.float32) * np.array([[1], [0], [1], [0]], np.float32)


def same(found, expected, view=lambda a: a, leave_out=()):
    """Equal within rounding. If all x are equal, the gradient of whitening is a difference of terms
    of 10,000 z (1 / sqrt(eps)): only rounding is left.
    """
    large = 5e-3 if expected["var"][0] == 0 else 2e-6  # 4 x 1e4 x 2^-23
    atol = dict.fromkeys(found, 2e-6) | {"whiten": large, "reinforce_plus_plus": large}
    for name in set(found) - set(leave_out):
        for a, b in zip(found[name], expected[name], strict=True):
            np.testing.assert_allclose(
                a, view(b) if b.ndim else b, rtol=2e-5, atol=atol[name], err_msg=name
            )


# --- tokens


@given(SEEDS, MASKS, st.tuples(JUNK, JUNK, JUNK))
@example(0, EMPTY_ROWS, (np.nan, np.inf, np.inf))
@example(0, np.zeros((ROWS, LENGTH), np.float32), (np.nan, np.nan, np.nan))
def test_padding_is_never_read(seed, mask, junk):
    """Neither in values nor in gradients; results are 0 there."""
    clean = numpy(everything(*numbers(seed), mask))
    noisy = numpy(
        everything(
            *(np.where(mask > 0, a, np.float32(j)) for a, j in zip(numbers(seed), junk)), mask
        )
    )
    for name in TOKENS:
        for a, b in zip(clean[name], noisy[name], strict=True):
            assert np.isfinite(b).all(), name
            np.testing.assert_array_equal(a, b, err_msg=name)
            assert not b.ndim or not b[mask == 0].any(), name


@pytest.mark.ci
@given(SEEDS, MASKS, st.integers(0, 2), st.integers(0, 3), JUNK)
@example(0, EMPTY_ROWS, 1, 2, np.nan)
def test_more_padding_has_no_effect(seed, mask, row, column, junk):
    """Padding before and after, and rows without tokens: neither the length nor the number of rows
    counts.
    """
    inside = np.s_[row : row + ROWS, column : column + LENGTH]

    def wide(a, fill):
        out = np.full((ROWS + 2, LENGTH + 3), fill, np.float32)
        out[inside] = a
        return out

    found = numpy(everything(*(wide(a, junk) for a in numbers(seed)), wide(mask, 0)))
    same(numpy(everything(*numbers(seed), mask)), found, lambda b: b[inside], leave_out=BY_POSITION)


@given(SEEDS, MASKS)
@example(0, EMPTY_ROWS)
def test_gaps_have_no_effect(seed, mask):
    """Moving the tokens of a row together changes nothing: positions between turns are not part of
    the response.
    """
    order = np.argsort(mask == 0, axis=1, kind="stable")
    move = lambda a: np.take_along_axis(a, order, 1)
    found = numpy(everything(*map(move, numbers(seed)), move(mask)))
    same(found, numpy(everything(*numbers(seed), mask)), move, leave_out=BY_POSITION | BY_TURN)


@jax.jit
def of_turns(x, y, m):
    return advantages.turn_gae(x, y, m, gamma=0.9, lam=0.8), by_turn(m)


@given(SEEDS, MASKS, hnp.arrays(int, (ROWS, LENGTH), elements=st.integers(0, 2)), JUNK)
@example(0, EMPTY_ROWS, np.ones((ROWS, LENGTH), int), np.nan)
def test_longer_gaps_between_turns_have_no_effect(seed, mask, more, junk):
    """Each position outside of the mask becomes one to three; turns stay apart."""

    def wide(a, fill):
        out = np.full((ROWS, 3 * LENGTH), fill, np.float32)
        for row, repeats in enumerate(np.where(mask > 0, 1, 1 + more)):
            longer = np.repeat(np.where(mask[row] > 0, a[row], fill), repeats)
            out[row, : len(longer)] = longer
        return out

    x, y, _ = numbers(seed)
    on = wide(mask, 0)
    found, want = (of_turns(wide(x, junk), wide(y, junk), on), of_turns(x, y, mask))
    for a, b in zip(
        *(jax.tree.leaves(jax.device_get(each)) for each in (found, want)), strict=True
    ):
        np.testing.assert_allclose(a[on > 0], b[mask > 0], rtol=2e-5, atol=2e-6)


@given(SEEDS, MASKS, st.permutations(range(ROWS)))
def test_rows_have_no_order(seed, mask, order):
    move = lambda a: a[np.array(order)]
    found = numpy(everything(*map(move, numbers(seed)), move(mask)))
    # two tokens are equally far from their means: the first is chosen
    ties = {"kl_cov"} if mask.sum() == 2 else set()
    same(found, numpy(everything(*numbers(seed), mask)), move, leave_out=BY_POSITION | ties)


@given(SEEDS, MASKS, st.sampled_from([0.25, -1.0, 7.0]))
def test_a_mask_is_zero_or_not(seed, mask, size):
    found, expected = (numpy(everything(*numbers(seed), m)) for m in (size * mask, mask))
    for name in TOKENS:
        for a, b in zip(found[name], expected[name], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


@given(SEEDS, st.lists(st.integers(0, LENGTH - 1), min_size=ROWS, max_size=ROWS))
def test_rows_of_one_token(seed, places):
    mask = np.eye(LENGTH, dtype=np.float32)[np.array(places)]
    x, y, z = numbers(seed)
    found = numpy(everything(x, y, z, mask))
    np.testing.assert_allclose(found["gae"][0], mask * (x - y), rtol=1e-6)  # nothing follows
    np.testing.assert_array_equal(found["returns_to_go"][0], mask * x)
    # the row is the token
    np.testing.assert_allclose(found["gspo"][0], found["gspo_token"][0], rtol=1e-6)
    for name in ("sequence_mean", "sequence_sum"):
        np.testing.assert_allclose(found[name][0], found["token_mean"][0], rtol=1e-6)


SIGNS = st.sampled_from([-1.0, 0.0, 1.0])


@given(
    SEEDS,
    MASKS,
    hnp.arrays(np.float32, (ROWS, LENGTH), elements=SIGNS),
    st.sampled_from([1.0, 50.0]),
)
def test_extreme_log_ratios_stay_finite(seed, mask, sign, size):
    """log-ratios of −100, 0 and 100: e^100 is infinite in float32. Advantages up to about ±150 as
    well.
    """
    x, y, z = numbers(seed)
    y = y - 100  # log-probs of −200 to −100, or the other way round of −100 to −200
    for name, leaves in numpy(everything(y + 100 * sign, y, size * z, mask)).items():
        assert all(np.isfinite(a).all() for a in leaves), name


# These look at nothing but the log-ratio and the advantage.
BY_RATIO = (
    "clip",
    "dual_clip",
    "kl_penalty",
    "gspo",
    "gspo_token",
    "rloo_clip",
    "two_sided",
    "sapo",
    "gmpo",
    "importance",
    "k3",
)


@given(SEEDS, hnp.arrays(np.float32, (ROWS, 1), elements=st.sampled_from([-1.0, 1.0])))
def test_log_ratios_are_clamped_at_20(seed, sign):
    # whole numbers: the ratio is exact
    z, old = (numbers(seed)[2], np.full((ROWS, LENGTH), -200.0, np.float32))
    z, ones = np.broadcast_to(z[:, :1], z.shape), np.ones((ROWS, LENGTH), np.float32)
    far, near = (numpy(everything(old + d * sign, old, z, ones)) for d in (100, 20))
    for name in BY_RATIO:
        *values, gradient = far[name]
        for a, b in zip(values, near[name][:-1], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
        if name != "gspo_token":  # its slope is that of s, itself a constant
            np.testing.assert_array_equal(gradient, 0.0, err_msg=name)


@jax.jit
def pairs_and_logits(x):
    """Losses on pairs (four rows) and on logits (rows of 6), with the gradients of their sums."""
    fs = {
        "dpo": preference.dpo,
        "smoothed": partial(preference.dpo, label_smoothing=0.1),
        "ipo": preference.ipo,
    }
    fs |= {
        "entropy": lambda *z: value.entropy(jnp.stack(z)),
        "full": lambda *z: kl.full(jnp.stack(z), jnp.stack(z[::-1])),
    }
    return {name: jax.value_and_grad(lambda x, f=f: f(*x).sum())(x) for name, f in fs.items()}


@given(hnp.arrays(np.float32, (4, 6), elements=st.sampled_from([-1000.0, -100.0, 0.0, 100.0])))
def test_extreme_pairs_and_logits_stay_finite(x):
    for name, leaves in numpy(pairs_and_logits(x)).items():
        assert all(np.isfinite(a).all() for a in leaves), name


# --- groups

ESTIMATORS = {
    "group": advantages.group,
    "plain": partial(advantages.group, normalise_std=False),
    "group_over_batch": advantages.group_over_batch,
    "max_rl": advantages.max_rl,
    "pass_at_k": advantages.pass_at_k,
    "rloo": advantages.rloo,
    "opo": lambda s, **kw: advantages.opo(s, jnp.arange(1.0, 1 + len(s)), **kw),
    "gpg": advantages.gpg,
    "gdpo": lambda s, **kw: advantages.gdpo(s[:, None], **kw),
}
BY_BATCH = {"gpg", "gdpo", "group_over_batch"}  # scale by what the other groups are


@partial(jax.jit, static_argnames="size")
def on_groups(scores, valid, size=3):
    """Name -> (advantages, the gradient of their sum weighted 1 to 6)."""
    slope = lambda f: jax.grad(lambda s: jnp.sum(jnp.arange(1.0, 7.0) * f(s)))(scores)
    run = {name: partial(f, group_size=size, valid=valid) for name, f in ESTIMATORS.items()}
    return {name: (f(scores), slope(f)) for name, f in run.items()}


SCORES = hnp.arrays(np.float32, 6, elements=st.integers(-40, 40).map(lambda i: i / 8))
VALID = hnp.arrays(bool, 6)
ALL = np.ones(6, bool)


@pytest.mark.ci
@given(SCORES, VALID, JUNK)
def test_invalid_rows_are_never_read(scores, valid, junk):
    clean = numpy(on_groups(scores, valid))
    noisy = numpy(on_groups(np.where(valid, scores, np.float32(junk)), valid))
    for name in ESTIMATORS:
        for a, b in zip(clean[name], noisy[name], strict=True):
            assert np.isfinite(b).all(), name
            np.testing.assert_array_equal(a, b, err_msg=name)
            assert not b[~valid].any(), name


@given(SCORES, VALID, st.booleans(), st.permutations(range(3)), st.permutations(range(3)))
def test_groups_and_their_members_have_no_order(scores, valid, swap, first, second):
    order = np.array([*first, *(3 + i for i in second)])
    order = np.roll(order, 3) if swap else order
    found, expected = on_groups(scores[order], valid[order]), on_groups(scores, valid)
    for name in set(ESTIMATORS) - {"opo"}:  # whose lengths stand still here
        np.testing.assert_allclose(
            found[name][0], expected[name][0][order], rtol=1e-4, atol=1e-5, err_msg=name
        )


@given(st.floats(-1000, 1000).map(np.float32), SCORES)
# in float32 the mean of three times 0.9 may not be 0.9
@example(np.float32(0.9), np.full(6, 0.9, np.float32))
@example(np.float32(1e30), np.zeros(6, np.float32))
def test_a_group_with_equal_scores_has_no_effect(level, scores):
    beside = lambda group: on_groups(np.array([*group, *scores[3:]], np.float32), ALL)
    spread = beside([1, 2, 4])
    for name, (adv, slope) in beside([level] * 3).items():
        # The mean over the batch that gdpo takes off is 0 but for a rounding.
        np.testing.assert_allclose(adv[:3], 0.0, atol=2e-6 if name == "gdpo" else 0, err_msg=name)
        assert np.isfinite(slope).all(), name
        if name not in BY_BATCH:
            np.testing.assert_array_equal(adv[3:], spread[name][0][3:], err_msg=name)


@pytest.mark.ci
@given(SCORES, VALID)
def test_groups_of_one_give_nothing(scores, valid):
    for name, (adv, slope) in on_groups(scores, valid, size=1).items():
        np.testing.assert_array_equal(adv, 0.0, err_msg=name)
        assert np.isfinite(slope).all(), name


@pytest.mark.ci
def test_gdpo_without_spread_has_a_finite_gradient():
    slope = jax.grad(lambda s: advantages.gdpo(s, group_size=2).sum())(jnp.ones((4, 1)))
    assert np.isfinite(slope).all()
