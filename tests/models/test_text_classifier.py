import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxppo.errors import UserError
from jaxppo.models import text_classifier
from jaxppo.models.text_classifier import Classifier

LENGTHS = np.array([8, 5, 1, 2, 7, 4])
MASK = jnp.asarray(np.arange(8)[None] < LENGTHS[:, None])
X = jnp.asarray(np.random.default_rng(0).standard_normal((6, 8, 6)), jnp.float32)


def params_of(net: Classifier):
    return jax.jit(net.init)(jax.random.key(0), X, MASK)["params"]


CHOICES = [
    (),
    ("convolution",),
    ("convolution", "pool", "gru"),
    ("dense", "pool", "pool"),
    ("lstm", "convolution", "pool"),
]


@pytest.mark.ci
@pytest.mark.parametrize("layers", CHOICES, ids=str)
def test_padding_has_no_effect(layers):
    """Three more slots with any values; `pool` pairs one of them with a text's last token."""
    net = Classifier(features=6, widths=(1, 2), layers=layers, classes=3)
    # noise on biases too: padding is then not 0 after a layer, and outputs have both signs
    rng = np.random.default_rng(0)
    noisy = lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32)
    params = jax.tree.map(noisy, params_of(net))
    read = jax.jit(lambda x, mask: net.apply({"params": params}, x, mask))
    want = read(X, MASK)
    assert want.shape == (6, 3) and np.ptp(np.asarray(want), 0).min() > 1e-3
    wider = jnp.pad(
        jnp.where(MASK[..., None], X, 9.0), ((0, 0), (0, 3), (0, 0)), constant_values=7.0
    )
    np.testing.assert_allclose(read(wider, jnp.pad(MASK, ((0, 0), (0, 3)))), want, atol=1e-5)
    assert np.isfinite(read(wider, jnp.zeros(wider.shape[:2], bool))).all()


def test_every_layer_has_its_parameters():
    """Embeddings 6 wide, features 4. Convolutions of width 1 and 2: 6 x 4 + 4 and 12 x 4 + 4; gru:
    8 x 4 + 4 into it, 4 x 12 + 12 and 4 x 12 of its own; maximum and mean 8 wide: 8 x 4 + 4; three
    classes: 4 x 3 + 3; norm 12.
    """
    net = Classifier(features=4, widths=(1, 2), layers=("convolution", "pool", "gru"), classes=3)
    params = params_of(net)
    assert set(params) == {"norm", "conv1", "conv2", "into_gru_2", "gru_2", "dense", "out"}
    assert sum(x.size for x in jax.tree.leaves(params)) == 28 + 52 + 36 + 108 + 36 + 15 + 12


def test_pool_takes_the_larger_of_two_neighbours():
    """Row 0: 1 and 5, 2 and padding. Row 1: −3 alone, then a pair that is padding."""
    x = jnp.array([[[1.0], [5.0], [2.0]], [[-3.0], [9.0], [9.0]]])
    mask = jnp.array([[True, True, True], [True, False, False]])
    out, there = text_classifier.LAYERS["pool"](Classifier(), x, mask, "")
    assert out[..., 0].tolist() == [[5, 2], [-3, 0]]
    assert there.tolist() == [[True, True], [True, False]]


def test_an_unknown_layer_is_refused():
    with pytest.raises(
        UserError, match="no layer 'attention': choose among convolution, pool, gru, lstm, dense"
    ):
        params_of(Classifier(layers=("attention",)))
