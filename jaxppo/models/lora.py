"""Low-rank adapters (https://arxiv.org/abs/2106.09685): trained and base parameters.

With adapters, a partial tree is trained, the adapters and the value head; the rest is
the base. `merge` combines them. The reference policy is the base alone.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxppo.config import Config
from jaxppo.errors import UserError
from jaxppo.types import Params

ADAPTER = ("lora_a", "lora_b")
TRAINED_WITH_LORA = (*ADAPTER, "value")
# The linear layers of a block, and names of several of them. As with PEFT's all-linear,
# the output layer has no adapter.
ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
GROUPS = {"all": ATTENTION + MLP, "attention": ATTENTION, "mlp": MLP}


def layers(names: str, *, gated: bool) -> tuple[str, ...]:
    """The linear layers that `--lora-on` names, in the order of a block. A network that
    is not `gated` has no gate. Raises UserError for a layer that the network lacks.

    >>> layers("mlp,q", gated=False)
    ('q', 'up', 'down')
    """
    known = tuple(name for name in GROUPS["all"] if gated or name != "gate")
    chosen: set[str] = set()
    for name in names.split(","):
        if name not in (*GROUPS, *known):
            raise UserError(
                f"--lora-on {names}: the network has no linear layers {name!r}; choose all, "
                f"attention, mlp, or some of {', '.join(known)}, with commas"
            )
        chosen |= set(GROUPS.get(name, (name,)))
    return tuple(name for name in known if name in chosen)


def alpha_of(config: Config) -> float:
    """The α of the scale α / r. With `rslora` it is √r times `lora_alpha`, so that the
    scale is lora_alpha / √r (https://arxiv.org/abs/2312.03732).

    >>> alpha_of(Config(lora=4, lora_alpha=16.0, rslora=True)) / 4  # 16 / √4
    8.0
    """
    return config.lora_alpha * (config.lora**0.5 if config.rslora else 1.0)


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
    """(trained, base), the inverse of `merge`, by the path of each leaf.

    >>> split({"q": {"kernel": 1, "lora_a": 2}}, lambda path: path[-1] == "lora_a")
    ({'q': {'lora_a': 2}}, {'q': {'kernel': 1}})
    """

    flat = flatten_dict(params)
    trained = {path: x for path, x in flat.items() if is_trained(path)}
    base = {path: x for path, x in flat.items() if path not in trained}
    return unflatten_dict(trained), unflatten_dict(base)


def fold(params: Params, *, alpha: float) -> dict:
    """The same network without adapters: each kernel plus (alpha / rank) A B.

    >>> import jax.numpy as jnp
    >>> a, b = jnp.ones((2, 1)), jnp.array([[0.5, 0.0]])
    >>> params = {"kernel": jnp.eye(2), "lora_a": a, "lora_b": b}
    >>> fold(params, alpha=2.0)["kernel"].tolist()
    [[2.0, 0.0], [1.0, 1.0]]
    """
    out: dict[str, Any] = {
        name: fold(x, alpha=alpha) if isinstance(x, dict) else x for name, x in params.items()
    }
    if "kernel_scale" in out:  # in 8 bits: `int8.quantise`
        out["kernel"] = out["kernel"] * out.pop("kernel_scale")[..., None, :]
    if "lora_a" in out:
        a, b = out.pop("lora_a"), out.pop("lora_b")
        out["kernel"] = out["kernel"].astype(a.dtype) + (alpha / a.shape[-1]) * (a @ b)
    return out


def is_trained(path: tuple[str, ...]) -> bool:
    """Whether a leaf is trained with adapters: an adapter, or of the value head."""
    return any(name in TRAINED_WITH_LORA for name in path)


def count(params: Params) -> int:
    """The number of scalars in a tree."""
    return sum(x.size for x in jax.tree.leaves(params))


def count_adapters(params: Params) -> int:
    """The number of scalars in the adapters of a tree."""
    return count(split(params, lambda path: path[-1] in ADAPTER)[0])
