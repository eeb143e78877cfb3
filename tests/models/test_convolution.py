import jax
import jax.numpy as jnp
import pytest

from jaxppo import models
from jaxppo.models import convolution, shapes


@pytest.mark.ci
def test_windows_by_hand():
    """Width 1, a window of three; the first token is padding and counts as 0."""
    x = jnp.array([[[9.0], [1.0], [2.0]]])
    attend = jnp.array([[False, True, True]])
    windows, last = convolution.causal_windows(x, attend, jnp.zeros((1, 2, 1)))
    assert windows[0].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2]] and last[0, :, 0].tolist() == [
        1,
        2,
    ]
    windows, last = convolution.causal_windows(jnp.array([[[3.0]]]), jnp.array([[True]]), last)
    assert windows[0].tolist() == [[1, 2, 3]] and last[0, :, 0].tolist() == [2, 3]


def test_windows_have_no_gaps():
    """Between 1 and 2, and after 2, is padding; then comes 4."""
    x = jnp.array([[[1.0], [9.0], [2.0], [9.0]]])
    attend = jnp.array([[True, False, True, False]])
    windows, last = convolution.causal_windows(x, attend, jnp.zeros((1, 2, 1)))
    assert windows[0].tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 2], [0, 0, 0]]
    windows, _ = convolution.causal_windows(jnp.array([[[4.0]]]), jnp.array([[True]]), last)
    assert windows[0].tolist() == [[1, 2, 4]]


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        # two layers of norm 8, value and gate 24 x 8 + 8 each, out 8 x 8 + 8
        ("convolution", 2 * (8 + 2 * 200 + 72)),
        # input 24 x 8 + 8; two layers of norm 8, up 8 x 16 + 16, down 16 x 8 + 8
        ("window", 200 + 2 * (8 + 144 + 136)),
    ],
)
def test_number_of_parameters(kind, own):
    """Outside the body: embedding 5 x 8, last norm 8, value 8 + 1."""
    model = models.make(shapes.network(kind, vocab_size=5, width=8, kernel=3))
    total = sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
    assert total == own + 40 + 8 + 9


@pytest.mark.ci
@pytest.mark.parametrize(("kind", "reach"), [("window", 3), ("convolution", 5)])
def test_receptive_field(kind, reach):
    """Kernel 3: a window of 3; two layers of convolution see 1 + 2 · 2."""
    model = models.make(shapes.network(kind, vocab_size=5, width=8, kernel=3))
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jnp.ones((1, 8), jnp.int32)
    last = jax.jit(lambda tokens: model.apply(params, tokens, tokens > 0)[0][0, -1])
    moved = [bool((last(tokens.at[0, at].set(2)) != last(tokens)).any()) for at in range(8)]
    assert moved == [at >= 8 - reach for at in range(8)]
