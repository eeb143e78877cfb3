"""Which groups are worth learning from (dynamic sampling, DAPO, https://arxiv.org/abs/2503.14476)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def informative(scores: Float[Array, "B"], valid: Bool[Array, "B"], *, group_size: int) -> Bool[Array, "B"]:
    """True on the valid rows of groups whose valid scores differ: the others have advantage 0 in every group estimator.

    >>> import jax.numpy as jnp
    >>> informative(jnp.array([1.0, 1.0, 1.0, 2.0]), jnp.ones(4, bool), group_size=2)
    Array([False, False,  True,  True], dtype=bool)
    """
    grouped, ok = scores.reshape(-1, group_size), valid.reshape(-1, group_size)
    most = jnp.where(ok, grouped, -jnp.inf).max(1, keepdims=True)
    least = jnp.where(ok, grouped, jnp.inf).min(1, keepdims=True)
    return (ok & (most > least)).reshape(-1)


def first_groups(useful: Bool[Array, "B"], *, group_size: int, rows: int) -> Int[Array, "K"]:
    """Row numbers of the first `rows` rows in whole groups, useful groups before the others, each kind in its order.

    >>> import jax.numpy as jnp
    >>> first_groups(jnp.array([False, False, True, True]), group_size=2, rows=2)
    Array([2, 3], dtype=int32)
    """
    groups = useful.reshape(-1, group_size).any(1)
    order = jnp.argsort(~groups, stable=True)[: rows // group_size].astype(jnp.int32)
    return (order[:, None] * group_size + jnp.arange(group_size, dtype=jnp.int32)[None]).reshape(-1)


def take_rows(tree, rows: Int[Array, "K"]):
    """The rows of every array in the tree."""
    return jax.tree.map(lambda x: x[rows], tree)
