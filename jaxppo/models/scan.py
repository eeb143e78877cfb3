"""Parameters of unrolled layers as those of scanned ones, and back."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxppo.types import Params


def stack(params: Params) -> dict[str, Any]:
    """Parameters of unrolled layers (`layers_0`, `layers_1`, ...) as scanned ones: one
    array [N ...] for all layers.
    """
    own = {name: x for name, x in params.items() if re.fullmatch(r"layers_\d+", name)}
    layers = [own[f"layers_{i}"] for i in range(len(own))]
    rest = {
        name: stack(x) if name == "critic" else x for name, x in params.items() if name not in own
    }
    return {**rest, "layers": jax.tree.map(stack_leaves, *layers)} if own else rest


def stack_leaves(*layers: Any) -> Any:
    """One array of all; NumPy's stay on the host."""
    return (jnp if any(isinstance(x, jax.Array) for x in layers) else np).stack(layers)


def unstack(params: Params) -> dict[str, Any]:
    """The inverse of `stack`."""
    rest = {
        name: unstack(x) if name == "critic" else x
        for name, x in params.items()
        if name != "layers"
    }
    if "layers" not in params:
        return rest
    number = len(jax.tree.leaves(params["layers"])[0])
    return rest | {
        f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(number)
    }
