"""A text classifier: layers over embeddings, pooling, and a dense layer."""

from functools import partial
from typing import cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxppo.errors import UserError
from jaxppo.models import cells
from jaxppo.models.layers import dropout
from jaxppo.types import Params

LOW = -1e30  # finite, and below every output of a layer


class Classifier(nn.Module):
    """Logits of a text: `layers`, maximum and mean over the text, a dense layer.

    convolution   several widths in parallel (https://arxiv.org/abs/1408.5882)
    pool          the maximum of every two neighbours: half as many tokens
    gru, lstm     a recurrent layer (after the two above: https://arxiv.org/abs/1511.08630)
    dense         a dense layer on each token

    With one class the result [B] is the logit of a positive text. Padding is on the
    right. Raises UserError for an unknown layer.
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
        drop = lambda x, number: dropout(x, self.dropout, dropout_key, number)
        # A few directions of a language model's embeddings would dominate otherwise.
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
        """Maximum and mean, in alternating blocks of `features`; 0 without tokens."""
        parts = x.shape[-1] // self.features if x.shape[-1] % self.features == 0 else 1
        count = jnp.maximum(mask.sum(1, keepdims=True), 1).astype(jnp.float32)
        both = jnp.stack([_maximum(x, mask), (x * mask[..., None]).sum(1) / count], 1)
        return both.reshape(x.shape[0], 2, parts, -1).swapaxes(1, 2).reshape(x.shape[0], -1)


def logits(
    net: Classifier, params: Params, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], **options
) -> Float[Array, "B"] | Float[Array, "B C"]:
    """Logits of texts. params: {"embedding": [V D], "net": the rest}."""
    x = params["embedding"][tokens].astype(jnp.float32)
    return cast(Array, net.apply({"params": params["net"]}, x, mask, **options))


def _convolution(net: Classifier, x, mask, suffix: str):
    # One matrix product over copies: XLA's convolution is many times slower on a CPU.
    shifted = [jnp.pad(x, ((0, 0), (0, i), (0, 0)))[:, i:] for i in range(max(net.widths))]
    dense = lambda n: nn.Dense(net.features, name=f"conv{n}{suffix}")
    each = [nn.relu(dense(n)(jnp.concatenate(shifted[:n], -1))) for n in net.widths]
    return jnp.concatenate(each, -1), mask


def _pool(net: Classifier, x, mask, suffix: str):
    rows, odd = x.shape[0], x.shape[1] % 2
    x = jnp.pad(x, ((0, 0), (0, odd), (0, 0)))
    mask = jnp.pad(mask, ((0, 0), (0, odd))).reshape(rows, -1, 2)
    pairs = x.reshape(rows * mask.shape[1], 2, -1)
    return _maximum(pairs, mask.reshape(-1, 2)).reshape(rows, mask.shape[1], -1), mask.any(2)


def _recurrent(net: Classifier, x, mask, suffix: str, *, kind: str):
    x = nn.Dense(net.features, name=f"into_{kind}{suffix}")(x)
    zeros = cells.init_state(kind, x.shape[0], net.features)
    return cells.Layer(kind, jnp.float32, name=f"{kind}{suffix}")(x, mask, zeros)[0], mask


def _dense(net: Classifier, x, mask, suffix: str):
    return nn.relu(nn.Dense(net.features, name=f"each{suffix}")(x)), mask


# layer(net, x [B T D] with 0 at padding, mask [B T], suffix of its parameters' names)
# -> (x [B T' D'], mask [B T'])
LAYERS = {
    "convolution": _convolution,
    "pool": _pool,
    "gru": partial(_recurrent, kind="gru"),
    "lstm": partial(_recurrent, kind="lstm"),
    "dense": _dense,
}


def _maximum(x, mask):
    """The maximum over tokens, 0 where there are none."""
    return jnp.where(mask.any(1, keepdims=True), jnp.where(mask[..., None], x, LOW).max(1), 0.0)
