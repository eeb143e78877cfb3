"""Operations and memory traffic of each phase of a step, from the shapes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Int

from jaxppo import packing
from jaxppo.config import Config, RunConfig
from jaxppo.decoding import compaction
from jaxppo.models.attention import read_sizes
from jaxppo.models.shapes import ModelConfig

Lengths = Int[np.ndarray, "B"]


def matrix_parameters(shape: ModelConfig) -> tuple[int, int]:
    """The number of weights in matrix products: (of all blocks, of the head)."""
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    block = shape.width * (2 * heads + 2 * kv) + shape.width * shape.mlp_width * (
        3 if shape.gated else 2
    )
    return shape.num_layers * block, shape.width * shape.vocab_size


def response_lengths(rows: int, longest: int, mean: float = 0.0) -> Lengths:
    """Lengths of responses with this mean, as if each token ended a response with the
    same probability; all are the longest if the mean is 0.

    >>> response_lengths(4, 100, 20).tolist()
    [21, 3, 11, 45]
    """
    if not 0 < mean < longest:
        return np.full(rows, longest)
    share = (np.arange(rows) + 0.5) / rows
    low, high = 0.0, 64.0 * longest  # of the mean before the longest are cut
    for _ in range(60):
        middle = (low + high) / 2
        lengths = np.clip(np.ceil(-middle * np.log1p(-share)), 1, longest).astype(int)
        low, high = (middle, high) if lengths.mean() < mean else (low, middle)
    return np.random.default_rng(0).permutation(lengths)  # long and short ones in each group


class Decoding(NamedTuple):
    """What a device's decode loop does for all tokens together."""

    tokens: int  # times that all weights are read
    rows: int  # rows computed
    pairs: float  # of a new token and one that it sees, its own half
    prompt_slots: int  # of the cache, read
    response_slots: int


def decoding(config: Config, lengths: Lengths, *, packs: bool) -> Decoding:
    """What decoding responses of these lengths takes. `packs`: whether prompts are
    shared and rows that have ended leave (`decoding/compaction.py`).
    """
    rows, prompt, longest = len(lengths), config.prompt_length, config.response_length
    if not packs:
        steps, read = int(lengths.max()), config.length
        pairs = rows * (prompt * steps + steps**2 / 2)
        return Decoding(
            steps, rows * steps, pairs, rows * prompt * steps, rows * (read - prompt) * steps
        )
    sizes = compaction.sizes(rows // config.group_size, config.group_size, longest)
    reads, size = read_sizes(longest), sizes.pop(0)
    left = lengths.reshape(1, *size)
    found = np.zeros(5)
    ends = set(lengths.tolist())
    for t in range(1, int(lengths.max()) + 1):  # token t is chosen from t - 1 before it
        ended = t - 1 in ends  # else as many fit as before
        while ended and sizes and bool(compaction.fits(jnp.asarray(left >= t), sizes[0])):
            size = sizes.pop(0)
            rows_left, _ = compaction.choose(jnp.asarray(left >= t), size)
            left = left.reshape(-1)[np.asarray(rows_left)].reshape(1, *size)
        now = size.blocks * size.width
        slots = next(n for n in reads if n >= t)
        found += [1, now, now * (prompt + t - 0.5), size.blocks * prompt, now * slots]
    tokens, computed, pairs, *slots = found.tolist()
    return Decoding(int(tokens), int(computed), pairs, *map(int, slots))


def packed_rows(config: Config, lengths: Lengths, minibatches: int = 1) -> int:
    """Packed rows that a pass over responses of these lengths computes, the empty ones
    of the last part of each minibatch included.
    """
    rows = len(lengths) // minibatches
    size = packing.part_rows(config, rows, config.length)
    groups = lengths.reshape(-1, config.group_size)
    some = [groups[number::minibatches].reshape(-1) for number in range(minibatches)]
    most = _most_targets(config)
    # A full response leaves no room for others: a run's start need not place them.
    full = most == config.response_length and (lengths == most).all()
    counts = [rows if full else _packed(config, one) for one in some]
    return sum(-(-count // size) * size for count in counts)


def _most_targets(config: Config) -> int:
    return packing.most_targets(config.length, config.response_length, config.group_size)


def _packed(config: Config, lengths: Lengths) -> int:
    """Packed rows that hold responses of these lengths, with full prompts."""
    prompts = jnp.full((len(lengths) // config.group_size,), config.prompt_length, jnp.int32)
    found = _place(
        prompts, jnp.asarray(lengths, jnp.int32), capacity=config.length, most=_most_targets(config)
    )
    return 1 + int(found.row.max())


_place = jax.jit(packing.place, static_argnames=("capacity", "most"))


def decode_bytes(
    config: Config, shape: ModelConfig, mesh: Mesh | AbstractMesh, done: Decoding
) -> dict[str, float]:
    """Bytes that a device reads while it decodes: the weights once for each token, and
    the slots of the caches.
    """
    size, tensor = jnp.dtype(config.dtype).itemsize, mesh.shape["tensor"]
    bodies = _sampling_bodies(config)
    cached = bodies * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * size / tensor
    return {
        "weights": done.tokens * policy_bytes(config, shape, sampling=True) / tensor,
        "prompts": done.prompt_slots * cached,
        "responses": done.response_slots * cached,
    }


def policy_bytes(
    config: Config, shape: ModelConfig, *, frozen: bool = False, sampling: bool = False
) -> int:
    """Bytes of the weights that a pass over the policy reads, or over the `frozen`
    reference, or a token of the `sampling` policy.
    """
    blocks, head = matrix_parameters(shape)
    size, bodies = jnp.dtype(config.dtype).itemsize, 1 if frozen else _bodies(config)
    int8 = config.base_dtype == "int8" and (frozen or config.lora > 0)
    if sampling:
        int8, bodies = int8 or config.decode_dtype == "int8", _sampling_bodies(config)
    return bodies * blocks * (1 if int8 else size) + head * size


def phase_costs(
    config: RunConfig, shape: ModelConfig, mesh: Mesh | AbstractMesh, mean: float = 0.0
) -> dict[str, tuple[float, float]]:
    """(operations, bytes moved) of each phase on each device.

    Operations: 2 for each weight and token forward, twice as many backward (as many
    with adapters, whose weight gradients are small), and 4 · width for each pair of
    tokens in attention. Bytes: `decode_bytes`, and the weights once for each pass. A
    separate critic adds a body without a head to generation and update.

    Not counted: the adapters' own products, a reward model, recomputation (--remat), a
    greedy baseline, the KL over the whole vocabulary, the lagged policy of
    --mask-top-p, the second scoring of --old-logprobs.

    mean: length of responses (`response_lengths`).
    """
    blocks, head = matrix_parameters(shape)
    bodies = _bodies(config)
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    lengths = device_lengths(config, mesh, mean)
    packs = is_packed(config, shape)
    done = decoding(config, lengths, packs=packs)
    pair = 4 * shape.num_layers * shape.num_heads * shape.head_dim
    prompts = len(lengths) // (config.group_size if packs else 1)
    generate = (
        _sampling_bodies(config)
        * (
            2 * blocks * (prompts * config.prompt_length + done.rows)
            + pair * (prompts * config.prompt_length**2 / 2 + done.pairs)
        )
        + 2 * head * done.rows
    )
    body = 2 * blocks * config.length + pair * config.length**2 / 2
    chosen = 2 * head * (_most_targets(config) if packs else config.response_length)
    kept = lengths[: len(lengths) // config.oversample]
    passed, learned = (
        (packed_rows(config, lengths), packed_rows(config, kept, config.minibatches))
        if packs
        else (len(lengths), len(kept))
    )
    # Each device reads all weights, divided over the tensor axis only.
    weights = policy_bytes(config, shape) / tensor
    passes = 2 if config.lora else 3
    # Adam reads four float32 arrays and writes three.
    moments = 0 if config.lora else (bodies * blocks + head) * 4 * 7 / (tensor * fsdp)
    updates = config.epochs * config.minibatches
    part = packing.part_rows(config, len(kept) // config.minibatches, config.length)
    times = config.epochs * learned / part if packs else updates * config.microbatches
    return {
        "generate": (generate / tensor, sum(decode_bytes(config, shape, mesh, done).values())),
        "reference": (
            passed * (body + chosen) / tensor,
            policy_bytes(config, shape, frozen=True) / tensor,
        ),
        "update": (
            passes * config.epochs * learned * (bodies * body + chosen) / tensor,
            times * passes * weights + updates * moments,
        ),
    }


def update_positions(
    config: Config, shape: ModelConfig, mesh: Mesh | AbstractMesh, mean: float = 0.0
) -> tuple[int, int]:
    """(positions of an epoch of the update on a device, tokens among them)."""
    lengths = device_lengths(config, mesh, mean)
    kept = lengths[: len(lengths) // config.oversample]
    rows, prompts = len(kept), len(kept)
    if is_packed(config, shape):
        rows = packed_rows(config, kept, config.minibatches)
        prompts //= config.group_size
    return rows * config.length, prompts * config.prompt_length + int(kept.sum())


def device_lengths(config: Config, mesh: Mesh | AbstractMesh, mean: float) -> Lengths:
    """Lengths of the responses of one device."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return response_lengths(config.rows // shards, config.response_length, mean)


def is_packed(config: Config, shape: ModelConfig) -> bool:
    """Whether this network's rows are packed."""
    return shape.kind == "transformer" and config.layout == "packed"


def _bodies(config: Config) -> int:
    """Networks that read every token."""
    return 2 if config.critic == "separate" and config.value_loss != "none" else 1


def _sampling_bodies(config: Config) -> int:
    """Networks that read every token while sampling: values of a policy in 8 bits are
    computed afterwards.
    """
    return _bodies(config) if config.decode_dtype == "same" else 1
