"""A net that reads a text and tells its class: layers of one's choice over embeddings,
pooling, a dense layer.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxppo.errors import UserError
from jaxppo.models import cells
from jaxppo.models.layers import dropped

LOW = -1e30  # below every number of a layer, and finite


class Classifier(nn.Module):
    """Logits of a text: `layers` one after the other, then their maximum and mean over
    the text, and a dense layer.

    convolution   of several widths side by side (Kim 2014, https://arxiv.org/abs/1408.5882)
    pool          the larger one of every two neighbours: half as many tokens
    gru, lstm     a recurrent layer (with the two above: Zhou et al. 2015, https://arxiv.org/abs/1511.08630)
    dense         of each token alone

    One class is the logit that a text is positive, [B]; several are one logit each, [B
    C]. Padding, behind a text, changes nothing. Raises UserError for another layer.
    """

    features: int = 64
    widths: tuple[int, ...] = (1, 2, 3)
    dropout: float = 0.3
    layers: tuple[str, ...] = ("convolution",)
    classes: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"], *, dropout_key=None
    ) -> Float[Array, "B"] | Float[Array, "B C"]:
        drop = lambda x, number: dropped(x, self.dropout, dropout_key, number)
        # Embeddings of a language model have a few very large directions; a fixed scale
        # would let them rule.
        x = drop(nn.LayerNorm(name="norm")(x), 0)
        for number, kind in enumerate(self.layers):
            if kind not in LAYERS:
                raise UserError(
                    f"a classifier has no layer {kind!r}: choose among {', '.join(LAYERS)}"
                )
            x = drop(x, 2 + number) if number else x
            x, mask = LAYERS[kind](self, x * mask[..., None], mask, f"_{number}" if number else "")
        y = nn.relu(nn.Dense(self.features, name="dense")(drop(self.pooled(x, mask), 1)))
        out = nn.Dense(self.classes, name="out")(drop(y, 2))
        return out[:, 0] if self.classes == 1 else out

    def pooled(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B K"]:
        """Maximum and mean over the text, in turn for each `features` numbers; 0 for a
        text without tokens.
        """
        parts = x.shape[-1] // self.features if x.shape[-1] % self.features == 0 else 1
        both = jnp.stack([_largest(x, mask), (x * mask[..., None]).sum(1) / _count(mask)], 1)
        return both.reshape(x.shape[0], 2, parts, -1).swapaxes(1, 2).reshape(x.shape[0], -1)


def _convolution(net: Classifier, x, mask, suffix: str):
    # as one matrix product over shifted copies: XLA's own is many times slower on a CPU
    shifted = [jnp.pad(x, ((0, 0), (0, i), (0, 0)))[:, i:] for i in range(max(net.widths))]
    dense = lambda width: nn.Dense(net.features, name=f"conv{width}{suffix}")
    return jnp.concatenate(
        [nn.relu(dense(n)(jnp.concatenate(shifted[:n], -1))) for n in net.widths], -1
    ), mask


def _pool(net: Classifier, x, mask, suffix: str):
    rows, odd = x.shape[0], x.shape[1] % 2
    x, mask = (
        jnp.pad(x, ((0, 0), (0, odd), (0, 0))),
        jnp.pad(mask, ((0, 0), (0, odd))).reshape(rows, -1, 2),
    )
    pairs = x.reshape(rows * mask.shape[1], 2, -1)
    return _largest(pairs, mask.reshape(-1, 2)).reshape(rows, mask.shape[1], -1), mask.any(2)


def _recurrent(net: Classifier, x, mask, suffix: str, *, kind: str):
    x = nn.Dense(net.features, name=f"into_{kind}{suffix}")(x)
    rest = tuple(jnp.zeros((x.shape[0], net.features)) for _ in range(cells.CELLS[kind][2]))
    return cells.Layer(kind, jnp.float32, name=f"{kind}{suffix}")(x, mask, rest)[0], mask


def _dense(net: Classifier, x, mask, suffix: str):
    return nn.relu(nn.Dense(net.features, name=f"each{suffix}")(x)), mask


# layer(net, x [B T D] with 0 at padding, mask [B T], end of its parameters' names) ->
# (x [B T' D'], mask [B T'])
LAYERS = {
    "convolution": _convolution,
    "pool": _pool,
    "gru": partial(_recurrent, kind="gru"),
    "lstm": partial(_recurrent, kind="lstm"),
    "dense": _dense,
}


def _largest(x, mask):
    """The maximum over tokens, 0 where there are none."""
    return jnp.where(mask.any(1, keepdims=True), jnp.where(mask[..., None], x, LOW).max(1), 0.0)


def _count(mask):
    return jnp.maximum(mask.sum(1, keepdims=True), 1).astype(jnp.float32)
