"""Weights in 8 bits, with a scale for each output channel: frozen ones, and those that
a step samples with.

The linear layers of the blocks are stored so; embeddings, norms, biases and the output
layer keep their type, as in https://arxiv.org/abs/2208.07339, whose vector-wise weights
these are. `layers.Linear` computes with them.
"""

from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxppo.models import lora
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
        if path[-1] != "kernel" or path[-2] not in lora.GROUPS["all"]:
            out[path] = x
            continue
        x = x.astype(jnp.float32)  # 127 steps are too fine for bfloat16
        scale = abs(x).max(-2) / 127
        divisor = (scale + (scale == 0))[..., None, :]
        out |= {path: (x / divisor).round().astype(jnp.int8), (*path[:-1], SCALE): scale}
    return unflatten_dict(out)


def sampling_weights(params: Params, *, alpha: float) -> dict[str, Any]:
    """The whole policy in 8 bits, to sample with: adapters are merged first, and a
    critic is left out. NLPO's lagged policy stays as it is, or the scorer would have
    another mask.
    """
    apart = ("critic", "lagged")
    own = {name: x for name, x in params.items() if name not in apart}
    lagged = {name: params[name] for name in ("lagged",) if name in params}
    return quantise(lora.fold(own, alpha=alpha)) | lagged
