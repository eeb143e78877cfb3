"""Every derivative against central differences, to second order, forward and backward, in float64.

A loss that holds a factor constant (cispo, dppo_tv, dppo_kl, gspo_token, vespo) cannot be checked
so: its gradient is not the slope of its value. It is compared with its formula written by hand, the
factor an argument, and that formula is checked.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxppo import aggregate, kernels, kl, losses, masked
from jaxppo.losses import covariance, preference, sequence, token, value

MASK = np.array([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
OLD = np.array([[-1.0, -0.7, -0.5, -1.2], [-2.0, -1.9, -0.4, 9.0], [-1.5, -0.9, 9.0, 9.0]])
# The ratio leaves 0.8 .. 1.2 outside −0.223 .. 0.182, reaches a ceiling of 3 at 1.099. Row means:
# −0.0625, 0.633, 0.55.
D = np.array([[0.05, 0.5, -0.7, -0.1], [0.3, 1.5, 0.1, 7.0], [0.6, 0.5, 7.0, 7.0]])
LP = OLD + D
ADV = np.array([[1.0, 2.0, 1.5, -1.0], [-1.0, -2.0, 0.5, 7.0], [1.0, 2.0, 7.0, 7.0]])
WEIGHTS = np.random.default_rng(0).uniform(0.5, 1.5, MASK.shape)
KEY = jax.random.key(0)

SMOOTH = {
    "reinforce": token.reinforce,
    "clip": token.clip,
    "dual_clip": token.dual_clip,
    "kl_penalty": partial(token.kl_penalty, beta=0.5),
    "gspo": partial(sequence.gspo, low=0.2, high=0.2),
    "two_sided": partial(token.two_sided, low=0.4, high=0.5),
    "sapo": token.sapo,
    "gmpo": sequence.gmpo,
    "rloo_clip": sequence.rloo_clip,
    "clip_cov": partial(covariance.clip_cov, lower=0.0, upper=1e9, fraction=0.2, key=KEY),
    "kl_cov": partial(covariance.kl_cov, fraction=0.3),
    "dro": partial(token.dro, beta=0.5),
    "awr": partial(token.awr, temperature=0.6),  # e^(2 / 0.6) = 28 > 20, e^(1.5 / 0.6) = 12 < 20
}
STOPPED = {
    "cispo": token.cispo,
    "dppo_tv": partial(token.dppo_tv, cap=3.0),  # the largest ratio is e^1.5 = 4.5
    "dppo_kl": partial(token.dppo_kl, cap=3.0),
    "gspo_token": partial(sequence.gspo_token, low=0.2, high=0.2),
    "vespo": sequence.vespo,
}


def on_rollout(loss):
    return lambda lp: loss(lp, jnp.asarray(OLD), jnp.asarray(ADV), jnp.asarray(MASK))


def second_order(f, *args, modes=("fwd", "rev")):
    check_grads(jax.jit(f), tuple(jnp.asarray(x) for x in args), order=2, modes=modes)


# --- policy losses


@pytest.mark.ci
@pytest.mark.parametrize("name", [*SMOOTH, *STOPPED])
def test_the_inputs_are_away_from_kinks(name, x64):
    """A finite difference moves a number by about 1e-4. Within 0.01 no branch changes, and both
    sides of each branch occur.
    """
    f = jax.jit(lambda move: on_rollout((SMOOTH | STOPPED)[name])(LP + 0.01 * move)[1])
    here = f(jnp.zeros(LP.shape))
    moves = np.random.default_rng(1).choice([-1.0, 1.0], (64, *LP.shape))
    there = jax.vmap(f)(jnp.asarray(moves))
    branches = set(here) - {"approx_kl"}
    assert branches or name in {
        "reinforce",
        "kl_penalty",
        "sapo",
        "dro",
        "vespo",
    }  # these have none
    for branch in branches:
        assert 0 < here[branch].sum() < MASK.sum(), branch
        np.testing.assert_array_equal(
            there[branch], jnp.broadcast_to(here[branch], moves.shape), err_msg=branch
        )


@pytest.mark.ci
@pytest.mark.parametrize("name", SMOOTH)
def test_policy_loss(name, x64):
    second_order(lambda lp: on_rollout(SMOOTH[name])(lp)[0], LP)


def constant_factor(name):
    """The factor that the loss holds constant, in NumPy."""
    ratio, p, q = np.exp(D), np.exp(OLD), np.exp(LP)
    if name == "cispo":
        return np.minimum(ratio, 1.28)
    if name == "gspo_token":  # s / sg(π), s = exp of the row's mean
        s = np.exp((MASK * D).sum(1, keepdims=True) / MASK.sum(1, keepdims=True))
        return s / q
    if name == "vespo":
        w = np.exp((MASK * D).sum(1, keepdims=True))
        return np.where(ADV >= 0, w**2 * np.exp(3 * (1 - w)), w**3 * np.exp(2 * (1 - w)))
    if name == "dppo_tv":
        outside = np.where(ADV > 0, q - p > 0.15, q - p < -0.15)
    else:
        # padding has p > 1
        distance = p * np.log(p / q) + (1 - p) * np.log(np.abs((1 - p) / (1 - q)))
        outside = (distance > 0.05) & np.where(ADV > 0, q > p, q < p)
    return np.where(outside, 0, np.minimum(ratio, 3.0))


def by_hand(name, lp, factor):
    """The loss with its constant factor as an argument."""
    if name == "gspo_token":
        ratio = factor * jnp.exp(lp)
        return -MASK * jnp.minimum(ratio * ADV, jnp.clip(ratio, 0.8, 1.2) * ADV)
    return -MASK * factor * ADV * lp


@pytest.mark.ci
@pytest.mark.parametrize("name", STOPPED)
def test_policy_loss_with_a_constant_factor(name, x64):
    factor, lp = jnp.asarray(constant_factor(name)), jnp.asarray(LP)
    loss = lambda lp: on_rollout(STOPPED[name])(lp)[0]
    formula = lambda lp: by_hand(name, lp, factor)
    total = lambda f: lambda lp: jnp.sum(WEIGHTS * f(lp))
    # dppo_kl adds 1e-8 in its distance
    np.testing.assert_allclose(loss(lp), formula(lp), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(total(loss))(lp), jax.grad(total(formula))(lp), rtol=1e-12)
    turn = jnp.asarray(ADV)  # any direction, for the second derivative along it
    bend = lambda f: jax.jvp(jax.grad(total(f)), (lp,), (turn,))[1]
    np.testing.assert_allclose(bend(loss), bend(formula), rtol=1e-12)
    second_order(formula, lp)


def test_likelihood(x64):
    scores, mask = jnp.array([1.0, 0.0, 2.0]), jnp.asarray(MASK)
    second_order(lambda lp: token.likelihood(lp, scores, mask), LP)


@pytest.mark.ci
def test_aggregated_losses(x64):
    modes = [
        aggregate.token_mean,
        aggregate.token_sum,
        aggregate.sequence_mean,
        aggregate.sequence_sum,
        partial(aggregate.constant, length=7),
    ]
    loss = lambda lp: on_rollout(token.clip)(lp)[0]
    second_order(lambda lp: [jnp.sum(f(jnp.asarray(MASK)) * loss(lp)) for f in modes], LP)


# --- value losses, entropy, preferences

RETURNS = np.array([[0.0, 0.5, 2.0, -3.0]])
VALUES = np.array([[0.7, 0.1, -1.0, 0.2]])  # errors 0.7, −0.4, −3, 3.2: two on either side of δ = 1
# moved by 0.1, 0.8, 0.1, 0.7: two beyond ε = 0.2, held at −0.5 and −0.3
OLD_VALUES = np.array([[0.6, -0.7, -1.1, -0.5]])
# (−0.5 − 0.5)² = 1 is worse than 0.4²: no gradient. (−0.3 + 3)² is better than 3.2².


@pytest.mark.parametrize("name", ["value_mse", "value_huber", "value_clipped"])
def test_value_loss(name, x64):
    """Without a mask and with one."""
    fixed = {"returns": jnp.asarray(RETURNS)}
    if name == "value_clipped":
        fixed["old_values"] = jnp.asarray(OLD_VALUES)
    masks = None, jnp.array([[1.0, 1.0, 0.0, 1.0]])
    second_order(lambda v: [getattr(losses, name)(v, **fixed, mask=m) for m in masks], VALUES)


def test_the_clipped_value_loss_takes_both_branches(x64):
    slope = jax.grad(
        lambda v: jnp.sum(value.value_clipped(v, jnp.asarray(OLD_VALUES), jnp.asarray(RETURNS)))
    )
    np.testing.assert_allclose(slope(jnp.asarray(VALUES)), [[0.7, 0.0, -3.0, 3.2]], rtol=1e-12)


LOGITS = np.array([[0.3, -1.0, 2.0, 0.0], [1.0, 1.5, -0.5, -2.0]])
REF_LOGITS = np.array([[0.0, 0.5, 1.0, -1.0], [-1.0, 1.0, 0.5, 0.2]])


def test_entropy(x64):
    second_order(value.entropy, LOGITS)


@pytest.mark.ci
def test_preference_losses(x64):
    fs = [preference.dpo, partial(preference.dpo, beta=0.5, label_smoothing=0.1), preference.ipo]
    second_order(lambda *x: [f(*x) for f in fs], LP[:, 0], LP[:, 1], OLD[:, 0], OLD[:, 1])


# --- KL, statistics, kernels


def test_kl_estimators(x64):
    fs = [kl.k1, kl.k2, kl.k3, kl.absolute]
    # |x| has its kink at 0, and no two are closer than 0.05
    second_order(lambda *x: [f(*x) for f in fs], LP, OLD)


@pytest.mark.parametrize(
    "divergence",
    [kl.full, *(pytest.param(f, marks=pytest.mark.ci) for f in (kl.forward, kl.jensen_shannon))],
)
def test_divergence_of_the_whole_vocabulary(divergence, x64):
    second_order(divergence, LOGITS, REF_LOGITS)


@pytest.mark.ci
@pytest.mark.parametrize(
    "fs",
    [
        [masked.total, masked.mean, partial(masked.mean, axis=1)],
        [masked.var, partial(masked.var, ddof=1)],
        [masked.whiten, partial(masked.whiten, shift_mean=False, ddof=1)],
    ],
    ids=["total and mean", "var", "whiten"],
)
def test_statistics(fs, x64):
    second_order(lambda x: [f(x, jnp.asarray(MASK)) for f in fs], LP)


@pytest.mark.parametrize("rows", [False, True])
def test_matmul(rows, x64):
    w = LOGITS.T if rows else LOGITS  # [3 2] by [2 4], or by the transpose of [4 2]
    second_order(
        lambda x, w: kernels.matmul(x, w, jnp.float64, rows=rows), D[:, :2], w, modes=["rev"]
    )


def test_token_logprobs(x64):
    second_order(lambda z: kernels.token_logprobs(z, jnp.array([2, 0])), LOGITS, modes=["rev"])
