"""Operations and memory traffic of each phase of a step, from the shapes."""

import math

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxppo.config import RunConfig
from jaxppo.models.shapes import ModelConfig


def matrix_parameters(shape: ModelConfig) -> tuple[int, int]:
    """The number of weights in matrix products: (of all blocks, of the head)."""
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    block = shape.width * (2 * heads + 2 * kv) + shape.width * shape.mlp_width * (
        3 if shape.gated else 2
    )
    return shape.num_layers * block, shape.width * shape.vocab_size


def phase_costs(
    config: RunConfig, shape: ModelConfig, mesh: Mesh | AbstractMesh
) -> dict[str, tuple[float, float]]:
    """(operations, bytes moved) of each phase on each device.

    Operations: 2 for each weight and token forward, twice as many backward (as many
    with adapters, whose weight gradients are small), and 4 · width for each pair of
    tokens in attention. Bytes: the weights once for each decoded token, and the keys
    and values read. A separate critic adds a body without a head to generation and
    update.

    Responses count at full length. Not counted: a reward model, recomputation
    (--remat), a greedy baseline, the KL over the whole vocabulary, the lagged policy of
    --mask-top-p, the second scoring of --old-logprobs.
    """
    blocks, head = matrix_parameters(shape)
    bodies = 2 if config.critic == "separate" and config.value_loss != "none" else 1
    size = jnp.dtype(config.dtype).itemsize
    rows, length, response = config.rows, config.length, config.response_length
    attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * length * length / 2
    body, chosen = rows * (2 * blocks * length + attention), rows * 2 * head * response
    forward = bodies * body + chosen
    # bytes of a token's keys and values
    cached = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * size
    cache = bodies * cached * rows * (config.prompt_length + response / 2)
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    devices = math.prod(mesh.shape.values())
    # Each device reads all weights, divided over the tensor axis only.
    weights = (bodies * blocks + head) * size / tensor
    passes = 2 if config.lora else 3
    learned = config.batch_size / config.rows * config.epochs
    # Adam reads four float32 arrays and writes three.
    moments = 0 if config.lora else (bodies * blocks + head) * 4 * 7 / (tensor * fsdp)
    updates = config.epochs * config.minibatches
    return {
        "generate": (forward / devices, response * weights + response * cache / devices),
        "reference": ((body + chosen) / devices, (blocks + head) * size / tensor),
        "update": (
            passes * learned * forward / devices,
            updates * (passes * weights * config.microbatches + moments),
        ),
    }
