"""Convert parameters between unrolled and scanned layers."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxppo.types import Params


def stack_layers(params: Params) -> dict[str, Any]:
    """Turn `layers_0`, `layers_1`, ... into "layers", one array [N ...] for all."""
    own = {name: x for name, x in params.items() if re.fullmatch(r"layers_\d+", name)}
    rest = {name: x for name, x in params.items() if name not in own}
    if "critic" in rest:
        rest["critic"] = stack_layers(rest["critic"])
    layers = [own[f"layers_{i}"] for i in range(len(own))]
    return {**rest, "layers": jax.tree.map(stack_leaves, *layers)} if own else rest


def stack_leaves(*layers: Any) -> Any:
    """One array of all. NumPy arrays stay on the host."""
    return (jnp if any(isinstance(x, jax.Array) for x in layers) else np).stack(layers)


def unstack_layers(params: Params) -> dict[str, Any]:
    """The inverse of `stack_layers`; other parameters stay as they are."""
    rest = {name: x for name, x in params.items() if name != "layers"}
    for name in ("critic", "lagged"):
        if name in rest:
            rest[name] = unstack_layers(rest[name])
    if "layers" not in params:
        return rest
    count = len(jax.tree.leaves(params["layers"])[0])
    take = lambda i: jax.tree.map(lambda x: x[i], params["layers"])
    return rest | {f"layers_{i}": take(i) for i in range(count)}
