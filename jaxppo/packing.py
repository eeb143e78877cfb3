"""Lay out prompts and responses in packed rows, so that only tokens that exist are
computed.

A packed row has P + T slots, for a prompt of up to P tokens and a response of up to T.
It holds a prompt once, then as many responses to it as fit, or several prompts with
theirs; segments and positions tell attention which tokens see each other. Logits are
computed for W of its tokens (`most_targets`): at most so many are of responses. A
response is never split. Its last token predicts nothing, and has no slot. The answers
of an environment stand between the turns of a response; an answer that no turn follows
has no slot.

How many packed rows there are is known only when the program runs, so a loop computes
them, some at a time (a `Part`). Each device packs its own rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxppo.config import Config
from jaxppo.models import layout
from jaxppo.types import Model, Params, PyTree, Rollout

LEAST_TOKENS = 256  # of a part: a matrix product of fewer tokens is slow
PARTS = 8  # of a batch; more save little, fewer compute more empty slots


class Places(NamedTuple):
    """Where the rows [n] of a shard stand."""

    row: Int[Array, "n"]  # the packed row
    prompt: Int[Array, "n"]  # the slot where its prompt begins
    first: Int[Array, "n"]  # the slot of its first response token
    read: Int[Array, "n"]  # how many response tokens of others come before
    owner: Bool[Array, "n"]  # its prompt stands there for it, and for those that follow
    own: Int[Array, "n"]  # the length of its prompt


class Layout(NamedTuple):
    """The packed rows [R] of each shard [S], of which the first `count` are in use."""

    slots: Int[Array, "S R C"]  # the token in each slot: row * L + column; n L = none
    targets: Int[Array, "S R W"]  # the response tokens: row * T + t; n T = none
    places: Places
    ranks: Int[Array, "S n T"]  # how many tokens of its response come before each
    count: Int[Array, ""]  # the largest of all shards


class Part(NamedTuple):
    """Some packed rows, as the network reads them."""

    tokens: Int[Array, "R C"]
    attend: Bool[Array, "R C"]
    segments: Int[Array, "R C 2"]
    positions: Int[Array, "R C"]
    response: Int[Array, "R W"]
    reads: Int[Array, "R W"]  # the slot before each response token
    targets: Int[Array, "S K"]
    rows: Bool[Array, "B"]  # the rows whose responses are here
    number: Int[Array, ""] | int = 0


def place(
    prompts: Int[Array, "g"], responses: Int[Array, "n"], *, capacity: int, most: int
) -> Places:
    """Find a packed row for each response: the group with the most tokens first, and
    of a group the longest first, beside their prompt if there is room, else in the
    fullest row that has room. A row without a response goes nowhere (packed row n).

    Args:
      prompts: lengths of the prompts, each shared by G adjacent rows.
      responses: lengths of the responses.
      capacity: slots of a packed row.
      most: most response tokens of a packed row.

    >>> two = place(jnp.array([2]), jnp.array([3, 1]), capacity=6, most=4)
    >>> two.row.tolist(), two.first.tolist(), two.read.tolist()
    ([0, 0], [2, 4], [0, 3])
    """
    rows = responses.shape[0]
    group_size = rows // prompts.shape[0]
    groups = jnp.arange(rows, dtype=jnp.int32) // group_size
    tokens = prompts + responses.reshape(-1, group_size).sum(1)
    order = jnp.lexsort((-responses, groups, -tokens[groups]))
    nowhere = jnp.full((rows,), -1, jnp.int32)

    def one(state, item):
        used, read, begins = state  # of each packed row; where it holds the group's prompt, or -1
        i, new_group = item
        group, length = groups[i], responses[i]
        begins = jnp.where(new_group, nowhere, begins)
        needed = jnp.where(begins >= 0, 0, prompts[group]) + length - 1
        room = (used + needed <= capacity) & (read + length <= most)
        fullest = used + capacity * ((used > 0) + 2 * (begins >= 0))
        at = jnp.argmax(jnp.where(room, fullest, -1)).astype(jnp.int32)
        exists, owner = length > 0, begins[at] < 0
        prompt = jnp.where(owner, used[at], begins[at])
        first = used[at] + jnp.where(owner, prompts[group], 0)
        row = jnp.where(exists, at, rows)
        found = Places(row, prompt, first, read[at], owner & exists, prompts[group])

        def put(x, new):  # in place, which a scatter is not
            new = jnp.where(exists, new, x[at])
            return jax.lax.dynamic_update_index_in_dim(x, new, at, 0)

        used, read = put(used, first + length - 1), put(read, read[at] + length)
        return (used, read, put(begins, prompt)), found

    zeros = jnp.zeros((rows,), jnp.int32)
    items = order.astype(jnp.int32), jnp.arange(rows) % group_size == 0
    found = jax.lax.scan(one, (zeros, zeros, nowhere), items)[1]
    return jax.tree.map(lambda x: jnp.zeros_like(x).at[order].set(x), found)


def most_targets(length: int, response: int, group_size: int) -> int:
    """The most response tokens of a packed row of `length` slots: T, or where T is less
    than half of the slots, as many more of a group, or those of two rows, as fit into
    that half.

    >>> most_targets(384, 256, 8), most_targets(49, 1, 8), most_targets(49, 1, 1)
    (256, 8, 2)
    """
    return max(response, min(length // 2, max(group_size, 2) * response))


def lay_out(
    attend: Bool[Array, "B L"],
    mask: Array,
    *,
    group_size: int,
    multiple: int = 1,
    shards: int = 1,
    axes: tuple[str, ...] = (),
) -> Layout:
    """The layout of rows whose prompts are padded on the left. Tokens under `mask`
    [B T] are predicted; a row with any is read wherever it has `attend`.

    Args:
      group_size: G adjacent rows have the same prompt.
      multiple: the number of packed rows is one of it.
      shards: of the rows, over devices.
      axes: named axes over which `count` is the largest.
    """
    length, response = attend.shape[1], mask.shape[1]
    rows = attend.shape[0] // shards
    begins = length - response  # the responses' first column
    most = most_targets(length, response, group_size)
    packed = -(-rows // multiple) * multiple

    def one(attend, mask) -> Layout:
        prompts = attend[::group_size, :begins].sum(1, dtype=jnp.int32)
        read = attend[:, begins:] & (mask > 0).any(1, keepdims=True)
        lengths = read.sum(1, dtype=jnp.int32)
        ranks = jnp.cumsum(read, 1, dtype=jnp.int32) - 1
        at = place(prompts, lengths, capacity=length, most=most)
        row, column = jnp.arange(rows)[:, None], jnp.arange(length)[None]
        t = column[:, :begins] - begins
        in_prompt = at.owner[:, None] & (t >= -at.own[:, None])
        in_response = read & (ranks < lengths[:, None] - 1)
        slot = [(at.prompt + at.own)[:, None] + t, at.first[:, None] + ranks]
        slots = _scatter(
            row * length + column,
            at.row[:, None] * length + jnp.concatenate(slot, 1),
            jnp.concatenate([in_prompt, in_response], 1),
            (packed, length),
            rows * length,
        )
        t = jnp.arange(response)[None]
        targets = _scatter(
            row * response + t,
            (at.row * most + at.read)[:, None] + ranks,
            mask > 0,
            (packed, most),
            rows * response,
        )
        count = jnp.where(lengths > 0, at.row + 1, 0).max()
        return Layout(slots, targets, at, ranks, count)

    found = jax.vmap(one)(split(attend, shards), split(mask, shards))
    count = found.count.max()
    for axis in axes:
        count = jax.lax.pmax(count, axis)
    return found._replace(count=count)


def _scatter(values: Array, where: Array, exists: Array, shape: tuple, none: int) -> Array:
    """Integers put into an array of this shape, at flat places; `none` elsewhere."""
    where = jnp.where(exists, where, shape[0] * shape[1])
    values = jnp.broadcast_to(values, where.shape)
    full = jnp.full((shape[0] * shape[1],), none, jnp.int32)
    return full.at[where.reshape(-1)].set(values.reshape(-1), mode="drop").reshape(shape)


def take_part(whole: Layout, rollout: Rollout, number: Int[Array, ""], size: int) -> Part:
    """The packed rows number * size, ... of each shard."""
    shards = whole.slots.shape[0]
    rows = rollout.tokens.shape[0] // shards
    length, response = rollout.tokens.shape[1], rollout.mask.shape[1]
    begins = length - response
    some = lambda x: jax.lax.dynamic_slice_in_dim(x, number * size, size)

    def one(slots, targets, at: Places, ranks, tokens):
        slots, targets = some(slots), some(targets)
        exists, wanted = slots < rows * length, targets < rows * response
        row, column = (jnp.where(exists, x, 0) for x in jnp.divmod(slots, length))
        target, t = (jnp.where(wanted, x, 0) for x in jnp.divmod(targets, response))
        answered = column >= begins
        position = jnp.where(answered, ranks[row, column - begins], column - begins)
        segments = jnp.stack(
            [jnp.where(exists, 1 + at.prompt[row], 0), jnp.where(exists & answered, 1 + row, 0)], -1
        )
        rank = ranks[target, t]
        read = jnp.where(rank > 0, at.first[target] + rank, (at.prompt + at.own)[target]) - 1
        return Part(
            tokens=jnp.where(exists, tokens[row, column], 0),
            attend=exists,
            segments=segments,
            positions=jnp.where(exists, position + at.own[row], 0),
            response=tokens[target, begins + t],
            reads=jnp.where(wanted, read, 0),  # beyond the row is NaN
            targets=targets,
            rows=(at.row >= number * size) & (at.row < (number + 1) * size),
        )

    found = jax.vmap(one)(*whole[:4], split(rollout.tokens, shards))
    flat = jax.tree.map(join, found)
    return flat._replace(targets=found.targets.reshape(shards, -1), number=jnp.asarray(number))


def scatter(part: Part, x: Array, shape: tuple[int, ...]) -> Array:
    """What a part's response tokens have [R W ...] as an array [B T ...] of the rows; 0
    elsewhere.
    """
    shards, rest = part.targets.shape[0], x.shape[2:]
    size = shape[0] // shards * shape[1]
    put = lambda targets, x: jnp.zeros((size, *rest), x.dtype).at[targets].set(x, mode="drop")
    out = jax.vmap(put)(part.targets, x.reshape(shards, -1, *rest))
    return layout.constrain(out.reshape(*shape, *rest), "rows", *[None] * (1 + len(rest)))


def gather(part: Part, x: Array) -> Array:
    """The inverse of `scatter`: what the rows have [B T ...] at a part's response
    tokens [R W ...]; 0 where there is none.
    """
    rest = x.shape[2:]
    whole = split(x.reshape(-1, *rest), part.targets.shape[0])
    take = lambda targets, x: x.at[targets].get(mode="fill", fill_value=0)
    out = jax.vmap(take)(part.targets, whole)
    out = out.reshape(*part.response.shape, *rest)
    return layout.constrain(out, "rows", *[None] * (1 + len(rest)))


def only(part: Part | None, x: Array) -> Array:
    """x [B T] on the rows of a part, 0 elsewhere; x itself without a part."""
    return x if part is None else jnp.where(part.rows[:, None], x, 0.0)


def split(x: Array, shards: int) -> Array:
    """[B ...] as [S B/S ...]: the rows of each shard."""
    x = x.reshape(shards, -1, *x.shape[1:])
    return layout.constrain(x, "rows", *[None] * (x.ndim - 1))


def join(x: Array) -> Array:
    """The inverse of `split`."""
    x = x.reshape(-1, *x.shape[2:])
    return layout.constrain(x, "rows", *[None] * (x.ndim - 1))


def is_packed(model: Model, config: Config) -> bool:
    """Whether the rows of this model are packed."""
    return model.packs and config.layout == "packed"


def part_rows(config: Config, rows: int, length: int) -> int:
    """Packed rows of a part, for so many rows of L tokens.

    >>> part_rows(Config(), 16, 384), part_rows(Config(), 16, 33)
    (2, 8)
    >>> part_rows(Config(tokens_per_microbatch=1200), 16, 384)
    3
    """
    if config.tokens_per_microbatch:
        return min(max(config.tokens_per_microbatch // length, 1), rows)
    parts = config.microbatches
    if parts == 1:
        parts = min(PARTS, max(rows * length // LEAST_TOKENS, 1))
    return -(-rows // parts)


def make_sum(
    model: Model,
    config: Config,
    rollout: Rollout,
    mask: Array,
    *,
    group_size: int,
    axes: tuple[str | None, ...] = (),
) -> Callable[[Callable[[Part | None], PyTree]], PyTree]:
    """The function `total(fn)`: the sum of fn(part) over the parts of the rows, or
    fn(None) if rows are not packed. A gradient is taken inside of `fn`.

    Args:
      mask: [B T], 1 on the response tokens that count.
      axes: named axes whose programs run the loop equally often.
    """
    if not is_packed(model, config):
        return lambda fn: fn(None)
    shards = layout.row_shards(rollout.tokens.shape[0] // group_size)
    size = part_rows(config, rollout.tokens.shape[0] // shards, rollout.tokens.shape[1])
    whole = lay_out(
        rollout.attend,
        mask,
        group_size=group_size,
        multiple=size,
        shards=shards,
        axes=tuple(axis for axis in axes if axis is not None),
    )
    times = -(-whole.count // size)

    def total(fn: Callable[[Part | None], PyTree]) -> PyTree:
        one = lambda i: fn(take_part(whole, rollout, i, size))
        if whole.slots.shape[1] == size:  # a loop would hold the sum twice
            return one(jnp.zeros((), jnp.int32))
        one = jax.jit(one, inline=True)  # traced once, for its shapes and for the loop

        def add(state: tuple[Array, Any]):
            i, found = state
            return i + 1, jax.tree.map(jnp.add, found, one(i))

        zero = jnp.zeros((), jnp.int32)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, zero))
        with jax.named_scope("parts"):
            return jax.lax.while_loop(lambda state: state[0] < times, add, (zero, zeros))[1]

    return total


def differentiable(
    total: Callable, fn: Callable[[Params, Part | None], Array]
) -> Callable[[Params], Array]:
    """The sum of fn(params, part) as a function of `params` that has a gradient: the
    backward pass computes each part once more.
    """

    @jax.custom_vjp
    def whole(params: Params) -> Array:
        return total(partial(fn, params))

    def backward(params: Params, cotangent: Array) -> tuple[Params]:
        one = lambda part: jax.vjp(lambda params: fn(params, part), params)[1](cotangent)
        return total(one)

    whole.defvjp(lambda params: (whole(params), params), backward)
    return whole
