from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxppo import aggregate
from jaxppo.losses import correction, covariance, preference, sequence, token, value
from jaxppo.losses.value import value_clipped, value_huber, value_mse

POLICY = {
    "reinforce": token.reinforce,
    "clip": token.clip,
    "dual_clip": token.dual_clip,
    "kl_penalty": partial(token.kl_penalty, beta=0.5),
    "gspo": sequence.gspo,
    "gspo_token": sequence.gspo_token,
    "cispo": token.cispo,
    "two_sided": token.two_sided,
    "sapo": token.sapo,
    "gmpo": sequence.gmpo,
    "rloo_clip": sequence.rloo_clip,
    "vespo": sequence.vespo,
    "kl_cov": partial(covariance.kl_cov, fraction=0.3),
    "clip_cov": partial(covariance.clip_cov, lower=0.0, upper=1e9, fraction=0.2),
    "dro": partial(token.dro, beta=0.5),
    "dppo_tv": token.dppo_tv,
    "dppo_kl": token.dppo_kl,
    "awr": token.awr,
}
KEY = jax.random.key(0)


def call(name, lp, old, adv, mask):
    return POLICY[name](lp, old, adv, mask, key=KEY)


@jax.jit
def everything(lp, old, adv, mask):
    """Per-token losses, diagnostics, and gradients of the sum, of all policy losses."""
    return {
        name: jax.value_and_grad(
            lambda lp, name=name: (lambda per_token, d: (jnp.sum(per_token), (per_token, d)))(
                *call(name, lp, old, adv, mask)
            ),
            has_aux=True,
        )(lp)
        for name in POLICY
    }


def rollout(seed, scale=0.5, rows=4, length=5):
    """Log-probs, old log-probs, advantages and a mask with an empty row."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(size=(rows, length)).astype(np.float32)
    lp = (old + scale * rng.normal(size=old.shape)).astype(np.float32)
    mask = (np.arange(length) < rng.integers(1, length + 1, size=(rows, 1))).astype(np.float32)
    mask[rng.integers(rows)] = 0.0
    return lp, old, rng.normal(size=old.shape).astype(np.float32), mask


def arrays(seed, **kw):
    return tuple(jnp.asarray(x) for x in rollout(seed, **kw))


def log(*x):
    return jnp.log(jnp.array([x]))


def per_token(loss, ratios, adv, **kw):
    lp = log(*ratios)
    return loss(lp, jnp.zeros_like(lp), jnp.array([adv]), jnp.ones_like(lp), **kw)


def slope(loss, ratios, adv, **kw):
    """The gradient in log π, from old log-probs of 0."""
    lp = log(*ratios)
    f = lambda lp: jnp.sum(
        loss(lp, jnp.zeros_like(lp), jnp.array([adv]), jnp.ones_like(lp), **kw)[0]
    )
    return jax.grad(f)(lp)


# --- by hand


def test_reinforce():
    lp, adv, mask = (
        jnp.array([[-1.0, -2.0, -3.0]]),
        jnp.array([[2.0, -1.0, 1.0]]),
        jnp.array([[True, True, False]]),
    )
    found, diagnostics = token.reinforce(lp, lp, adv, mask)
    np.testing.assert_array_equal(found, [[2.0, -2.0, 0.0]])  # −A log π
    np.testing.assert_array_equal(diagnostics["approx_kl"], 0.0)


def test_clip():
    # r = 1.5, A = 1: held at 1.3;  r = 0.5, A = −1: held at 0.8;  r = 0.5, A = 1 and r = 1.5, A =
    # −1: not held
    found, diagnostics = per_token(
        token.clip, [1.5, 0.5, 0.5, 1.5], [1.0, -1.0, 1.0, -1.0], low=0.2, high=0.3
    )
    np.testing.assert_allclose(found, [[-1.3, 0.8, -0.5, 1.5]], rtol=1e-6)
    np.testing.assert_array_equal(diagnostics["clip_fraction"], [[1.0, 1.0, 0.0, 0.0]])
    # k3 of old‖new: r − 1 − ln r
    r = np.array([1.5, 0.5, 0.5, 1.5])
    np.testing.assert_allclose(diagnostics["approx_kl"], [r - 1 - np.log(r)], rtol=1e-5)
    # No gradient where held, else −r A
    gradient = slope(token.clip, [1.5, 0.5, 0.5, 1.5], [1.0, -1.0, 1.0, -1.0], low=0.2, high=0.3)
    np.testing.assert_allclose(gradient, [[0.0, 0.0, -0.5, 1.5]], rtol=1e-6)


def test_clip_on_policy_is_the_policy_gradient():
    adv = [1.0, -2.0]
    np.testing.assert_allclose(slope(token.clip, [1.0, 1.0], adv), [[-1.0, 2.0]])


def test_dual_clip():
    # A = −1: r = 2 as it is, r = 5 at the ceiling of 3 without gradient; A = 1 does not see the
    # ceiling
    found, diagnostics = per_token(token.dual_clip, [2.0, 5.0, 5.0], [-1.0, -1.0, 1.0])
    np.testing.assert_allclose(found, [[2.0, 3.0, -1.2]], rtol=1e-6)
    np.testing.assert_array_equal(diagnostics["ceiling_fraction"], [[0.0, 1.0, 0.0]])
    np.testing.assert_allclose(
        slope(token.dual_clip, [2.0, 5.0, 5.0], [-1.0, -1.0, 1.0]), [[2.0, 0.0, 0.0]], rtol=1e-6
    )


def test_kl_penalty():
    # −r A + β (r − 1 − ln r), slope −r A + β (r − 1)
    found, _ = per_token(partial(token.kl_penalty, beta=2.0), [2.0, 1.0], [3.0, 3.0])
    np.testing.assert_allclose(found, [[-6 + 2 * (1 - np.log(2)), -3.0]], rtol=1e-6)
    np.testing.assert_allclose(
        slope(partial(token.kl_penalty, beta=2.0), [2.0, 1.0], [3.0, 3.0]),
        [[-4.0, -3.0]],
        rtol=1e-6,
    )


def test_cispo():
    # Weights 0.5 and 1.28 (for 2), constants: slope −w A
    found, diagnostics = per_token(token.cispo, [0.5, 2.0], [1.0, -1.0])
    np.testing.assert_allclose(found, [[-0.5 * np.log(0.5), 1.28 * np.log(2)]], rtol=1e-6)
    np.testing.assert_allclose(
        slope(token.cispo, [0.5, 2.0], [1.0, -1.0]), [[-0.5, 1.28]], rtol=1e-6
    )
    np.testing.assert_array_equal(diagnostics["clip_fraction"], [[0.0, 1.0]])


def test_two_sided():
    # 0.1 and 5 lie outside of [0.2, 4], whatever the sign of A: neither value nor slope
    ratios, adv = [0.1, 0.5, 3.0, 5.0], [1.0, -1.0, 2.0, -2.0]
    found, diagnostics = per_token(token.two_sided, ratios, adv)
    np.testing.assert_allclose(found, [[0.0, 0.5, -6.0, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(diagnostics["clip_fraction"], [[1.0, 0.0, 0.0, 1.0]])
    np.testing.assert_allclose(
        slope(token.two_sided, ratios, adv), [[0.0, 0.5, -6.0, 0.0]], rtol=1e-6
    )


def test_likelihood():
    # Scores 1 and 0.5: only 1 is above 0.5
    lp, mask = jnp.array([[-1.0, -2.0], [-3.0, -4.0]]), jnp.array([[1.0, 0.0], [1.0, 1.0]])
    f = lambda lp: token.likelihood(lp, jnp.array([1.0, 0.5]), mask, threshold=0.5)
    np.testing.assert_array_equal(f(lp), [[1.0, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(jax.grad(lambda lp: f(lp).sum())(lp), [[-1, 0], [0, 0]])


def test_sapo():
    # 4 / τ σ(τ (r − 1)): at r = 1 it is 2 / τ with slope 1
    found, _ = per_token(token.sapo, [1.0, 1.0, 2.0], [1.0, -1.0, 1.0])
    np.testing.assert_allclose(found, [[-2.0, 2 / 1.05, -4 / (1 + np.exp(-1))]], rtol=1e-6)
    np.testing.assert_allclose(slope(token.sapo, [1.0, 1.0], [1.0, -1.0]), [[-1.0, 1.0]], rtol=1e-6)


def test_dro():
    # −(A log π − β d² / 2), slope −A + β d; here log π = d = ln 2
    d = np.log(2)
    found, _ = per_token(partial(token.dro, beta=3.0), [2.0], [5.0])
    np.testing.assert_allclose(found, [[-5 * d + 1.5 * d * d]], rtol=1e-6)
    np.testing.assert_allclose(
        slope(partial(token.dro, beta=3.0), [2.0], [5.0]), [[-5 + 3 * d]], rtol=1e-6
    )


def test_awr():
    lp = jnp.array([[-1.0, -2.0, -1.0]])
    found, diagnostics = token.awr(
        lp, lp, jnp.array([[0.0, 1.0, 1e6]]), jnp.ones((1, 3)), temperature=0.5, weight_max=20.0
    )
    # exp(A / 0.5), at most 20
    np.testing.assert_allclose(found, [[1.0, 2 * np.exp(2), 20.0]], rtol=1e-6)
    np.testing.assert_array_equal(diagnostics["clip_fraction"], [[0.0, 0.0, 1.0]])


def test_dppo():
    # Probabilities 0.5 now; 0.4, 0.1, 0.9 before: moved by 0.1, 0.4, −0.4
    lp, old, ones = log(0.5, 0.5, 0.5), log(0.4, 0.1, 0.9), jnp.ones((1, 3))
    for loss in (token.dppo_tv, token.dppo_kl):
        up, diagnostics = loss(lp, old, ones, ones)
        # Too far up for A > 0, but down is no harm: weights 1.25, 0, 5 / 9, times ln 2
        np.testing.assert_allclose(up, np.array([[1.25, 0.0, 5 / 9]]) * np.log(2), rtol=1e-5)
        np.testing.assert_array_equal(diagnostics["clip_fraction"], [[0.0, 1.0, 0.0]])
        down, _ = loss(lp, old, -ones, ones)
        np.testing.assert_allclose(down, np.array([[-1.25, -5.0, 0.0]]) * np.log(2), rtol=1e-5)
    capped, _ = token.dppo_tv(lp, old, -ones, ones, cap=2.0)
    np.testing.assert_allclose(capped[0, 1], -2 * np.log(2), rtol=1e-6)


@pytest.mark.ci
def test_gspo():
    # Row 1: mean d = (0.3 − 0.1) / 2 = 0.1, A = (1 + 3) / 2 = 2; row 2: d = 0.5 beyond 0.2, held at
    # 1.2
    lp, adv = (
        jnp.array([[0.3, -0.1, 9.0], [0.5, 9.0, 9.0]]),
        jnp.array([[1.0, 3.0, 9.0], [1.0, 9.0, 9.0]]),
    )
    mask = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    f = lambda lp: sequence.gspo(lp, jnp.zeros_like(lp), adv, mask, low=0.2, high=0.2)
    np.testing.assert_allclose(
        f(lp)[0], [[-2 * np.exp(0.1)] * 2 + [0.0], [-1.2, 0.0, 0.0]], rtol=1e-6
    )
    # The mean over two rows of the row's loss: −s A / n for each of its n tokens, / 2
    gradient = jax.grad(lambda lp: jnp.sum(aggregate.sequence_mean(mask) * f(lp)[0]))(lp)
    np.testing.assert_allclose(
        gradient, [[-np.exp(0.1) / 2] * 2 + [0.0], [0.0, 0.0, 0.0]], rtol=1e-6
    )


@pytest.mark.ci
def test_rloo_clip():
    # Row 1: Σ d = 0.1, A = (1 + 3) / 2 = 2. Row 2: Σ d = 0.5, beyond 1.2: held for
    # A > 0. Row 3: not held for A < 0.
    lp = jnp.array([[0.3, -0.2, 9.0], [0.25, 0.25, 9.0], [0.25, 0.25, 9.0]])
    adv = jnp.array([[1.0, 3.0, 9.0], [1.0, 1.0, 9.0], [-1.0, -1.0, 9.0]])
    mask = jnp.array([[1.0, 1.0, 0.0]] * 3)
    f = lambda lp: sequence.rloo_clip(lp, jnp.zeros_like(lp), adv, mask, low=0.2, high=0.2)[0]
    rows = [-2 * np.exp(0.1), -1.2, np.exp(0.5)]
    np.testing.assert_allclose(f(lp), np.outer(rows, [1, 1, 0]), rtol=1e-6)
    # The mean over rows of a row's loss: −w A for each of its tokens, / 3
    gradient = jax.grad(lambda lp: jnp.sum(aggregate.sequence_mean(mask) * f(lp)))(lp)
    slopes = [-2 * np.exp(0.1) / 3, 0.0, np.exp(0.5) / 3]
    np.testing.assert_allclose(gradient, np.outer(slopes, [1, 1, 0]), rtol=1e-6)


def test_vespo():
    # W = e^ln 2 = 2 and 1 / 2. A > 0: 2² e^−3; A < 0: 2⁻³ e^(2 · 1/2). The weight has no slope.
    half = np.log(2) / 2
    lp, mask = jnp.array([[-1.0, -2.0], [-1.0, -2.0]]), jnp.ones((2, 2))
    old, adv = lp - jnp.array([[half] * 2, [-half] * 2]), jnp.array([[1.0, 1.0], [-2.0, -2.0]])
    f = lambda lp: sequence.vespo(lp, old, adv, mask)[0]
    up, down = 4 * np.exp(-3), np.exp(1) / 8
    np.testing.assert_allclose(f(lp), [[up, 2 * up], [-2 * down, -4 * down]], rtol=1e-5)
    gradient = jax.grad(lambda lp: f(lp).sum())(lp)
    np.testing.assert_allclose(gradient, [[-up] * 2, [2 * down] * 2], rtol=1e-5)


def test_gmpo():
    # A > 0: d = 0.8 held at 0.4, −0.9 not held: mean −0.25. A < 0: 0.8 not held, −0.9 held at −0.4:
    # mean 0.2
    lp, adv = jnp.array([[0.8, -0.9], [0.8, -0.9]]), jnp.array([[2.0, 2.0], [-1.0, -1.0]])
    f = lambda lp: sequence.gmpo(lp, jnp.zeros_like(lp), adv, jnp.ones((2, 2)))
    found, diagnostics = f(lp)
    np.testing.assert_allclose(found, [[-2 * np.exp(-0.25)] * 2, [np.exp(0.2)] * 2], rtol=1e-6)
    np.testing.assert_array_equal(diagnostics["clip_fraction"], [[1.0, 0.0], [0.0, 1.0]])


@pytest.mark.ci
def test_kl_cov():
    # A − mean = 2, 0, −2; log π − mean = 1, 0, −1 (in ln 2): cov 2, 0, 2 ... the tie goes to the
    # first
    lp, adv = jnp.array([[-1.0, -2.0, -4.0, 9.0]]), jnp.array([[1.0, 0.0, -1.0, 9.0]])
    mask = jnp.array([[1.0, 1.0, 1.0, 0.0]])
    # mean log π = −7 / 3: cov = 4 / 3, 0, 5 / 3: the third token, with d = 0.5 as all
    found, diagnostics = covariance.kl_cov(lp, lp - 0.5, adv, mask, fraction=0.4, coef=2.0)
    r = np.exp(0.5)
    np.testing.assert_allclose(found, [[-r, 0.0, r + 2 * 0.5, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(diagnostics["covariance_fraction"], [[0.0, 0.0, 1.0, 0.0]])
    # 0.7 · 3 = 2.1: two tokens
    _, diagnostics = covariance.kl_cov(lp, lp - 0.5, adv, mask, fraction=0.7)
    np.testing.assert_array_equal(diagnostics["covariance_fraction"], [[1.0, 0.0, 1.0, 0.0]])
    # On the policy |d| has no slope.
    gradient = jax.grad(lambda x: jnp.sum(covariance.kl_cov(x, lp, adv, mask, fraction=1.0)[0]))(lp)
    np.testing.assert_allclose(gradient, [[-1.0, 0.0, 1.0, 0.0]])


def test_clip_cov():
    rng = np.random.default_rng(0)
    lp, adv = (
        jnp.asarray(rng.normal(size=(4, 25)), jnp.float32),
        jnp.asarray(rng.normal(size=(4, 25)), jnp.float32),
    )
    mask = jnp.ones((4, 25))
    run = partial(covariance.clip_cov, lp, lp, adv, mask, fraction=0.1, lower=0.1, upper=9.0)
    found, diagnostics = run(key=jax.random.key(1))
    chosen = diagnostics["covariance_fraction"] > 0
    assert chosen.sum() == 10  # 0.1 of 100
    np.testing.assert_array_equal(found, jnp.where(chosen, 0.0, -adv))
    cov = (adv - adv.mean()) * (lp - lp.mean())
    assert ((cov > 0.1) | ~chosen).all()
    again, other = run(key=jax.random.key(1))[0], run(key=jax.random.key(2))[0]
    np.testing.assert_array_equal(found, again)
    assert (found != other).any()
    # With a fraction of 1 all are drawn that are in the band and not clipped already: r = 2 is,
    # where A > 0.
    _, diagnostics = covariance.clip_cov(
        lp, lp - jnp.log(2.0), adv, mask, fraction=1.0, lower=0.1, upper=9.0, key=KEY
    )
    np.testing.assert_array_equal(diagnostics["clip_fraction"], adv > 0)
    np.testing.assert_array_equal(diagnostics["covariance_fraction"], (cov > 0.1) & (adv < 0))
    with pytest.raises(ValueError, match="needs a key"):
        run(key=None)


# Ratios 0.5, 4, (padding) and 2, 1, 3: products 2 and 6, roots √2 and ∛6
CORRECTED, MASKED = log(0.5, 4.0, 9.0), jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
CORRECTED = jnp.concatenate([CORRECTED, log(2.0, 1.0, 3.0)])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[0.5, 2, 0], [2, 1, 2]]),
        ({"low": 0.8, "high": np.inf}, [[0.8, 4, 0], [2, 1, 3]]),
        ({"rule": "mask", "low": 0.8, "high": 3.5}, [[0, 0, 0], [2, 1, 3]]),
        ({"level": "sequence", "high": 5.0}, [[2, 2, 0], [5, 5, 5]]),
        ({"level": "sequence", "rule": "mask", "high": 5.0}, [[2, 2, 0], [0, 0, 0]]),
        ({"level": "geometric", "high": 1.5}, [[2**0.5] * 2 + [0], [1.5] * 3]),
        # (0.5 + 2 + 2 + 1 + 2) / 5 = 1.5 of the tokens, (2 + 5) / 2 = 3.5 of the rows
        ({"normalise": True}, np.array([[0.5, 2, 0], [2, 1, 2]]) / 1.5),
        (
            {"level": "sequence", "high": 5.0, "normalise": True},
            np.array([[2, 2, 0], [5, 5, 5]]) / 3.5,
        ),
    ],
)
def test_importance(options, expected):
    run = lambda x: correction.importance(x, jnp.zeros_like(x), MASKED, **options)
    np.testing.assert_allclose(run(CORRECTED), expected, rtol=1e-5)
    np.testing.assert_array_equal(jax.grad(lambda x: run(x).sum())(CORRECTED), 0.0)


def test_normalised_importance_is_that_of_all_devices():
    f = lambda x, m: correction.importance(x, 0 * x, m, normalise=True, axis_name="d")
    split = jax.vmap(f, axis_name="d")(CORRECTED[:, None], MASKED[:, None])
    whole = correction.importance(CORRECTED, 0 * CORRECTED, MASKED, normalise=True)
    np.testing.assert_allclose(split[:, 0], whole, rtol=1e-6)
    # No weight is left: 0, not 0 / 0
    none = {"rule": "mask", "low": 10.0, "high": 11.0, "normalise": True}
    np.testing.assert_array_equal(correction.importance(CORRECTED, CORRECTED, MASKED, **none), 0)


# r − 1 − log r of 0.5, 4, 2, 1, 3: 0.193, 1.614, 0.307, 0, 0.901
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"low": 0.8, "high": 3.5}, [[0, 0, 0], [1, 1, 1]]),
        ({"low": 0.8}, [[0, 1, 0], [1, 1, 1]]),
        ({"over": "row_sum", "high": 5.0}, [[1, 1, 0], [0, 0, 0]]),
        ({"over": "row_mean", "low": 1.5}, [[0, 0, 0], [1, 1, 1]]),
        ({"over": "row_max", "high": 3.5}, [[0, 0, 0], [1, 1, 1]]),
        ({"estimator": "k3", "high": 0.5}, [[1, 0, 0], [1, 1, 0]]),
        # sums 1.807 and 1.208, means 0.904 and 0.403
        ({"estimator": "k3", "over": "row_sum", "high": 1.5}, [[0, 0, 0], [1, 1, 1]]),
        ({"estimator": "k3", "over": "row_mean", "low": 0.5}, [[1, 1, 0], [0, 0, 0]]),
        ({"estimator": "k3", "over": "row_max", "high": 1.0}, [[0, 0, 0], [1, 1, 1]]),
        ({}, [[1, 1, 0], [1, 1, 1]]),
    ],
)
def test_rejection(options, expected):
    kept = correction.rejection(CORRECTED, jnp.zeros_like(CORRECTED), MASKED, **options)
    np.testing.assert_array_equal(kept, expected)


def test_off_policy_mask():
    # Mean fall of the log-probs: 0.5, 0.5, 0.1; only a bad row that has fallen far is left out.
    sampler = jnp.array([[-1.0, -1.0, 9.0]] * 3)
    lp = sampler - jnp.array([[0.2, 0.8, 9.0], [0.2, 0.8, 9.0], [0.1, 0.1, 9.0]])
    adv = jnp.array([[1.0, -0.5, 9.0], [-1.0, 0.5, 9.0], [-1.0, -1.0, 9.0]])
    mask = jnp.array([[1.0, 1.0, 0.0]] * 3)
    kept = correction.off_policy_mask(lp, sampler, adv, mask, threshold=0.4)
    np.testing.assert_array_equal(kept, [[1, 1, 0], [0, 0, 0], [1, 1, 0]])
    # the gradient of what it multiplies is not that of where it changes
    slope = jax.grad(
        lambda x: correction.off_policy_mask(x, sampler, adv, mask, threshold=0.4).sum()
    )
    np.testing.assert_array_equal(slope(lp), 0.0)


def test_top_entropy():
    # 0, 1, 2, 3, 4: the 0.75-quantile is 3
    entropy, mask = jnp.array([[0.0, 3.0, 9.0], [4.0, 1.0, 2.0]]), MASKED
    want = [[0, 1, 0], [1, 0, 0]]
    np.testing.assert_array_equal(correction.top_entropy(entropy, mask, fraction=0.25), want)
    tied = correction.top_entropy(jnp.array([[1.0, 1.000001, 0.0]]), jnp.ones((1, 3)), fraction=0.1)
    np.testing.assert_array_equal(tied, [[1, 1, 0]])
    f = partial(correction.top_entropy, fraction=0.25, axis_name="d")
    split = jax.vmap(f, axis_name="d")(entropy[:, None], mask[:, None])  # each row on a device
    np.testing.assert_array_equal(split[:, 0], want)


def test_value_losses():
    values, old, returns = (
        jnp.array([[1.0, 1.0, 3.0]]),
        jnp.array([[0.0, 0.0, 3.0]]),
        jnp.array([[2.0, -1.0, 0.0]]),
    )
    np.testing.assert_array_equal(value.value_mse(values, returns), [[0.5, 2.0, 4.5]])
    # Held at 0.5: (0.5 − 2)² = 2.25 is worse than 1; (0.5 + 1)² = 2.25 is better than 4; 3 is where
    # it was
    f = partial(value.value_clipped, old_values=old, returns=returns, eps=0.5)
    np.testing.assert_array_equal(f(values), [[1.125, 2.0, 4.5]])
    # Where the held value is the worse there is no gradient, else V − R
    np.testing.assert_array_equal(jax.grad(lambda v: f(v).sum())(values), [[0.0, 2.0, 3.0]])
    # |e| = 1, 2, 3 with δ = 2: quadratic up to 2, then 2 (3 − 1)
    np.testing.assert_array_equal(value.value_huber(values, returns, delta=2.0), [[0.5, 2.0, 4.0]])
    np.testing.assert_array_equal(
        jax.grad(lambda v: value.value_huber(v, returns, delta=2.0).sum())(values), [[-1, 2, 2]]
    )


def test_value_losses_with_a_mask_do_not_read_padding():
    values, returns, mask = (
        jnp.array([[1.0, jnp.nan]]),
        jnp.array([[2.0, jnp.inf]]),
        jnp.array([[1.0, 0.0]]),
    )
    for f in (value_mse, partial(value_clipped, old_values=values), value_huber):
        total = lambda v, f=f: jnp.sum(f(v, returns=returns, mask=mask))
        value, gradient = jax.value_and_grad(total)(values)
        assert value == 0.5
        if f is not value_huber and not isinstance(f, partial):
            np.testing.assert_array_equal(gradient, [[-1.0, 0.0]])
        assert np.isfinite(gradient).all()


def test_entropy():
    logits = jnp.array(
        [
            [0.0, 0.0, 0.0, 0.0],
            [7.0, 7.0, -jnp.inf, -jnp.inf],
            [0.0, np.log(3.0), -jnp.inf, -jnp.inf],
        ]
    )
    # ln 4, ln 2, and −(¼ ln ¼ + ¾ ln ¾)
    expected = [np.log(4), np.log(2), 0.25 * np.log(4) + 0.75 * np.log(4 / 3)]
    np.testing.assert_allclose(value.entropy(logits), expected, rtol=1e-6)
    gradient = jax.grad(lambda z: value.entropy(z).sum())(logits)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient[:2], 0.0, atol=1e-6)  # a uniform distribution is the top


def test_preference_losses():
    chosen, rejected, ref_chosen, ref_rejected = (
        jnp.array([x]) for x in (-10.0, -14.0, -11.0, -12.0)
    )
    # h = (−10 + 11) − (−14 + 12) = 3
    run = lambda f, **kw: f(chosen, rejected, ref_chosen, ref_rejected, **kw)
    np.testing.assert_allclose(run(preference.dpo, beta=0.5), [np.log1p(np.exp(-1.5))], rtol=1e-6)
    smooth = 0.9 * np.log1p(np.exp(-1.5)) + 0.1 * np.log1p(np.exp(1.5))
    np.testing.assert_allclose(
        run(preference.dpo, beta=0.5, label_smoothing=0.1), [smooth], rtol=1e-6
    )
    np.testing.assert_allclose(run(preference.ipo, beta=0.5), [4.0], rtol=1e-6)  # (3 − 1)²


# --- one loss against another


def test_infinite_ceiling_is_clip():
    lp, old, adv, mask = arrays(0)
    adv = adv.at[0, 0].set(0.0)  # infinity times 0
    for ceiling in (np.inf, 1e9):
        f = lambda loss, **kw: jax.value_and_grad(
            lambda x: jnp.sum(loss(x, old, adv, mask, **kw)[0])
        )(lp)
        with jax.debug_nans(True):
            capped = f(token.dual_clip, ceiling=ceiling)
        for a, b in zip(f(token.clip), capped, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sequence", [sequence.gspo, sequence.gspo_token])
def test_on_one_token_a_sequence_loss_is_clip(sequence):
    lp, old, adv, _ = arrays(1, length=1)
    mask = jnp.ones_like(lp)
    f = lambda loss: jax.value_and_grad(
        lambda x: jnp.sum(loss(x, old, adv, mask, low=0.2, high=0.3)[0])
    )(lp)
    for a, b in zip(f(token.clip), f(sequence), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_gspo_token_with_one_advantage_is_gspo():
    lp, old, adv, mask = arrays(2)
    adv = jnp.broadcast_to(adv[:, :1], adv.shape)
    weights = aggregate.sequence_mean(mask)
    f = lambda loss: jax.value_and_grad(
        lambda x: jnp.sum(weights * loss(x, old, adv, mask, low=0.1, high=0.1)[0])
    )(lp)
    for a, b in zip(f(sequence.gspo), f(sequence.gspo_token), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "name",
    [
        "clip",
        "dual_clip",
        "gspo_token",
        "cispo",
        "two_sided",
        "sapo",
        "vespo",
        "dppo_tv",
        "dppo_kl",
        "reinforce",
    ],
)
def test_on_policy_all_have_the_policy_gradient(name):
    lp, _, adv, mask = rollout(3)
    gradient = everything(lp, lp, adv, mask)[name][1]
    # A row of gspo_token counts as a mean of its tokens only in the weights, so here it too is −A.
    np.testing.assert_allclose(gradient, -adv * mask, rtol=1e-5, atol=1e-6)


# --- what holds for all


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    lp=st.lists(st.sampled_from([0.0, -1e-3, -30.0, -1e4, -1e18]), min_size=20, max_size=20),
    old=st.lists(st.sampled_from([0.0, -1e-3, -30.0, -1e4, -1e18]), min_size=20, max_size=20),
)
def test_extreme_ratios_stay_finite(seed, lp, old):
    adv, mask = rollout(seed)[2:]
    lp, old = np.array(lp, np.float32).reshape(4, 5), np.array(old, np.float32).reshape(4, 5)
    for name, leaves in everything(lp, old, adv, mask).items():
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(leaves)), name


@pytest.mark.parametrize("name", POLICY)
def test_an_empty_batch_is_zero(name):
    lp, old, adv, mask = rollout(4)
    value, gradient = everything(lp, old, adv, 0 * mask)[name]
    assert all((x == 0).all() for x in jax.tree.leaves((value, gradient)))


@pytest.mark.ci
@pytest.mark.parametrize("name", POLICY)
def test_diagnostics_have_no_gradient_and_the_shape_of_tokens(name):
    lp, old, adv, mask = arrays(5)
    (_, (per_token, diagnostics)), _ = everything(lp, old, adv, mask)[name]
    assert "approx_kl" in diagnostics and (diagnostics["approx_kl"] >= 0).all()
    for x in diagnostics.values():
        assert x.shape == per_token.shape == mask.shape
    gradient = jax.grad(
        lambda x: sum(jnp.sum(v) for v in call(name, x, old, adv, mask)[1].values())
    )(lp)
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("mask_dtype", [bool, jnp.float32])
def test_dtype_is_kept(dtype, mask_dtype):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        lp, old, adv, mask = (jnp.asarray(x, dtype) for x in rollout(7))
        for name in POLICY:
            found = jax.eval_shape(
                lambda x, name=name: call(name, x, old, adv, mask.astype(mask_dtype)), lp
            )
            assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(dtype)}, name
        for f in (value.value_mse, value.value_huber, partial(value.value_clipped, returns=old)):
            assert jax.eval_shape(f, lp, adv).dtype == dtype
        assert jax.eval_shape(value.entropy, lp).dtype == dtype


@pytest.mark.ci
@pytest.mark.parametrize(
    ("loss", "names"),
    [
        (token.clip, ("low", "high")),
        (token.dual_clip, ("low", "high", "ceiling")),
        (sequence.gspo, ("low", "high")),
        (sequence.gmpo, ("low", "high")),
        (sequence.rloo_clip, ("low", "high")),
        (sequence.vespo, ("k_positive", "lambda_positive", "k_negative", "lambda_negative")),
        (token.two_sided, ("low", "high")),
        (token.cispo, ("low", "high")),
        (token.sapo, ("tau_positive", "tau_negative")),
        (covariance.kl_cov, ("fraction", "coef")),
        (token.awr, ("temperature", "weight_max")),
    ],
)
def test_settings_may_be_swept(loss, names):
    # A sweep is a vmap over settings: each may be an array.
    lp, old, adv, mask = arrays(8)
    with jax.numpy_dtype_promotion("strict"):
        swept = jax.vmap(lambda x: loss(lp, old, adv, mask, **dict.fromkeys(names, x))[0])(
            jnp.array([0.1, 0.4])
        )
    for row, x in zip(swept, (0.1, 0.4), strict=True):
        np.testing.assert_allclose(
            row, loss(lp, old, adv, mask, **dict.fromkeys(names, x))[0], rtol=1e-5, atol=1e-6
        )
