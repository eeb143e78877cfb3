from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo.models import attention


def test_attention_mask():
    mask = jnp.array([[False, True, True, True]])
    f, t = False, True
    assert attention.attention_mask(mask, 0, 4, None)[0].tolist() == [
        [f, f, f, f],
        [f, t, f, f],
        [f, t, t, f],
        [f, t, t, t],
    ]
    assert attention.attention_mask(mask, 0, 4, 2)[0].tolist() == [
        [f, f, f, f],
        [f, t, f, f],
        [f, t, t, f],
        [f, f, t, t],
    ]
    # one token in slot 2
    assert attention.attention_mask(mask, 2, 1, None)[0].tolist() == [[f, t, t, f]]


def test_rotary_scores_depend_only_on_distances():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 4)), jnp.float32) for _ in range(2))

    def score(i, j):
        turn = lambda x, at: attention.apply_rotary(
            x, attention.rotary_embedding(jnp.array([[at]]), toys.LLAMA)
        )
        return float((turn(q, i) * turn(k, j)).sum())

    assert score(9, 4) == pytest.approx(score(5, 0), abs=1e-5)
    assert score(5, 0) != pytest.approx(score(6, 0), abs=1e-3)
    assert score(3, 3) == pytest.approx(float((q * k).sum()), abs=1e-5)


def test_layers_with_a_window_rotate_by_their_own_frequency():
    """Pairs turn by θ^0 = 1 and θ^(−1/2) a token; 8 times slower where they are scaled."""
    shape = replace(toys.LLAMA, rope_theta=1e4, rope_scaling=(8.0,), window_theta=100.0)
    for window, turns in ((None, [1 / 8, 0.01 / 8]), (5, [1, 0.1])):
        cos, sin = attention.rotary_embedding(jnp.array([[3]]), shape, window)
        angles = 3 * np.array(turns * 2)
        np.testing.assert_allclose(cos[0, 0, 0], np.cos(angles), rtol=1e-6)
        np.testing.assert_allclose(sin[0, 0, 0], np.sin(angles), rtol=1e-6)


def test_llama3_scaling():
    """Original context 16, low 1, high 4, factor 8: with 64 / 2π and .64 / 2π turns the ends are
    kept and divided.
    """
    frequency = jnp.array([4.0, 0.04, 1.0])
    out = attention._llama3_scaling(frequency, 8.0, 1.0, 4.0, 16.0)
    turns = 16 * 1.0 / (2 * np.pi)  # 2.546: between, so blended
    blend = (turns - 1) / 3
    np.testing.assert_allclose(out, [4.0, 0.005, blend + (1 - blend) / 8], rtol=1e-5)


def test_grouped_heads_are_repeated_heads():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, h, 3, 4)), jnp.float32) for h in (4, 2, 2))
    visible = jnp.broadcast_to(jnp.tril(jnp.ones((3, 3), bool)), (2, 3, 3))
    got = attention.attend(q, k, v, visible)
    np.testing.assert_allclose(
        got, attention.attend(q, k.repeat(2, 1), v.repeat(2, 1), visible), atol=1e-6
    )
    # the first sees itself
    np.testing.assert_allclose(got[:, :, 0], v.repeat(2, 1)[:, :, 0], atol=1e-6)


def test_capped_scores_by_hand():
    """Scores 2 and −2 of a cap 1 are ±tanh 2 = ±.964: weights 1 / (1 + e^∓1.928)."""
    q = jnp.full((1, 1, 1, 4), 1.0)
    k = jnp.stack([jnp.full(4, 1.0), jnp.full(4, -1.0)])[None, None]  # q · k / √4
    v = jnp.stack([jnp.full(4, 1.0), jnp.full(4, 0.0)])[None, None]
    got = attention.attend(q, k, v, jnp.ones((1, 1, 2), bool), 1.0)
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-2 * np.tanh(2.0))), rtol=1e-6)


@pytest.mark.ci
def test_a_cap_far_above_the_scores_changes_nothing(x64):
    """Neither the output nor its gradient, which has another backward pass."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, h, 3, 4))) for h in (4, 2, 2))
    visible = jnp.broadcast_to(jnp.tril(jnp.ones((3, 3), bool)), (2, 3, 3))
    total = lambda cap: lambda q, k, v: jnp.sin(attention.attend(q, k, v, visible, cap)).sum()
    one, other = (jax.grad(total(cap), (0, 1, 2))(q, k, v) for cap in (None, 1e5))
    toys.assert_close(one, other, atol=1e-8)


def test_a_query_that_sees_nothing_is_finite():
    ones = jnp.ones((1, 1, 2, 4))
    visible = jnp.array([[[False, False], [True, True]]])
    gradient = jax.grad(lambda q: attention.attend(q, ones, ones, visible).sum())(ones)
    assert np.isfinite(gradient).all()


def test_attend_is_float32_inside_and_float64_with_float64(x64):
    for dtype, expected in (
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64),
    ):
        ones = jnp.ones((1, 1, 2, 4), dtype)
        assert attention.attend(ones, ones, ones, jnp.ones((1, 2, 2), bool)).dtype == expected


def test_fused_attention_equals_attend():
    """With the XLA implementation; cuDNN needs a GPU."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, h, 4, 8)), jnp.float32) for h in (4, 2, 2))
    visible = attention.attention_mask(
        jnp.array([[False, True, True, True], [True] * 4]), 0, 4, None
    )
    got = attention.fused_attention(q, k, v, visible, implementation="xla")
    want = attention.attend(q, k, v, visible)
    np.testing.assert_allclose(got[1], want[1], atol=1e-6)
    # the padding's own query sees nothing
    np.testing.assert_allclose(got[0, :, 1:], want[0, :, 1:], atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "keys", "dtype", "backend", "fits"),
    [
        ((2, 4, 6, 64), 6, "bfloat16", "gpu", True),
        ((2, 4, 6, 64), 6, "float16", "gpu", True),
        ((2, 4, 6, 64), 6, "float32", "gpu", False),
        ((2, 4, 6, 64), 6, "bfloat16", "cpu", False),
        ((2, 4, 6, 60), 6, "bfloat16", "gpu", False),
        ((2, 4, 6, 256), 6, "bfloat16", "gpu", False),
        ((2, 4, 5, 64), 6, "bfloat16", "gpu", False),
        ((2, 4, 6, 64), 7, "bfloat16", "gpu", False),
        ((2, 4, 1, 64), 8, "bfloat16", "gpu", False),
    ],
)
def test_which_shapes_fit_cudnn(shape, keys, dtype, backend, fits):
    assert attention.fits_cudnn(shape, keys, dtype, backend) == fits


def test_cudnn_is_used_on_a_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention, "has_cudnn_attention", lambda device: True)
    monkeypatch.setattr(
        attention,
        "fused_attention",
        lambda *x, implementation: asked.append(implementation) or jnp.zeros(x[0].shape),
    )
    x = jnp.ones((1, 2, 4, 8), jnp.bfloat16)
    attention.attend(x, x, x, jnp.ones((1, 4, 4), bool))
    assert asked == ["cudnn"]


@pytest.mark.parametrize(
    ("capability", "new"),
    [
        ("7.5", False),
        ("8.0", True),
        ("9.0", True),
        ("10.0", True),
        (None, False),
        ("gfx90a", False),
    ],
)
def test_older_gpus_have_no_cudnn_attention(capability, new):
    """A T4 has 7.5; a CPU has none, and AMD GPUs have a name."""
    assert attention.has_cudnn_attention(SimpleNamespace(compute_capability=capability)) == new
    assert not attention.has_cudnn_attention(SimpleNamespace())


@pytest.mark.parametrize("long", [7, 6], ids=["weights kept", "weights computed again"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_attention_is_that_of_its_plain_form(dtype, long, monkeypatch):
    """Two rows, four query heads of two key heads, six keys; one query sees nothing."""
    monkeypatch.setattr(attention, "LONG", long)
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.standard_normal((2, heads, 6, 4)), dtype)
    visible = jnp.asarray(rng.random((2, 6, 6)) < 0.6).at[0, 2].set(False)

    def plain(q, k, v):
        k, v = (jnp.repeat(x, 2, 1) for x in (k, v))
        scores = jnp.einsum("bhqd,bhsd->bhqs", q, k, preferred_element_type=jnp.float32) / 2
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -1e30)).astype(dtype)
        return jnp.einsum("bhqs,bhsd->bhqd", weights, v, preferred_element_type=jnp.float32)

    args = draw(4), draw(2), draw(2)
    loss = lambda fn: lambda *args: jnp.sin(fn(*args)).sum()
    want = jax.jit(jax.value_and_grad(loss(plain), (0, 1, 2)))(*args)
    got = jax.jit(
        jax.value_and_grad(loss(lambda *args: attention.attend(*args, visible)), (0, 1, 2))
    )(*args)
    tolerance = 1e-5 if dtype == jnp.float32 else 4e-2
    toys.assert_close(
        *(jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in (got, want)),
        atol=tolerance,
    )
    assert [x.dtype for x in got[1]] == [dtype] * 3


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("long", [8, 7], ids=["weights kept", "weights computed again"])
def test_causal_attention_in_blocks_is_attention(long, cap, monkeypatch, x64):
    """Seven queries in blocks of three, four heads of two key heads; query 4 sees nothing."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, heads, 7, 4))) for heads in (4, 2, 2))
    visible = jnp.tril(jnp.asarray(rng.random((2, 7, 7)) < 0.7)).at[0, 4].set(False)
    seen = visible.any(2)[:, None, :, None]  # what the others see is defined
    monkeypatch.setattr(attention, "LONG", long)

    def run(causal):
        def loss(q, k, v):
            out = attention.attend(q, k, v, visible, cap, causal=causal)
            out = jnp.where(seen, out, 0.0)
            return jnp.sin(out).sum(), out

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

    want = run(causal=False)
    monkeypatch.setattr(attention, "LEAST_BLOCK", 2)
    assert attention.block_ends(7) == (3, 6, 7)
    toys.assert_close(run(causal=True), want, atol=1e-12)


def test_long_rows_keep_no_weights_for_the_backward_pass(monkeypatch):
    q = jnp.ones((2, 1, 6, 4))
    visible = jnp.ones((2, 6, 6), bool)

    def kept():
        _, backward = jax.vjp(lambda q: attention.attend(q, q, q, visible).sum(), q)
        return [x.shape for x in jax.tree.leaves(backward) if x.dtype == jnp.float32]

    assert (2, 1, 6, 6) in kept()
    monkeypatch.setattr(attention, "LONG", 6)
    assert (2, 1, 6, 6) not in kept()


def test_second_derivatives_through_weights_that_are_computed_again(monkeypatch, x64):
    """As TRPO takes them: reverse over reverse."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((1, 2, 3, 4)))
    visible = jnp.tril(jnp.ones((1, 3, 3), bool))

    def product(q):  # of the Hessian and a vector
        loss = lambda q: jnp.sin(attention.attend(q, q, q, visible)).sum()
        return jax.grad(lambda q: (jax.grad(loss)(q) * jnp.cos(q)).sum())(q)

    want = product(q)
    monkeypatch.setattr(attention, "LONG", 3)
    np.testing.assert_allclose(product(q), want, rtol=1e-12, atol=1e-12)
