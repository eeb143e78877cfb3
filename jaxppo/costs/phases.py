"""Lower bounds of the seconds of each phase of a step."""

import math

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxppo.config import RunConfig
from jaxppo.models.shapes import ModelConfig


def matrix_parameters(shape: ModelConfig) -> tuple[int, int]:
    """(weights of the blocks' products, weights of the head)."""
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    block = shape.width * (2 * heads + 2 * kv) + shape.width * shape.mlp_width * (
        3 if shape.gated else 2
    )
    return shape.num_layers * block, shape.width * shape.vocab_size


def phases(
    config: RunConfig, shape: ModelConfig, mesh: Mesh | AbstractMesh
) -> dict[str, tuple[float, float]]:
    """Operations and bytes of each phase on each device, from the shapes: 2 operations
    a weight and token forward, twice that backward (once with adapters, whose weight
    gradients are small); attention 4 · width a pair of tokens. Bytes are those of the
    weights, once a decoded token, and of the keys and values read. A critic of its own
    is a second body beside the policy's, without a head: it reads each token with it,
    and learns with it.

    Generation is counted at its full length, though decoding stops when every row has
    ended: a step may do less. It does more with what is not counted: a reward model,
    recomputation (--remat), a greedy baseline, the KL of the whole vocabulary, the
    lagged policy of --mask-top-p, the scorer's own pass of --old-logprobs.
    """
    blocks, head = matrix_parameters(shape)
    bodies = 2 if config.critic == "separate" and config.value_loss != "none" else 1
    size = jnp.dtype(config.dtype).itemsize
    rows, length, response = config.rows, config.length, config.response_length
    attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * length * length / 2
    body, chosen = rows * (2 * blocks * length + attention), rows * 2 * head * response
    forward = bodies * body + chosen
    # bytes a token
    cached = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * size
    cache = bodies * cached * rows * (config.prompt_length + response / 2)
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    devices = math.prod(mesh.shape.values())
    # Each device reads the weights that it computes with: all of them, but for the part
    # of the tensor axis.
    weights = (bodies * blocks + head) * size / tensor
    passes = 2 if config.lora else 3
    learned = config.batch_size / config.rows * config.epochs
    moments = (
        0 if config.lora else (bodies * blocks + head) * 4 * 7 / (tensor * fsdp)
    )  # Adam reads four arrays and writes three
    updates = config.epochs * config.minibatches
    return {
        "generate": (forward / devices, response * weights + response * cache / devices),
        "reference": ((body + chosen) / devices, (blocks + head) * size / tensor),
        "update": (
            passes * learned * forward / devices,
            updates * (passes * weights * config.microbatches + moments),
        ),
    }
