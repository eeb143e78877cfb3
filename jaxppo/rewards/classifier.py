"""A text classifier whose score is a reward in the graph: embedding -> layers of one's choice -> pooling -> dense -> logits.

It is trained on labelled texts by `fit`, in seconds, and then reads sampled tokens inside the compiled step.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxppo.config import UserError
from jaxppo.models import recurrent
from jaxppo.types import Params, RewardFn, Rollout

LOW = -1e30  # below every number of a layer, and finite


class Classifier(nn.Module):
    """Logits of a text: `layers` one after the other, then their maximum and mean over the text, and a dense layer.

    convolution   of several widths side by side (Kim 2014, https://arxiv.org/abs/1408.5882)
    pool          the larger one of every two neighbours: half as many tokens
    gru, lstm     a recurrent layer (with the two above: Zhou et al. 2015, https://arxiv.org/abs/1511.08630)
    dense         of each token alone

    One class is the logit that a text is positive, [B]; several are one logit each, [B C]. Padding, behind a text, changes
    nothing. Raises UserError for another layer.
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
        drop = lambda x, n: x if dropout_key is None else _dropout(x, self.dropout, jax.random.fold_in(dropout_key, n))
        # Embeddings of a language model have a few very large directions; a fixed scale would let them rule.
        x = drop(nn.LayerNorm(name="norm")(x), 0)
        for number, kind in enumerate(self.layers):
            if kind not in LAYERS:
                raise UserError(f"a classifier has no layer {kind!r}: choose among {', '.join(LAYERS)}")
            x = drop(x, 2 + number) if number else x
            x, mask = LAYERS[kind](self, x * mask[..., None], mask, f"_{number}" if number else "")
        y = nn.relu(nn.Dense(self.features, name="dense")(drop(self.pooled(x, mask), 1)))
        out = nn.Dense(self.classes, name="out")(drop(y, 2))
        return out[:, 0] if self.classes == 1 else out

    def pooled(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B K"]:
        """Maximum and mean over the text, in turn for each `features` numbers; 0 for a text without tokens."""
        parts = x.shape[-1] // self.features if x.shape[-1] % self.features == 0 else 1
        both = jnp.stack([_largest(x, mask), (x * mask[..., None]).sum(1) / _count(mask)], 1)
        return both.reshape(x.shape[0], 2, parts, -1).swapaxes(1, 2).reshape(x.shape[0], -1)


def _convolution(net: Classifier, x, mask, suffix: str):
    # as one matrix product over shifted copies: XLA's own is many times slower on a CPU
    shifted = [jnp.pad(x, ((0, 0), (0, i), (0, 0)))[:, i:] for i in range(max(net.widths))]
    dense = lambda width: nn.Dense(net.features, name=f"conv{width}{suffix}")
    return jnp.concatenate([nn.relu(dense(n)(jnp.concatenate(shifted[:n], -1))) for n in net.widths], -1), mask


def _pool(net: Classifier, x, mask, suffix: str):
    rows, odd = x.shape[0], x.shape[1] % 2
    x, mask = jnp.pad(x, ((0, 0), (0, odd), (0, 0))), jnp.pad(mask, ((0, 0), (0, odd))).reshape(rows, -1, 2)
    pairs = x.reshape(rows * mask.shape[1], 2, -1)
    return _largest(pairs, mask.reshape(-1, 2)).reshape(rows, mask.shape[1], -1), mask.any(2)


def _recurrent(net: Classifier, x, mask, suffix: str, *, kind: str):
    x = nn.Dense(net.features, name=f"into_{kind}{suffix}")(x)
    rest = tuple(jnp.zeros((x.shape[0], net.features)) for _ in range(recurrent.CELLS[kind][2]))
    return recurrent.Layer(kind, jnp.float32, name=f"{kind}{suffix}")(x, mask, rest)[0], mask


def _dense(net: Classifier, x, mask, suffix: str):
    return nn.relu(nn.Dense(net.features, name=f"each{suffix}")(x)), mask


# layer(net, x [B T D] with 0 at padding, mask [B T], end of its parameters' names) -> (x [B T' D'], mask [B T'])
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


def _dropout(x, rate, key):
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0.0)


def logits(
    net: Classifier, params: Params, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], **options
) -> Float[Array, "B"] | Float[Array, "B C"]:
    """Logits of texts. params: {"embedding": [V D], "net": the rest}."""
    x = params["embedding"][tokens].astype(jnp.float32)
    return cast(Array, net.apply({"params": params["net"]}, x, mask, **options))


def reward(net: Classifier, *, scale: float = 1.0) -> RewardFn:
    """score = scale · tanh(logit / 2) = scale · (2 p(positive) − 1), of the response alone. Raises UserError for a net that
    tells several classes apart."""
    if net.classes != 1:
        raise UserError(f"a classifier of {net.classes} classes has no one score: give it classes=1")

    def fn(params: Params, rollout: Rollout):
        score = jnp.tanh(logits(net, params, rollout.response, rollout.mask > 0) / 2)
        return scale * score, jnp.ones(score.shape, bool)

    return fn


class Labelled(NamedTuple):
    """Texts with ratings, positive above 0, negative below; or, for a net of several classes, with their class numbers."""

    tokens: np.ndarray | Array  # Int[N T], padded on the right
    mask: np.ndarray | Array  # Bool[N T]
    ratings: np.ndarray | Array  # Float[N]

    @classmethod
    def encode(
        cls, texts: Sequence[str], ratings: Float[np.ndarray, "N"], encode: Callable[[str], list[int]], *, length: int = 40
    ) -> "Labelled":
        """The first `length` tokens of each text."""
        tokens, mask = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), bool)
        for row, text in enumerate(texts):
            ids = encode(text)[:length]
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return cls(tokens, mask, ratings)

    def rows(self, chosen: Int[np.ndarray, "n"]):
        """Some of the texts."""
        return Labelled(*(x[chosen] for x in self))

    def with_windows(self, *, least: int, most: int, seed: int) -> "Labelled":
        """The texts, and one random window of each with its text's rating: a sampled continuation is a fragment too."""
        rng = np.random.default_rng(seed)
        lengths = np.asarray(self.mask).sum(1)
        starts = (rng.random(len(lengths)) * np.maximum(lengths - least, 0)).astype(int)
        kept = np.minimum(lengths - starts, most)
        column = np.arange(self.tokens.shape[1])[None]
        mask = column < kept[:, None]
        tokens = np.take_along_axis(np.asarray(self.tokens), np.minimum(starts[:, None] + column, self.tokens.shape[1] - 1), 1)
        windows = (np.where(mask, tokens, 0), mask, self.ratings)
        return Labelled(*(np.concatenate([np.asarray(x), y]) for x, y in zip(self, windows, strict=True)))


def init(net: Classifier, embedding: Float[Array, "V D"], *, seed: int) -> Params:
    """Parameters of the net alone; the embedding is the caller's."""
    zeros = jnp.zeros((1, 4, embedding.shape[1]))
    return net.init(jax.random.key(seed), zeros, jnp.ones((1, 4), bool))["params"]


def fit(
    net: Classifier,
    embedding: Float[Array, "V D"],
    data: Labelled,
    *,
    seed: int,
    epochs: int = 3,
    say: Callable[[str], None] = lambda text: None,
    **options,
) -> Params:
    """The net's parameters after `training`, with the embedding frozen."""
    out = init(net, embedding, seed=seed)
    passes = training(net, {"embedding": embedding, "net": out}, lambda _: data, seed=seed, epochs=epochs, **options)
    for number, (params, loss) in enumerate(passes, 1):
        say(f"reward model: epoch {number}/{epochs}, loss {loss:.3f}")
        out = params["net"]
    return out


def training(
    net: Classifier,
    params: Params,
    data: Callable[[int], Labelled],
    *,
    seed: int,
    epochs: int,
    batch_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 1e-2,
    trained: Sequence[str] = ("net",),
) -> Iterator[tuple[Params, float]]:
    """(all parameters, mean loss) after each epoch, for as long as the caller goes on; `data(epoch)` has as many texts in each.

    AdamW with linear decay on the parts `trained` of the parameters. The loss is the cross-entropy to the text's class; of one
    class to the probability sigmoid(rating): a rating near 0 asks for no opinion and a strong one for a strong opinion, so that
    the score tells degrees and does not saturate.
    """
    steps = len(data(0).tokens) // batch_size
    optimizer = optax.adamw(optax.linear_schedule(lr, 0.0, epochs * steps), weight_decay=weight_decay)

    def loss_fn(live, fixed, tokens, mask, ratings, key):
        out = logits(net, {**fixed, **live}, tokens, mask, dropout_key=key)
        if net.classes > 1:
            return optax.softmax_cross_entropy_with_integer_labels(out, ratings.astype(jnp.int32)).mean()
        return optax.sigmoid_binary_cross_entropy(out, jax.nn.sigmoid(ratings)).mean()

    @jax.jit
    def epoch(live, opt_state, fixed, data, rows, key):
        def step(carry, rows_and_key):
            live, opt_state = carry
            batch = jax.tree.map(lambda x: x[rows_and_key[0]], data)
            loss, grads = jax.value_and_grad(loss_fn)(live, fixed, *batch, rows_and_key[1])
            updates, opt_state = optimizer.update(grads, opt_state, live)
            return (optax.apply_updates(live, updates), opt_state), loss

        carry, losses = jax.lax.scan(step, (live, opt_state), (rows, jax.random.split(key, len(rows))))
        return *carry, losses.mean()

    live = {name: params[name] for name in trained}
    fixed = {name: x for name, x in params.items() if name not in trained}
    opt_state = optimizer.init(live)
    for number in range(epochs):
        arrays = Labelled(*(jnp.asarray(x) for x in data(number)))
        order = np.random.default_rng([seed, number]).permutation(len(arrays.tokens))[: steps * batch_size]
        key = jax.random.fold_in(jax.random.key(seed), number + 1)
        live, opt_state, loss = epoch(live, opt_state, fixed, arrays, jnp.asarray(order.reshape(steps, batch_size)), key)
        yield {**fixed, **live}, float(loss)


def accuracy(net: Classifier, params: Params, data: Labelled, *, beyond: float = 0.0) -> float:
    """Share of texts with |rating| > beyond whose logit has the rating's sign; of several classes, that have the largest logit
    at their own, whatever `beyond`."""
    clear = data.rows(np.flatnonzero(np.abs(data.ratings) > beyond)) if net.classes == 1 else data
    out = np.asarray(jax.jit(lambda p, t, m: logits(net, p, t, m))(params, clear.tokens, clear.mask))
    right = (out > 0) == (clear.ratings > 0) if net.classes == 1 else out.argmax(1) == clear.ratings
    return float(right.mean())
