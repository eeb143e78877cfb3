"""Logits to logits, and logits to a token. One set of processors serves sampler and
scorer, so that they cannot disagree.

Temperature, top-k and nucleus sampling: https://arxiv.org/abs/1904.09751.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxppo import kernels
from jaxppo.config import Config
from jaxppo.types import Scalar


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
    """Logits of −inf outside the top-k set, then outside the top-p nucleus (Holtzman et
    al. 2019, https://arxiv.org/abs/1904.09751).

    The nucleus is the smallest set of likeliest tokens with Σ p ≥ top_p; the likeliest
    token always stays. `top_k` 0 and `top_p` 1 keep everything. Ties at the border are
    kept.

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
    """Whether the settings leave anything out: top_k > 0 or top_p < 1. (A traced top_p
    may.)

    >>> has_keep_set(Config(top_k=0, top_p=1.0)), has_keep_set(Config(top_k=0, top_p=0.9))
    (False, True)
    """
    return sample.top_k > 0 or not (isinstance(sample.top_p, float | int) and sample.top_p >= 1)


def process(
    logits: Float[Array, "N V"], *, sample: Config, guide: Float[Array, "N V"] | None = None
) -> Float[Array, "N V"]:
    """Tempered logits with −inf outside of what may be sampled: the settings' keep-set
    and, with the logits of a lagged policy as `guide`, that policy's nucleus of
    mask_top_p (NLPO, https://arxiv.org/abs/2210.01241): z / temperature on K ∩ N, with
    K = keep_set(z) and N = keep_set(guide).

    >>> import jax.numpy as jnp
    >>> process(jnp.array([[1.0, 2.0]]), sample=Config(top_k=1, top_p=1.0))
    Array([[-inf,   2.]], dtype=float32)
    """
    if guide is not None:
        allowed = (
            keep_set(temper(guide, temperature=sample.temperature), top_p=sample.mask_top_p)
            > -jnp.inf
        )
        logits = jnp.where(allowed, logits, -jnp.inf)
    return keep_set(logits, top_k=sample.top_k, top_p=sample.top_p)


def row_uniforms(key: Array, index: Int[Array, "B"], length: int) -> Float[Array, "B T"]:
    """The sampler's noise: `length` numbers in [0, 1) for each row. They hang on the
    key and on the row's global number alone, so that a row's sample is the same on any
    number of devices and beside any other rows: uᵢ = uniform(fold_in(key, i)).

    >>> import jax, jax.numpy as jnp
    >>> two, one = (
    ...     row_uniforms(jax.random.key(0), jnp.array(rows), 3) for rows in ([5, 7], [7])
    ... )
    >>> two.shape, bool((two[1] == one[0]).all())
    ((2, 3), True)
    """
    draw = lambda i: jax.random.uniform(jax.random.fold_in(key, i), (length,))
    return jax.vmap(draw)(index)


def draw(
    logits: Float[Array, "B V"], uniform: Float[Array, "B"], *, greedy: bool = False
) -> Int[Array, "B"]:
    """One token a row: k = argmax z when `greedy`, else with probability softmax(z)ₖ.

    >>> import jax.numpy as jnp
    >>> draw(jnp.array([[0.0, 2.0, 1.0]]), jnp.array([0.0]), greedy=True)
    Array([1], dtype=int32)
    """
    return jnp.argmax(logits, -1).astype(jnp.int32) if greedy else kernels.pick(logits, uniform)
