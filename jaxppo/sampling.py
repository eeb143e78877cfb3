"""Process logits (temperature, top-k, top-p, `min_tokens`), draw tokens from them, and
tell when a response ends. Sampler and scorer use the same processors, so that they
cannot disagree.

Temperature, top-k and nucleus sampling: https://arxiv.org/abs/1904.09751.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxppo import kernels
from jaxppo.config import Config
from jaxppo.types import Scalar


class Stops(NamedTuple):
    """An automaton over tokens that finds stop texts in a response. State 0 is the
    start; tokens that act alike share a column.
    """

    column: Int[Array, "V"]  # of each token
    next: Int[Array, "S C"]  # the state after a token
    ends: Bool[Array, "S C"]  # the token completes a stop text


def temper(logits: Float[Array, "N V"], *, temperature: Scalar) -> Float[Array, "N V"]:
    """z / temperature.

    >>> import jax.numpy as jnp
    >>> temper(jnp.array([[1.0, 2.0]]), temperature=0.5)
    Array([[2., 4.]], dtype=float32)
    """
    return logits / temperature


def keep_set(
    logits: Float[Array, "N V"], *, top_k: int = 0, top_p: Scalar = 1.0
) -> Float[Array, "N V"]:
    """Set logits outside the top k, then outside the nucleus of `top_p`, to −inf.

    The nucleus is the smallest set of likeliest tokens with Σ p ≥ top_p (Holtzman et
    al. 2019, https://arxiv.org/abs/1904.09751); the likeliest token always stays.
    `top_k` 0 and `top_p` 1 keep everything. Ties at the border are kept.

    >>> import jax.numpy as jnp
    >>> keep_set(
    ...     jnp.log(jnp.array([[0.5, 0.3, 0.2]])), top_p=0.6
    ... ) > -jnp.inf  # .5 < .6 <= .8
    Array([[ True,  True, False]], dtype=bool)
    """
    if top_k:
        border = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= border, logits, -jnp.inf)
    if not (isinstance(top_p, float | int) and top_p >= 1):
        ordered = jnp.sort(logits, -1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered), -1) - jax.nn.softmax(ordered)
        # the least likely token that is still needed to reach top_p
        border = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits >= border, logits, -jnp.inf)
    return logits


def has_keep_set(sample: Config) -> bool:
    """Whether the settings exclude tokens: top_k > 0 or top_p < 1 (or a traced top_p).

    >>> has_keep_set(Config(top_k=0, top_p=0.9))
    True
    """
    return sample.top_k > 0 or not (isinstance(sample.top_p, float | int) and sample.top_p >= 1)


def bars_eos(sample: Config) -> bool:
    """Whether the settings forbid the end of text in the first tokens of a response:
    min_tokens > 0, and there is an end of text.

    >>> bars_eos(Config(min_tokens=2, eos=0))
    True
    """
    return sample.min_tokens > 0 and sample.eos not in (-1, ())


def is_eos(
    tokens: Int[Array, "*s"], eos: int | tuple[int, ...] | Int[Array, ""]
) -> Bool[Array, "*s"]:
    """Whether a token is the end of text, or one of several: token = eosᵢ for any i.

    >>> import jax.numpy as jnp
    >>> is_eos(jnp.array([1, 2, 3]), (1, 3))
    Array([ True, False,  True], dtype=bool)
    """
    if not isinstance(eos, tuple):
        return tokens == eos
    return functools.reduce(jnp.logical_or, [tokens == end for end in eos])


def bar_eos(
    logits: Float[Array, "N V"], t: Int[Array, "N"] | Int[Array, ""], *, sample: Config
) -> Float[Array, "N V"]:
    """Set the ends of text to −inf where t < min_tokens: z_eos = −inf.

    >>> import jax.numpy as jnp
    >>> sample = Config(min_tokens=1, eos=1)
    >>> bar_eos(jnp.zeros((2, 2)), jnp.array([0, 1]), sample=sample)
    Array([[  0., -inf],
           [  0.,   0.]], dtype=float32)
    """
    if not bars_eos(sample):
        return logits
    early = jnp.broadcast_to(t < sample.min_tokens, logits.shape[:1])
    ends = is_eos(jnp.arange(logits.shape[1]), sample.eos)
    return jnp.where(early[:, None] & ends[None], -jnp.inf, logits)


def process(
    logits: Float[Array, "N V"],
    *,
    sample: Config,
    allowed: Bool[Array, "N V"] | None = None,
    t: Int[Array, "N"] | Int[Array, ""] | None = None,
) -> Float[Array, "N V"]:
    """Set tempered logits to −inf outside `allowed` and the keep-set of the settings:
    z where allowed ∧ keep_set(z) > −inf. Before `min_tokens`, no end of text is
    allowed.

    t: the position in the response; needed if `bars_eos`.

    >>> import jax.numpy as jnp
    >>> process(jnp.array([[1.0, 2.0]]), sample=Config(top_k=1, top_p=1.0))
    Array([[-inf,   2.]], dtype=float32)
    """
    if bars_eos(sample):
        assert t is not None, "min_tokens needs positions"
        logits = bar_eos(logits, t, sample=sample)
        if allowed is not None:
            some = (allowed & (logits > -jnp.inf)).any(-1, keepdims=True)
            allowed = allowed | ~some  # nothing else was allowed
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    return keep_set(logits, top_k=sample.top_k, top_p=sample.top_p)


def row_uniforms(key: Array, index: Int[Array, "B"], length: int) -> Float[Array, "B T"]:
    """The sampler's noise, `length` numbers in [0, 1) for each row:
    uᵢ = uniform(fold_in(key, i)).

    They depend on the key and the row's global index alone, so a row's sample is the
    same on any number of devices and in any batch.

    >>> import jax, jax.numpy as jnp
    >>> make = lambda rows: row_uniforms(jax.random.key(0), jnp.array(rows), 3)
    >>> two, one = make([5, 7]), make([7])
    >>> two.shape, bool((two[1] == one[0]).all())
    ((2, 3), True)
    """
    draw = lambda i: jax.random.uniform(jax.random.fold_in(key, i), (length,))
    return jax.vmap(draw)(index)


def world_keys(key: Array, index: Int[Array, "B"]) -> Key[Array, "B"]:
    """The randomness of an environment in each row, from the key of `row_uniforms`:
    fold_in(fold_in(key, 2³² − 1), i), where no row's index is.

    >>> import jax, jax.numpy as jnp
    >>> two = world_keys(jax.random.key(0), jnp.array([5, 7]))
    >>> bool((two[1] == world_keys(jax.random.key(0), jnp.array([7]))[0]).all())
    True
    """
    key = jax.random.fold_in(key, 0xFFFFFFFF)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def draw(
    logits: Float[Array, "B V"], uniform: Float[Array, "B"], *, greedy: bool = False
) -> Int[Array, "B"]:
    """One token for each row: k = argmax z if `greedy`, else with probability
    softmax(z)ₖ.

    >>> import jax.numpy as jnp
    >>> draw(jnp.array([[0.0, 2.0, 1.0]]), jnp.array([0.0]), greedy=True)
    Array([1], dtype=int32)
    """
    return (
        jnp.argmax(logits, -1).astype(jnp.int32) if greedy else kernels.categorical(logits, uniform)
    )


def end_of_response(
    token: Int[Array, "B"],
    t: Int[Array, ""],
    *,
    eos: int | tuple[int, ...] | Int[Array, ""],
    sample: Config,
    stops: Stops | None = None,
    state: Int[Array, "B"] | None = None,
) -> tuple[Bool[Array, "B"], Int[Array, "B"] | None]:
    """(whether a response ends with its token t, the next state of `stops`): the token
    is an end of text, or it completes a stop text and t ≥ min_tokens.

    >>> import jax.numpy as jnp
    >>> end_of_response(jnp.array([3, 1]), jnp.array(0), eos=1, sample=Config())[0]
    Array([False,  True], dtype=bool)
    """
    if stops is None:
        return is_eos(token, eos), state
    column = stops.column[token]
    completed = stops.ends[state, column] & (t >= sample.min_tokens)
    return is_eos(token, eos) | completed, stops.next[state, column]
