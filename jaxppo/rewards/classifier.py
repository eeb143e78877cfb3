"""A text classifier whose score is a reward in the graph: embedding -> layers of one's
choice -> pooling -> dense -> logits.

Trained on rated texts in seconds (`fit`), it then reads sampled tokens inside the
compiled step. Of several classes, and with an embedding of its own, it is trained as
every supervised stage (`as_model`, `supervised.classes`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxppo.errors import UserError
from jaxppo.models.text_classifier import Classifier
from jaxppo.types import Model, Params, RewardFn, Rollout


def logits(
    net: Classifier, params: Params, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], **options
) -> Float[Array, "B"] | Float[Array, "B C"]:
    """Logits of texts. params: {"embedding": [V D], "net": the rest}."""
    x = params["embedding"][tokens].astype(jnp.float32)
    return cast(Array, net.apply({"params": params["net"]}, x, mask, **options))


_logits = jax.jit(logits, static_argnums=0)


def reward(net: Classifier, *, scale: float = 1.0) -> RewardFn:
    """score = scale · tanh(logit / 2) = scale · (2 p(positive) − 1), of the response
    alone. UserError for several classes.
    """
    if net.classes != 1:
        raise UserError(
            f"a classifier of {net.classes} classes has no one score: give it classes=1"
        )

    def fn(params: Params, rollout: Rollout):
        score = jnp.tanh(logits(net, params, rollout.response, rollout.mask > 0) / 2)
        return scale * score, jnp.ones(score.shape, bool)

    return fn


class Labelled(NamedTuple):
    """Texts with ratings, positive above 0, negative below."""

    tokens: np.ndarray | Array  # Int[N T], padded on the right
    mask: np.ndarray | Array  # Bool[N T]
    ratings: np.ndarray | Array  # Float[N]

    @classmethod
    def encode(
        cls,
        texts: Sequence[str],
        ratings: Float[np.ndarray, "N"],
        encode: Callable[[str], list[int]],
        *,
        length: int = 40,
    ) -> "Labelled":
        """The first `length` tokens of each text."""
        tokens, mask = (
            np.zeros((len(texts), length), np.int32),
            np.zeros((len(texts), length), bool),
        )
        for row, text in enumerate(texts):
            ids = encode(text)[:length]
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return cls(tokens, mask, ratings)

    def rows(self, chosen: Int[np.ndarray, "n"]):
        """Some of the texts."""
        return Labelled(*(x[chosen] for x in self))

    def with_windows(self, *, least: int, most: int, seed: int) -> "Labelled":
        """The texts, and one random window of each with its text's rating: a sampled
        continuation is a fragment too.
        """
        rng = np.random.default_rng(seed)
        lengths = np.asarray(self.mask).sum(1)
        starts = (rng.random(len(lengths)) * np.maximum(lengths - least, 0)).astype(int)
        kept = np.minimum(lengths - starts, most)
        column = np.arange(self.tokens.shape[1])[None]
        mask = column < kept[:, None]
        tokens = np.take_along_axis(
            np.asarray(self.tokens),
            np.minimum(starts[:, None] + column, self.tokens.shape[1] - 1),
            1,
        )
        windows = (np.where(mask, tokens, 0), mask, self.ratings)
        return Labelled(
            *(np.concatenate([np.asarray(x), y]) for x, y in zip(self, windows, strict=True))
        )


def init(
    net: Classifier, embedding: Float[Array, "V D"] | Float[np.ndarray, "V D"], *, seed: int
) -> Params:
    """Parameters of the net alone; the embedding is the caller's."""
    return _init(net, jax.random.key(seed), embedding.shape[1])


def _init(net: Classifier, key: Array, width: int) -> Params:
    return net.init(key, jnp.zeros((1, 4, width)), jnp.ones((1, 4), bool))["params"]


def as_model(net: Classifier, *, vocab_size: int, width: int) -> Model:
    """The net with an embedding that is trained too, as far as a supervised stage asks
    a model: it writes no text.
    """

    def init(key: Array) -> Params:
        one, other = jax.random.split(key)
        return {
            "embedding": 0.1 * jax.random.normal(one, (vocab_size, width)),
            "net": _init(net, other, width),
        }

    def none(*args, **options):
        raise UserError("a net that tells the class of a text writes none")

    no_cache = lambda *args, **options: {}
    return Model(init, no_cache, none, none, none, lambda params: params["embedding"], jnp.float32)


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
    """Parameters of the net (of one class) after so many passes over the texts; the
    embedding stays as it is.

    AdamW with linear decay. The loss is the cross-entropy to the probability
    sigmoid(rating): a rating near 0 asks for no opinion and a strong one for a strong
    opinion, so that the score tells degrees and does not saturate.
    """
    steps = len(data.tokens) // batch_size
    optimizer = optax.adamw(
        optax.linear_schedule(lr, 0.0, epochs * steps), weight_decay=weight_decay
    )

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

        carry, losses = jax.lax.scan(
            step, (params, opt_state), (rows, jax.random.split(key, len(rows)))
        )
        return *carry, losses.mean()

    params = init(net, embedding, seed=seed)
    opt_state, arrays = optimizer.init(params), Labelled(*(jnp.asarray(x) for x in data))
    for number in range(epochs):
        order = np.random.default_rng([seed, number]).permutation(len(arrays.tokens))[
            : steps * batch_size
        ]
        key = jax.random.fold_in(jax.random.key(seed), number + 1)
        rows = jnp.asarray(order.reshape(steps, batch_size))
        params, opt_state, loss = epoch(params, opt_state, embedding, arrays, rows, key)
        say(f"reward model: epoch {number + 1}/{epochs}, loss {float(loss):.3f}")
    return params


def accuracy(net: Classifier, params: Params, data: Labelled, *, beyond: float = 0.0) -> float:
    """Share of texts with |rating| > beyond whose logit has the rating's sign."""
    clear = data.rows(np.flatnonzero(np.abs(data.ratings) > beyond))
    return float(
        (
            (np.asarray(_logits(net, params, clear.tokens, clear.mask)) > 0) == (clear.ratings > 0)
        ).mean()
    )
