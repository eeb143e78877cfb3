"""Frozen weights in 8 bits, with a scale for each output channel.

The linear layers of the blocks are stored so; embeddings, norms, biases and the output
layer keep their type, as in https://arxiv.org/abs/2208.07339, whose vector-wise weights
these are. `layers.Linear` computes with them.
"""

from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxppo.models.lora import GROUPS
from jaxppo.types import Params

SCALE = "kernel_scale"  # beside a kernel in 8 bits


def quantise(params: Params) -> dict[str, Any]:
    """The parameters with kernels W [in out] of linear layers as whole numbers Q in 8
    bits and a scale s [out]: s_j = max_i |W_ij| / 127, Q = round(W / s), W ≈ Q s. NumPy
    arrays stay on the host.

    >>> layer = quantise({"q": {"kernel": jnp.array([[1.0, 0.0], [-2.0, 0.0]])}})["q"]
    >>> layer["kernel"].tolist(), (127 * layer["kernel_scale"]).tolist()
    ([[64, 0], [-127, 0]], [2.0, 0.0])
    """
    out, flat = {}, flatten_dict(params)
    for path in flat:
        x: Any = flat[path]
        if path[-1] != "kernel" or path[-2] not in GROUPS["all"]:
            out[path] = x
            continue
        scale = abs(x).max(-2) / 127
        divisor = (scale + (scale == 0))[..., None, :]
        out |= {path: (x / divisor).round().astype(jnp.int8), (*path[:-1], SCALE): scale}
    return unflatten_dict(out)
