"""A text classifier as a reward in the program, trained on rated texts in seconds.

`fit` trains it on a fixed embedding. A classifier of several classes, or with its own
embedding, is trained like a language model (`as_model`, `supervised.cross_entropy`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxppo.errors import UserError
from jaxppo.models.text_classifier import Classifier, logits
from jaxppo.types import Model, Params, RewardFn, Rollout

_logits = jax.jit(logits, static_argnums=0)


def reward(net: Classifier, *, scale: float = 1.0) -> RewardFn:
    """score = scale · tanh(logit / 2) = scale · (2 p(positive) − 1) of the response.

    Raises UserError for several classes.
    """
    if net.classes != 1:
        raise UserError(f"a classifier of {net.classes} classes cannot be a reward: use classes=1")

    def fn(params: Params, rollout: Rollout):
        score = jnp.tanh(logits(net, params, rollout.response, rollout.mask > 0) / 2)
        return scale * score, jnp.ones(score.shape, bool)

    return fn


class LabelledTexts(NamedTuple):
    """Texts with ratings, positive above 0."""

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
    ) -> "LabelledTexts":
        """Encode texts and keep the first `length` tokens of each."""
        tokens = np.zeros((len(texts), length), np.int32)
        mask = np.zeros((len(texts), length), bool)
        for row, text in enumerate(texts):
            ids = encode(text)[:length]
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return cls(tokens, mask, ratings)

    def rows(self, chosen: Int[np.ndarray, "n"]) -> "LabelledTexts":
        """Return the chosen rows."""
        return LabelledTexts(*(x[chosen] for x in self))

    def with_windows(self, *, least: int, most: int, seed: int) -> "LabelledTexts":
        """Add one random window of each text, with the text's rating: sampled
        continuations are fragments too.
        """
        rng = np.random.default_rng(seed)
        width = self.tokens.shape[1]
        lengths = np.asarray(self.mask).sum(1)
        starts = (rng.random(len(lengths)) * np.maximum(lengths - least, 0)).astype(int)
        slots = np.arange(width)[None]
        mask = slots < np.minimum(lengths - starts, most)[:, None]
        chosen = np.minimum(starts[:, None] + slots, width - 1)
        tokens = np.where(mask, np.take_along_axis(np.asarray(self.tokens), chosen, 1), 0)
        pairs = zip(self, (tokens, mask, self.ratings), strict=True)
        return LabelledTexts(*(np.concatenate([np.asarray(x), y]) for x, y in pairs))


def init(
    net: Classifier, embedding: Float[Array, "V D"] | Float[np.ndarray, "V D"], *, seed: int
) -> Params:
    """Initialise the parameters of the net, without the embedding."""
    return _init(net, jax.random.key(seed), embedding.shape[1])


def _init(net: Classifier, key: Array, width: int) -> Params:
    return net.init(key, jnp.zeros((1, 4, width)), jnp.ones((1, 4), bool))["params"]


def as_model(net: Classifier, *, vocab_size: int, width: int) -> Model:
    """Wrap the net and a trainable embedding as a `Model` for supervised training.

    It generates no text.
    """

    def init(key: Array) -> Params:
        one, other = jax.random.split(key)
        embedding = 0.1 * jax.random.normal(one, (vocab_size, width))
        return {"embedding": embedding, "net": _init(net, other, width)}

    def fail(*args, **options):
        raise UserError("a text classifier cannot generate text")

    no_cache = lambda *args, **options: {}
    return Model(init, no_cache, fail, fail, fail, lambda params: params["embedding"], jnp.float32)


def fit(
    net: Classifier,
    embedding: Float[Array, "V D"],
    data: LabelledTexts,
    *,
    seed: int,
    epochs: int = 3,
    batch_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 1e-2,
    report: Callable[[str], None] = lambda line: None,
) -> Params:
    """Train the net (of one class) on a fixed embedding; return its parameters.

    AdamW with linear decay. The target probability is sigmoid(rating): strong ratings
    ask for confident scores and weak ones do not, so the score is graded and does not
    saturate. `report` gets one line per epoch.
    """
    steps = len(data.tokens) // batch_size
    schedule = optax.linear_schedule(lr, 0.0, epochs * steps)
    optimizer = optax.adamw(schedule, weight_decay=weight_decay)

    def loss_fn(params, embedding, tokens, mask, ratings, key):
        out = logits(net, {"embedding": embedding, "net": params}, tokens, mask, dropout_key=key)
        return optax.sigmoid_binary_cross_entropy(out, jax.nn.sigmoid(ratings)).mean()

    @jax.jit
    def train_epoch(params, opt_state, embedding, data, rows, key):
        def step(carry, rows_and_key):
            params, opt_state = carry
            batch = jax.tree.map(lambda x: x[rows_and_key[0]], data)
            loss, grads = jax.value_and_grad(loss_fn)(params, embedding, *batch, rows_and_key[1])
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        keys = jax.random.split(key, len(rows))
        carry, losses = jax.lax.scan(step, (params, opt_state), (rows, keys))
        return *carry, losses.mean()

    params = init(net, embedding, seed=seed)
    opt_state, arrays = optimizer.init(params), LabelledTexts(*map(jnp.asarray, data))
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(arrays.tokens))
        rows = jnp.asarray(order[: steps * batch_size].reshape(steps, batch_size))
        key = jax.random.fold_in(jax.random.key(seed), epoch + 1)
        params, opt_state, loss = train_epoch(params, opt_state, embedding, arrays, rows, key)
        report(f"reward model: epoch {epoch + 1}/{epochs}, loss {float(loss):.3f}")
    return params


def accuracy(net: Classifier, params: Params, data: LabelledTexts, *, beyond: float = 0.0) -> float:
    """Return how often logit and rating have the same sign where |rating| > beyond."""
    clear = data.rows(np.flatnonzero(np.abs(data.ratings) > beyond))
    positive = np.asarray(_logits(net, params, clear.tokens, clear.mask)) > 0
    return float((positive == (clear.ratings > 0)).mean())
