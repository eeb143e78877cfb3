import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxppo import kl

ESTIMATORS = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3, "absolute": kl.absolute}


@pytest.mark.parametrize(
    ("name", "value", "slope"),
    [
        # x = −1 − (−3) = 2
        ("k1", 2.0, 1.0),
        ("k2", 2.0, 2.0),  # x² / 2, x
        ("k3", np.exp(-2) + 1, 1 - np.exp(-2)),  # e⁻ˣ − 1 + x, 1 − e⁻ˣ
        ("absolute", 2.0, 1.0),
    ],
)
def test_values_and_slopes(name, value, slope):
    found = jax.value_and_grad(lambda lp: ESTIMATORS[name](lp, jnp.float32(-3)))(jnp.float32(-1))
    np.testing.assert_allclose(found, (value, slope), rtol=1e-6)


@pytest.mark.parametrize("name", ["k2", "k3", "absolute"])
def test_no_gradient_where_the_policies_agree(name):
    found = jax.value_and_grad(lambda lp: ESTIMATORS[name](lp, jnp.float32(-1)))(jnp.float32(-1))
    np.testing.assert_array_equal(found, (0.0, 0.0))


def test_k1_and_k3_are_unbiased_and_k2_has_the_gradient():
    # The expectation over all four tokens, exactly: E[k1] = E[k3] = KL; the gradient of E under
    # fixed samples is KL's for k2.
    with jax.enable_x64(True):
        logits, ref = jnp.array([0.3, -0.2, 0.9, 0.0]), jnp.array([0.0, 0.5, 0.1, -0.4])
        p = jax.nn.softmax(logits)
        expect = lambda f: lambda z: jnp.sum(p * f(jax.nn.log_softmax(z), jax.nn.log_softmax(ref)))
        exact = kl.full(logits, ref)
        np.testing.assert_allclose(expect(kl.k1)(logits), exact, rtol=1e-12)
        np.testing.assert_allclose(expect(kl.k3)(logits), exact, rtol=1e-12)
        gradient = jax.grad(kl.full)(logits, ref)
        np.testing.assert_allclose(jax.grad(expect(kl.k2))(logits), gradient, rtol=1e-12)
        np.testing.assert_allclose(jax.grad(expect(kl.k1))(logits), 0.0, atol=1e-12)
        # biased: the forward KL's
        assert np.abs(jax.grad(expect(kl.k3))(logits) - gradient).max() > 0.01


def test_full():
    # 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75) = 0.5 ln(4 / 3)
    p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    np.testing.assert_allclose(kl.full(p, q), 0.5 * np.log(4 / 3), rtol=1e-6)
    # logits, not log-probs
    np.testing.assert_allclose(kl.full(p + 3.0, q - 2.0), 0.5 * np.log(4 / 3), rtol=1e-6)
    assert kl.full(jnp.zeros((2, 3, 5)), jnp.zeros((2, 3, 5))).shape == (2, 3)


def test_full_ignores_impossible_tokens():
    p, q = jnp.array([0.0, 0.0, -jnp.inf]), jnp.array([0.0, 0.0, 0.0])
    value, gradient = jax.value_and_grad(kl.full)(p, q)
    np.testing.assert_allclose(value, np.log(1.5), rtol=1e-6)  # 2 · 0.5 ln(0.5 / (1 / 3))
    assert np.isfinite(gradient).all()
    both = jnp.array([0.0, 0.0, -jnp.inf])
    assert kl.full(p, both) == 0.0 and np.isfinite(jax.grad(kl.full)(p, both)).all()


def test_forward_and_jensen_shannon():
    """forward: 0.25 ln(0.25 / 0.5) + 0.75 ln(0.75 / 0.5) = 0.75 ln 3 − ln 2. With beta .3 the
    mixture is m = 0.3 (0.25, 0.75) + 0.7 (0.5, 0.5) = (0.425, 0.575).
    """
    p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    np.testing.assert_allclose(kl.forward(p, q), 0.75 * np.log(3) - np.log(2), rtol=1e-5)
    teacher = 0.25 * np.log(0.25 / 0.425) + 0.75 * np.log(0.75 / 0.575)
    policy = 0.5 * np.log(0.5 / 0.425) + 0.5 * np.log(0.5 / 0.575)
    found = kl.jensen_shannon(p + 3.0, q - 2.0, beta=0.3)
    np.testing.assert_allclose(found, 0.3 * teacher + 0.7 * policy, rtol=1e-4)
    assert kl.jensen_shannon(jnp.zeros((2, 3, 5)), jnp.zeros((2, 3, 5))).shape == (2, 3)


def test_jensen_shannon_nears_either_divergence(x64):
    p, q = jnp.array([0.3, -0.2, 0.9]), jnp.array([0.0, 0.5, 0.1])
    for beta, size, divergence in ((1e-6, 1e-6, kl.forward), (1 - 1e-6, 1e-6, kl.full)):
        f = lambda z, beta=beta, size=size: kl.jensen_shannon(z, q, beta=beta) / size
        found, want = jax.value_and_grad(f)(p), jax.value_and_grad(divergence)(p, q)
        np.testing.assert_allclose(found[0], want[0], rtol=1e-4)
        np.testing.assert_allclose(found[1], want[1], atol=1e-4)


@pytest.mark.parametrize("divergence", [kl.full, kl.forward, kl.jensen_shannon])
def test_impossible_tokens_are_no_nan(divergence):
    """Both give 1/2 to each of two tokens, the policy or both none to others."""
    none = -jnp.inf
    p, q = jnp.array([0.0, 0.0, none, none]), jnp.array([1.0, 1.0, none, none])
    value, gradient = jax.value_and_grad(divergence)(p, q)
    np.testing.assert_allclose([value, *gradient], 0.0, atol=1e-6)
    if divergence is not kl.forward:  # infinite, where the policy cannot do what the teacher does
        both = jax.value_and_grad(divergence)(p, jnp.array([1.0, 1.0, 1.0, none]))
        assert np.isfinite(both[0]) and both[0] > 0.1 and np.isfinite(both[1]).all()


def test_straight_through():
    f = lambda x: kl.straight_through(kl.k3(x, jnp.float32(0)), kl.k2(x, jnp.float32(0)))
    value, slope = jax.value_and_grad(f)(jnp.float32(0.7))
    assert value == kl.k3(jnp.float32(0.7), jnp.float32(0)) and slope == jnp.float32(0.7)


@pytest.mark.parametrize(
    ("nats", "expected"),
    [
        (6.0, 0.2),  # on target: no change
        (6.6, 0.2 * 1.001),  # 10 % above: 1 + 0.1 · 100 / 10000
        (60.0, 0.2 * 1.002),  # held at 20 %
        (0.0, 0.2 * 0.998),
    ],
)
def test_adapt(nats, expected):
    np.testing.assert_allclose(
        kl.adapt(0.2, nats, target=6.0, horizon=10_000.0, num_rows=100), expected, rtol=1e-6
    )


def test_adapt_under_jit_with_arrays():
    f = jax.jit(lambda c, x, n: kl.adapt(c, x, target=6.0, horizon=10_000.0, num_rows=n))
    with jax.numpy_dtype_promotion("strict"):
        out = f(jnp.float32(0.2), jnp.float32(60), jnp.float32(100))
    np.testing.assert_allclose(out, 0.2 * 1.002, rtol=1e-6)


@jax.jit
def everything(lp, ref):
    return [jax.value_and_grad(lambda x, f=f: jnp.sum(f(x, ref)))(lp) for f in ESTIMATORS.values()]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-1e4, 0, width=32), min_size=4, max_size=4))
def test_extreme_values_stay_finite_and_not_negative(xs):
    a, b = np.array(xs[:2], np.float32), np.array(xs[2:], np.float32)
    for (value, gradient), name in zip(everything(a, b), ESTIMATORS, strict=True):
        assert np.isfinite(value) and np.isfinite(gradient).all()
        assert name == "k1" or value >= 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtype_is_kept(dtype):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        x = jnp.ones((2, 3), dtype)
        for f in (*ESTIMATORS.values(), kl.full, kl.straight_through):
            assert jax.eval_shape(f, x, x).dtype == dtype
