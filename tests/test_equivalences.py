"""Settings at which one function equals another. `test_losses.py` compares losses on the policy
that sampled.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxppo import advantages, kernels, kl, masked
from jaxppo.losses import correction, covariance, preference, sequence, token, value
from jaxppo.models.layers import Linear

RNG = np.random.default_rng(0)
ROWS, LENGTH = 4, 6
MASK = jnp.asarray(np.arange(LENGTH) < np.array([[6], [3], [0], [1]]), jnp.float32)
OLD = jnp.asarray(-RNG.exponential(size=(ROWS, LENGTH)), jnp.float32)
# ratios of about 0.3 to 3
LP = OLD + jnp.asarray(0.5 * RNG.normal(size=(ROWS, LENGTH)), jnp.float32)
ADV = jnp.asarray(RNG.normal(size=(ROWS, LENGTH)), jnp.float32)
INF = float("inf")


def run(loss, lp=LP, old=OLD, adv=ADV, mask=MASK, **settings):
    """Per-token losses, and the gradient of their sum in log π."""
    f = lambda lp: (lambda per_token: (per_token.sum(), per_token))(
        loss(lp, old, adv, mask, **settings)[0]
    )
    (_, per_token), gradient = jax.value_and_grad(f, has_aux=True)(lp)
    return per_token, gradient


def equal(found, expected, rtol=1e-6, atol=1e-7):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


# --- policy losses

UNCLIPPED = (-MASK * jnp.exp(LP - OLD) * ADV,) * 2  # −r A is its own slope in log π


@pytest.mark.ci
@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (token.kl_penalty, {"beta": 0.0}),
        (covariance.kl_cov, {"coef": 0.0}),
        (token.clip, {"low": INF, "high": INF}),
        (sequence.gspo_token, None),
    ],
    ids=["kl_penalty", "kl_cov", "clip", "gspo_token"],
)
def test_a_loss_without_bounds_is_the_unclipped_surrogate(loss, settings):
    if settings is None:  # each token a row of its own
        column = lambda a: a.reshape(-1, 1)
        found = run(loss, *(column(a) for a in (LP, OLD, ADV, MASK)), low=INF, high=INF)
        return equal((a.reshape(ROWS, LENGTH) for a in found), UNCLIPPED)
    equal(run(loss, **settings), UNCLIPPED)


@pytest.mark.parametrize("tau", [1e-1, 1e-2])
def test_a_wide_soft_gate_has_the_slope_of_the_unclipped_surrogate(tau):
    # σ'(x) = ¼ (1 − x² / 4 + …), x = τ (r − 1), r up to about 3.3: a share of at most τ² 2.3² / 4 =
    # 1.3 τ² is missing
    ratio = jnp.exp(LP - OLD)
    assert ratio.max() < 3.3
    _, gradient = run(token.sapo, tau_positive=tau, tau_negative=tau)
    np.testing.assert_allclose(gradient, UNCLIPPED[1], rtol=1.4 * tau**2, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (token.cispo, {"low": 1.0, "high": INF}),
        (token.dppo_tv, {"low": INF, "high": INF, "cap": INF}),
        (token.dppo_kl, {"low": INF, "high": INF, "cap": INF}),
    ],
    ids=["cispo", "dppo_tv", "dppo_kl"],
)
def test_wide_bounds_weigh_the_policy_gradient_by_the_ratio(loss, settings):
    per_token, gradient = run(loss, **settings)
    np.testing.assert_allclose(gradient, UNCLIPPED[1], rtol=1e-6)
    np.testing.assert_allclose(per_token, UNCLIPPED[0] * LP, rtol=1e-6)  # −sg(r) A log π


@pytest.mark.parametrize(
    ("loss", "settings"),
    [(token.cispo, {"low": 0.0, "high": 0.0}), (token.dro, {"beta": 0.0})],
    ids=["cispo", "dro"],
)
def test_a_loss_without_the_ratio_is_reinforce(loss, settings):
    equal(run(loss, **settings), run(token.reinforce))


def test_awr_at_a_huge_temperature_is_imitation():
    equal(run(token.awr, temperature=1e30), (-MASK * LP, -MASK))


def test_clip_cov_without_candidates_is_clip():
    equal(run(covariance.clip_cov, lower=INF, upper=INF, key=jax.random.key(0)), run(token.clip))
    drawn = run(covariance.clip_cov, lower=-INF, upper=INF, key=jax.random.key(0))[0]
    assert (drawn != run(token.clip)[0]).any()


def test_gmpo_on_one_token_is_clip_with_bounds_on_the_logarithm():
    # −0.4 and 0.4 on d are e⁻⁰·⁴ = 1 − 0.33 and e⁰·⁴ = 1 + 0.49 on the ratio.
    columns = [a.reshape(-1, 1) for a in (LP, OLD, ADV, MASK)]
    equal(
        run(sequence.gmpo, *columns),
        run(token.clip, *columns, low=1 - np.exp(-0.4), high=np.exp(0.4) - 1),
    )


def test_gspo_equals_clip_where_all_tokens_of_a_row_moved_equally():
    # d and A the same for all tokens of a row: each token's ratio is the row's.
    old, adv = LP - LP[:, :1] / 4, jnp.broadcast_to(ADV[:, :1], ADV.shape)
    for loss in (sequence.gspo, sequence.gspo_token):
        found = run(loss, LP, old, adv, low=0.2, high=0.2)[0]
        np.testing.assert_allclose(found, run(token.clip, LP, old, adv)[0], rtol=1e-5)


def test_no_correction_if_the_sampler_is_the_policy():
    for level in ("token", "sequence", "geometric"):
        for options in ({}, {"rule": "mask", "low": 0.5}, {"normalise": True}):
            weights = correction.importance(LP, LP, MASK, level=level, **options)
            np.testing.assert_array_equal(weights, MASK)
    for estimator, bounds in (("k1", {"low": 0.9, "high": 1.1}), ("k3", {"high": 0.1})):
        for over in ("token", "row_sum", "row_mean", "row_max"):
            kept = correction.rejection(LP, LP, MASK, estimator=estimator, over=over, **bounds)
            np.testing.assert_array_equal(kept, MASK)
    far = correction.off_policy_mask(LP, LP, ADV, MASK, threshold=0.0)
    np.testing.assert_array_equal(far, MASK)


def test_levels_of_importance_on_one_token_are_the_same():
    columns = [a.reshape(-1, 1) for a in (LP, OLD, MASK)]
    want = correction.importance(*columns)
    for level in ("sequence", "geometric"):
        np.testing.assert_array_equal(correction.importance(*columns, level=level), want)


def test_all_tokens_are_the_top():
    np.testing.assert_array_equal(correction.top_entropy(ADV, MASK, fraction=1.0), MASK)


# --- value losses, preferences, entropy


@pytest.mark.parametrize(
    "loss",
    [
        partial(value.value_clipped, old_values=OLD, eps=INF),
        lambda v, returns: value.value_clipped(v, v, returns),  # nothing has moved yet
        partial(value.value_huber, delta=8.0),  # the largest error is 6.5
    ],
    ids=["clipped, wide", "clipped, at once", "huber"],
)
def test_value_losses_without_bounds_are_the_squared_error(loss):
    f = lambda loss: (loss(LP, returns=ADV), jax.grad(lambda v: loss(v, returns=ADV).sum())(LP))
    assert jnp.abs(LP - ADV).max() < 8
    # huber's slope is δ + (e − δ), rounded at 8: to 2⁻²¹ = 5e-7
    equal(f(loss), f(value.value_mse), atol=1e-6)


def test_a_narrow_huber_is_the_absolute_error():
    np.testing.assert_allclose(
        value.value_huber(LP, ADV, delta=1e-6) / 1e-6, jnp.abs(LP - ADV), rtol=1e-4
    )


def test_dpo_with_equal_log_ratios():
    # h = 0: −log σ(0) = log 2, slope −β / 2 in the better one and β / 2 in the worse, whatever the
    # references
    chosen, rejected, shift = LP[:, 0], LP[:, 1], ADV[:, 0]
    f = lambda c, r: preference.dpo(c, r, chosen - shift, rejected - shift, beta=0.3)
    np.testing.assert_allclose(f(chosen, rejected), np.log(2), rtol=1e-6)
    up, down = jax.grad(lambda c, r: f(c, r).sum(), argnums=(0, 1))(chosen, rejected)
    np.testing.assert_allclose(up, -0.15, rtol=1e-5)
    np.testing.assert_allclose(down, 0.15, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothed_dpo_mixes_both_labels(smoothing):
    pair, swapped = (
        (LP[:, 0], LP[:, 1], OLD[:, 0], OLD[:, 1]),
        (LP[:, 1], LP[:, 0], OLD[:, 1], OLD[:, 0]),
    )
    found = preference.dpo(*pair, beta=2.0, label_smoothing=smoothing)
    expected = (1 - smoothing) * preference.dpo(*pair, beta=2.0) + smoothing * preference.dpo(
        *swapped, beta=2.0
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    back = preference.dpo(*swapped, beta=2.0, label_smoothing=smoothing)
    # A coin for a label: the order says nothing.
    assert np.allclose(found, back, rtol=1e-6) == (smoothing == 0.5)


def test_entropy_is_log_v_minus_the_kl_to_uniform():
    # KL(π‖uniform) = log V − H, and the kernel counts the same entropy
    found = value.entropy(ADV)
    np.testing.assert_allclose(found, np.log(LENGTH) - kl.full(ADV, jnp.zeros_like(ADV)), rtol=1e-5)
    np.testing.assert_allclose(
        found, kernels.token_logprobs(ADV, jnp.zeros(ROWS, int))[1], rtol=1e-5
    )


# --- advantages


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_with_lambda_0_is_the_one_step_error(gamma):
    # r + γ V(next) − V, and there is no next after the last token
    values = MASK * LP
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    expected = MASK * (ADV + gamma * following - values)
    np.testing.assert_allclose(
        advantages.gae(ADV, LP, MASK, gamma=gamma, lam=0.0)[0], expected, rtol=1e-5, atol=1e-6
    )


def test_reinforce_plus_plus_is_whitened_returns():
    rewards = np.where(MASK > 0, ADV, 0).astype(np.float64)
    returns = np.cumsum(rewards[:, ::-1], 1)[:, ::-1]  # undiscounted: what is still to come
    tokens = returns[MASK > 0]
    expected = MASK * (returns - tokens.mean()) / tokens.std(ddof=1)
    np.testing.assert_allclose(
        advantages.reinforce_plus_plus(ADV, MASK, gamma=1.0), expected, rtol=1e-5, atol=1e-6
    )


def test_remax_with_a_greedy_score_of_0_is_returns_to_go():
    found = advantages.remax(ADV, jnp.zeros(ROWS), MASK)
    np.testing.assert_array_equal(found, advantages.returns_to_go(ADV, MASK, gamma=1.0))


SCORES = ADV.reshape(-1)  # 24 different numbers: every group of 4 teaches something


def test_gpg_of_informative_groups_is_the_plain_difference():
    plain = advantages.group(SCORES, group_size=4, normalise_std=False)
    np.testing.assert_allclose(advantages.gpg(SCORES, group_size=4), plain, rtol=1e-6)


def test_gdpo_of_one_reward_is_group_then_normalised_over_the_batch():
    normalised = masked.whiten(
        advantages.group(SCORES, group_size=4), jnp.ones_like(SCORES), ddof=1
    )
    np.testing.assert_allclose(
        advantages.gdpo(SCORES[:, None], group_size=4), normalised, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("group_size", [2, 3, 8])
def test_rloo_is_each_against_the_mean_of_the_others(group_size):
    groups = np.asarray(SCORES, np.float64).reshape(-1, group_size)
    others = [[np.delete(g, i).mean() for i in range(group_size)] for g in groups]
    found = advantages.rloo(SCORES, group_size=group_size)
    np.testing.assert_allclose(found, (groups - others).reshape(-1), rtol=1e-5, atol=1e-6)


# --- LoRA


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_full_rank_adapters_equal_full_training(start, x64):
    """y = x (W + (α / r) A B) with A orthonormal and r the width: dL/dB · r / α = Aᵀ dL/dW, so A of
    that is dL/dW itself.
    """
    width, features, alpha = 5, 3, 20.0
    rng = np.random.default_rng(1)
    x, kernel = (
        jnp.asarray(rng.normal(size=(7, width))),
        jnp.asarray(rng.normal(size=(width, features))),
    )
    a = jnp.asarray(np.linalg.qr(rng.normal(size=(width, width)))[0])
    # 0 as at the start of training, and later
    b = jnp.asarray(start * rng.normal(size=(width, features)))
    merged = kernel + (alpha / width) * a @ b
    loss = lambda layer: lambda params: jnp.sum(jnp.sin(layer.apply({"params": params}, x)))
    adapted = loss(Linear(features, dtype=jnp.float64, rank=width, alpha=alpha))
    full = loss(Linear(features, dtype=jnp.float64))
    value, slopes = jax.value_and_grad(adapted)({"kernel": kernel, "lora_a": a, "lora_b": b})
    full_value, full_slopes = jax.value_and_grad(full)({"kernel": merged})
    np.testing.assert_allclose(value, full_value, rtol=1e-12)
    np.testing.assert_allclose(
        slopes["lora_b"] * width / alpha, a.T @ full_slopes["kernel"], rtol=1e-12
    )
    np.testing.assert_allclose(
        a @ slopes["lora_b"] * width / alpha, full_slopes["kernel"], rtol=1e-12
    )
