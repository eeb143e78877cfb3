"""Low-rank adapters (https://arxiv.org/abs/2106.09685), and the split of parameters
into trained and base.

A model's parameters are one nested dict. With adapters, only a partial tree is trained
(the adapters and the value head); the rest is the base, and `merge` combines the two.
The reference policy is the base alone: there is no second copy.
"""

from collections.abc import Callable
from typing import Any

import jax

from jaxppo.types import Params

TRAINED_WITH_LORA = ("lora_a", "lora_b", "value")


def merge(base: Params, trained: Params) -> dict:
    """The union of two trees; leaves of `trained` win. No array is copied.

    >>> merge({"q": {"kernel": 1}}, {"q": {"lora_a": 2}, "value": 3})
    {'q': {'kernel': 1, 'lora_a': 2}, 'value': 3}
    """
    out = dict(base)
    for name, leaf in trained.items():
        out[name] = merge(base.get(name, {}), leaf) if isinstance(leaf, dict) else leaf
    return out


def split(params: Params, is_trained: Callable[[tuple[str, ...]], bool]) -> tuple[dict, dict]:
    """(trained, base): the inverse of `merge`, by the path of each leaf. Empty dicts
    are removed.

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
    """The same network without adapters: each kernel plus (alpha / rank) A B. Scanned
    layers are folded layer by layer.

    >>> import jax.numpy as jnp
    >>> a, b = jnp.ones((2, 1)), jnp.array([[0.5, 0.0]])
    >>> params = {"kernel": jnp.eye(2), "lora_a": a, "lora_b": b}
    >>> fold(params, alpha=2.0)["kernel"].tolist()
    [[2.0, 0.0], [1.0, 1.0]]
    """
    out: dict[str, Any] = {
        name: fold(x, alpha=alpha) if isinstance(x, dict) else x for name, x in params.items()
    }
    if "lora_a" in out:
        a, b = out.pop("lora_a"), out.pop("lora_b")
        out["kernel"] = out["kernel"].astype(a.dtype) + (alpha / a.shape[-1]) * (a @ b)
    return out


def is_trained(path: tuple[str, ...]) -> bool:
    """Whether a leaf is trained when there are adapters: it is one, or of the value
    head.
    """
    return any(name in TRAINED_WITH_LORA for name in path)


def count(params: Params) -> int:
    """The number of scalars in a tree."""
    return sum(x.size for x in jax.tree.leaves(params))
