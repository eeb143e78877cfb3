"""Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685): which leaves of
a parameter tree are trained.

A model's parameters are one nested dict. With adapters, what is trained is a partial
tree (the adapters and the value head) and the rest is the base; `merge` lays one over
the other. The reference policy is the base alone: no second copy.
"""

from collections.abc import Callable
from typing import Any

import jax

from jaxppo.types import Params

TRAINED_WITH_LORA = ("lora_a", "lora_b", "value")


def merge(base: Params, trained: Params) -> dict:
    """The whole tree: `trained` laid over `base`, dict by dict. No array is copied.

    >>> merge({"q": {"kernel": 1}}, {"q": {"lora_a": 2}, "value": 3})
    {'q': {'kernel': 1, 'lora_a': 2}, 'value': 3}
    """
    out = dict(base)
    for name, leaf in trained.items():
        out[name] = merge(base.get(name, {}), leaf) if isinstance(leaf, dict) else leaf
    return out


def split(params: Params, is_trained: Callable[[tuple[str, ...]], bool]) -> tuple[dict, dict]:
    """(trained, base): the tree cut in two by the path of each leaf; empty dicts are
    dropped.

    >>> split({"q": {"kernel": 1, "lora_a": 2}}, lambda path: path[-1] == "lora_a")
    ({'q': {'lora_a': 2}}, {'q': {'kernel': 1}})
    """

    def part(tree, path, want):
        out = {}
        for name, leaf in tree.items():
            if isinstance(leaf, dict):
                inner = part(leaf, (*path, name), want)
                if inner:
                    out[name] = inner
            elif is_trained((*path, name)) == want:
                out[name] = leaf
        return out

    return part(params, (), True), part(params, (), False)


def fold(params: Params, *, alpha: float) -> dict:
    """The same network without adapters: each kernel plus (alpha / rank) A B; of
    scanned layers, layer by layer.

    >>> import jax.numpy as jnp
    >>> fold(
    ...     {
    ...         "kernel": jnp.eye(2),
    ...         "lora_a": jnp.ones((2, 1)),
    ...         "lora_b": jnp.array([[0.5, 0.0]]),
    ...     },
    ...     alpha=2.0,
    ... )["kernel"].tolist()
    [[2.0, 0.0], [1.0, 1.0]]
    """
    out: dict[str, Any] = {
        name: fold(x, alpha=alpha) if isinstance(x, dict) else x for name, x in params.items()
    }
    if "lora_a" in out:
        a, b = out.pop("lora_a"), out.pop("lora_b")
        out["kernel"] = out["kernel"].astype(a.dtype) + (alpha / a.shape[-1]) * (a @ b)
    return out


def is_adapter(path: tuple[str, ...]) -> bool:
    """Whether a leaf is trained when adapters are used: adapters and the value head
    are.
    """
    return any(name in TRAINED_WITH_LORA for name in path)


def count(params: Params) -> int:
    """Number of scalars in a tree."""
    return sum(x.size for x in jax.tree.leaves(params))
