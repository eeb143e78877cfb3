import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxppo import models
from jaxppo.models import cells, shapes

SIGMOID = lambda x: 1 / (1 + np.exp(-x))


def test_a_gru_by_hand():
    """One unit: r = σ(1 − 1) = ½, z = σ(0 + 1), n = tanh(.5 + ½ · 2)."""
    (new,) = cells.gru(
        (jnp.array([[3.0]]),), jnp.array([[1.0, 0.0, 0.5]]), jnp.array([[-1.0, 1.0, 2.0]])
    )
    z = SIGMOID(1.0)
    assert float(new[0, 0]) == pytest.approx((1 - z) * np.tanh(1.5) + z * 3.0, rel=1e-6)


def test_an_lstm_by_hand():
    """i = σ(1), f = σ(2), g = tanh(3), o = σ(4), with the input's and the state's parts added
    up.
    """
    gates, recurrent_part = jnp.array([[1.0, 1.0, 1.0, 1.0]]), jnp.array([[0.0, 1.0, 2.0, 3.0]])
    hidden, cell = cells.lstm((jnp.array([[9.0]]), jnp.array([[0.5]])), gates, recurrent_part)
    want = SIGMOID(2) * 0.5 + SIGMOID(1) * np.tanh(3)
    assert float(cell[0, 0]) == pytest.approx(want, rel=1e-6)
    assert float(hidden[0, 0]) == pytest.approx(SIGMOID(4) * np.tanh(want), rel=1e-6)


@pytest.mark.parametrize(("kind", "gates"), [("gru", 3), ("lstm", 4)])
def test_number_of_parameters(kind, gates):
    """Width 8, two layers: norm 8, input 8 x 8g + 8g, recurrent 8 x 8g; embedding 5 x 8, last norm
    8, value 8 + 1.
    """
    model = models.make(shapes.network(kind, vocab_size=5, width=8))
    total = sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
    assert total == 2 * (8 + 2 * 64 * gates + 8 * gates) + 40 + 8 + 9


def test_padding_does_not_change_the_state():
    model = models.make(shapes.network("gru", vocab_size=5, width=8))
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jnp.array([[1, 2]])
    apply = jax.jit(model.apply)
    _, before = apply(params, tokens, tokens > 0, cache=model.init_cache(1, 9))
    _, after = apply(params, tokens, tokens < 0, cache=before)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert before[0][0].any()
