"""A text classifier whose score is a reward in the graph: frozen embedding -> convolution -> pooling -> dense -> one number.

It is trained on labelled texts by `fit`, in seconds, and then reads sampled tokens inside the compiled step.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxppo.types import Params, RewardFn, Rollout


class Classifier(nn.Module):
    """Logit that a text is positive. Convolutions of several widths, each pooled by its maximum over the text (Kim 2014,
    https://arxiv.org/abs/1408.5882), then a dense layer."""

    features: int = 64
    widths: tuple[int, ...] = (1, 2, 3)
    dropout: float = 0.3

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"], *, dropout_key=None) -> Float[Array, "B"]:
        drop = lambda x, n: x if dropout_key is None else _dropout(x, self.dropout, jax.random.fold_in(dropout_key, n))
        # Embeddings of a language model have a few very large directions; a fixed scale would let them rule.
        x = nn.LayerNorm(name="norm")(x)
        x = drop(x, 0) * mask[..., None]
        pooled = []
        for width in self.widths:
            # a convolution as one matrix product over shifted copies: XLA's own is many times slower on a CPU
            shifted = jnp.concatenate([jnp.pad(x, ((0, 0), (0, i), (0, 0)))[:, i:] for i in range(width)], -1)
            y = nn.relu(nn.Dense(self.features, name=f"conv{width}")(shifted))
            pooled += [jnp.where(mask[..., None], y, 0.0).max(1), (y * mask[..., None]).sum(1) / _count(mask)]
        y = nn.relu(nn.Dense(self.features, name="dense")(drop(jnp.concatenate(pooled, -1), 1)))
        return nn.Dense(1, name="out")(drop(y, 2))[:, 0]


def _count(mask):
    return jnp.maximum(mask.sum(1, keepdims=True), 1).astype(jnp.float32)


def _dropout(x, rate, key):
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0.0)


def logits(net: Classifier, params: Params, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], **options) -> Float[Array, "B"]:
    """Logits of texts. params: {"embedding": [V D] (frozen), "net": the rest}."""
    x = params["embedding"][tokens].astype(jnp.float32)
    return cast(Array, net.apply({"params": params["net"]}, x, mask, **options))


def reward(net: Classifier, *, scale: float = 1.0) -> RewardFn:
    """score = scale · tanh(logit / 2) = scale · (2 p(positive) − 1), of the response alone."""

    def fn(params: Params, rollout: Rollout):
        score = jnp.tanh(logits(net, params, rollout.response, rollout.mask > 0) / 2)
        return scale * score, jnp.ones(score.shape, bool)

    return fn


class Labelled(NamedTuple):
    """Texts with ratings: positive above 0, negative below."""

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
    """Parameters of the net alone; the embedding is the caller's, and frozen."""
    zeros = jnp.zeros((1, 4, embedding.shape[1]))
    return net.init(jax.random.key(seed), zeros, jnp.ones((1, 4), bool))["params"]


def fit(
    net: Classifier,
    embedding: Float[Array, "V D"],
    data: Labelled,
    *,
    seed: int,
    epochs: int = 3,
    batch_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 1e-2,
    say: Callable[[str], None] = lambda text: None,
) -> Params:
    """Train by cross-entropy to the probability sigmoid(rating), with AdamW and linear decay: a rating near 0 asks for no
    opinion and a strong one for a strong opinion, so that the score tells degrees and does not saturate."""
    steps = len(data.tokens) // batch_size
    optimizer = optax.adamw(optax.linear_schedule(lr, 0.0, epochs * steps), weight_decay=weight_decay)

    def loss_fn(params, embedding, tokens, mask, ratings, key):
        out = logits(net, {"embedding": embedding, "net": params}, tokens, mask, dropout_key=key)
        return optax.sigmoid_binary_cross_entropy(out, jax.nn.sigmoid(ratings)).mean()

    @jax.jit
    def epoch(params, opt_state, embedding, data, rows, key):
        def step(carry, rows_and_key):
            params, opt_state = carry
            batch = jax.tree.map(lambda x: x[rows_and_key[0]], data)
            loss, grads = jax.value_and_grad(loss_fn)(params, embedding, *batch, rows_and_key[1])
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        carry, losses = jax.lax.scan(step, (params, opt_state), (rows, jax.random.split(key, len(rows))))
        return *carry, losses.mean()

    params = init(net, embedding, seed=seed)
    opt_state = optimizer.init(params)
    arrays = Labelled(jnp.asarray(data.tokens), jnp.asarray(data.mask), jnp.asarray(data.ratings, jnp.float32))
    for number in range(epochs):
        order = np.random.default_rng([seed, number]).permutation(len(data.tokens))[: steps * batch_size]
        key = jax.random.fold_in(jax.random.key(seed), number + 1)
        params, opt_state, loss = epoch(params, opt_state, embedding, arrays, jnp.asarray(order.reshape(steps, batch_size)), key)
        say(f"reward model: epoch {number + 1}/{epochs}, loss {float(loss):.3f}")
    return params


def accuracy(net: Classifier, params: Params, data: Labelled, *, beyond: float = 0.0) -> float:
    """Share of texts with |rating| > beyond whose logit has the rating's sign."""
    clear = data.rows(np.flatnonzero(np.abs(data.ratings) > beyond))
    out = jax.jit(lambda p, t, m: logits(net, p, t, m))(params, clear.tokens, clear.mask)
    return float(((np.asarray(out) > 0) == (clear.ratings > 0)).mean())
