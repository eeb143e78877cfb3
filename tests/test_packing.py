from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxppo import models, packing
from jaxppo.config import Config
from jaxppo.models import shapes
from jaxppo.models.attention import packed_mask

N, G, P, T = 8, 4, 4, 6  # two groups of four rows
LENGTH = P + T


def rows_of(prompts, responses, group_size=G):
    """attend [B L] and mask [B T] of rows with these lengths."""
    columns = np.arange(LENGTH)[None]
    own = np.repeat(prompts, group_size)[:, None]
    ends = P + np.asarray(responses)[:, None]
    attend = (columns >= P - own) & (columns < ends)
    return jnp.asarray(attend), jnp.asarray(attend[:, P:], jnp.float32)


@partial(jax.jit, static_argnames=("group_size", "multiple", "shards"))
def laid_out(attend, mask, group_size=G, multiple=1, shards=1):
    return packing.lay_out(attend, mask, group_size=group_size, multiple=multiple, shards=shards)


@partial(jax.jit, static_argnames="size")
def part_of(whole, rolled, number, size=2):
    return packing.take_part(whole, rolled, number, size)


def numbered(attend, mask):
    """A rollout whose token in row i and column c is i * L + c."""
    rolled = toys.roll(toys.llama(), toys.prompts(), eos=-1)
    tokens = jnp.arange(N * LENGTH, dtype=jnp.int32).reshape(N, LENGTH)
    return rolled.replace(tokens=tokens, attend=attend, mask=mask)


def test_groups_in_turn_the_longest_first_beside_their_prompt():
    """Prompts of 3 and 2 tokens, packed rows of 8 slots and at most 5 response tokens. Group 0 has
    3 + 6 tokens, group 1 has 2 + 3. The 4 tokens of row 0 need 3 + 3 slots. Row 1 (2 tokens, 1
    slot) would fit beside its prompt by slots, but 4 + 2 > 5: a packed row of its own, of 3 + 1
    slots. Row 2 needs 2 + 2: there are 4. Row 3 has nothing.
    """
    found = packing.place(jnp.array([3, 2]), jnp.array([4, 2, 3, 0]), capacity=8, most=5)
    assert found.row.tolist() == [0, 1, 1, 4]
    assert found.prompt.tolist()[:3] == [0, 0, 4]
    assert found.first.tolist()[:3] == [3, 3, 6]
    assert found.read.tolist()[:3] == [0, 0, 2]
    assert found.owner.tolist() == [True, True, True, False]


def test_equal_groups_are_not_mixed():
    """Two groups with a prompt of 4 tokens and responses of 3 and 2. The first takes 4 + 2 + 1
    slots of 12; if the two longest came first, each packed row would hold both prompts.
    """
    found = packing.place(jnp.array([4, 4]), jnp.array([3, 2, 3, 2]), capacity=12, most=9)
    assert found.row.tolist() == [0, 0, 1, 1] and found.owner.sum() == 2


lengths = st.tuples(
    st.lists(st.integers(1, P), min_size=N // G, max_size=N // G),
    st.lists(st.integers(0, T), min_size=N, max_size=N),
)


@pytest.mark.ci
@given(lengths)
@settings(max_examples=60, deadline=None)
def test_any_lengths(drawn):
    """Every token stands somewhere once, but for each response's last; a packed row holds a
    prompt once; nobody sees another response, or too much or too little of the own row.
    """
    prompts, responses = drawn
    attend, mask = rows_of(prompts, responses)
    whole = laid_out(attend, mask, multiple=2)
    rolled = numbered(attend, mask)
    tokens_seen, targets_seen, rows_seen = [], [], []
    count = int(whole.count)
    for number in range(whole.slots.shape[1] // 2):
        part = jax.tree.map(np.asarray, part_of(whole, rolled, number))
        if 2 * number >= count:
            assert not part.attend.any() and (part.targets == N * T).all()
        visible = np.asarray(packed_mask(*(jnp.asarray(x) for x in part[1:4]), None))
        for packed in range(2):
            here = np.flatnonzero(part.attend[packed])
            tokens = part.tokens[packed]
            assert len(set(tokens[here])) == len(here)
            responding = [x for x in tokens[here] if x % LENGTH >= P]
            assert len(responding) <= T and len(here) <= LENGTH
            tokens_seen += responding
            for slot in here:
                row, column = divmod(int(tokens[slot]), LENGTH)
                seen = tokens[visible[packed, slot]]
                if column >= P:
                    own = {row * LENGTH + c for c in range(P, column + 1)}
                    assert {x for x in seen if x % LENGTH >= P} == own
                else:
                    assert all(x % LENGTH <= column for x in seen)
                before = {x % LENGTH for x in seen if x % LENGTH < P}
                assert before == set(range(P - prompts[row // G], min(column + 1, P)))
                assert all(x // LENGTH // G == row // G for x in seen)
                assert part.positions[packed, slot] == column - P + prompts[row // G]
            for target, read, token in zip(
                part.targets.reshape(2, T)[packed],
                part.reads[packed],
                part.response[packed],
                strict=True,
            ):
                assert 0 <= read < LENGTH  # also where nothing is read: NaN would come back
                if target == N * T:
                    continue
                row, t = divmod(int(target), T)
                targets_seen.append(target)
                assert token == row * LENGTH + P + t
                before = int(tokens[read])  # the token that predicts it
                assert before % LENGTH == P + t - 1 and before // LENGTH // G == row // G
                assert t == 0 or before // LENGTH == row
        rows_seen += np.flatnonzero(part.rows).tolist()
    assert sorted(tokens_seen) == [
        i * LENGTH + P + t for i, n in enumerate(responses) for t in range(n - 1)
    ]
    assert sorted(targets_seen) == [i * T + t for i, n in enumerate(responses) for t in range(n)]
    assert sorted(rows_seen) == [i for i, n in enumerate(responses) if n]
    assert count <= sum(n > 0 for n in responses)


def test_short_responses_of_a_group_share_a_packed_row():
    """Two groups of four, prompts of 8 tokens, responses of one or two in 10 slots, of which 5 may
    have logits. Group 1 has more tokens: 8 + 1 + 1 slots, 2 + 2 + 1 tokens; its fourth response, of
    a token, is the sixth. Group 0: 8 + 0 slots, 4 tokens.
    """
    responses = jnp.array([1, 1, 1, 1, 2, 2, 1, 1])
    columns = jnp.arange(10)[None]
    attend = columns < 8 + responses[:, None]
    mask = attend[:, 8:].astype(jnp.float32)
    assert packing.most_targets(10, 2, G) == 5
    whole = laid_out(attend, mask)
    assert np.asarray(whole.places.row).tolist() == [[2, 2, 2, 2, 0, 0, 0, 1]]
    assert whole.targets.shape == (1, N, 5) and int(whole.count) == 3
    tokens = jnp.arange(80, dtype=jnp.int32).reshape(N, 10)
    rolled = numbered(attend, mask).replace(tokens=tokens)
    parts = [part_of(whole, rolled, number) for number in range(2)]
    back = [packing.scatter(x, x.response.astype(jnp.float32), (N, 2)) for x in parts]
    np.testing.assert_array_equal(sum(back), tokens[:, 8:] * mask)


def test_two_rows_with_short_responses_share_a_packed_row():
    """Eight prompts of 4 tokens, responses of 2: 4 + 1 slots of 10, 2 tokens of at most 4."""
    columns = jnp.arange(10)[None]
    attend = jnp.broadcast_to((columns >= 4) & (columns < 10), (N, 10))
    whole = laid_out(attend, jnp.ones((N, 2)), group_size=1)
    assert np.asarray(whole.places.row).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]


def test_full_rows_take_as_many_packed_rows():
    attend, mask = rows_of([P, P], [T] * N)
    assert int(laid_out(attend, mask).count) == N


def test_no_rows_no_packed_rows():
    attend, mask = rows_of([P, P], [0] * N)
    assert int(laid_out(attend, mask).count) == 0


def test_shards_pack_their_own_rows():
    """Two groups of two a shard, 10 slots, at most 6 response tokens. The first shard's responses
    of one token need no slots: both prompts, 8 slots, in one packed row. The second has three full
    responses, 4 + 5 slots each, and one of a token, which the 6 tokens leave no room for.
    """
    attend, mask = rows_of([4] * 4, [1, 1, 1, 1, 6, 6, 6, 1], group_size=2)
    whole = laid_out(attend, mask, group_size=2, shards=2)
    assert whole.slots.shape == (2, 4, LENGTH)
    assert np.asarray(whole.places.row).tolist() == [[0, 0, 0, 0], [0, 1, 2, 3]]
    assert int(whole.count) == 4  # of the fuller shard


@pytest.mark.ci
def test_programs_of_one_axis_run_equally_often():
    """Two runs: responses that fill eight packed rows, and none."""
    runs = [rows_of([P, P], lengths) for lengths in ([T] * N, [0] * N)]
    attend, mask = (jnp.stack(x) for x in zip(*runs, strict=True))
    count = lambda *run: packing.lay_out(*run, group_size=G, axes=("runs",)).count
    assert jax.vmap(count, axis_name="runs")(attend, mask).tolist() == [N, N]


def test_numbers_go_back_to_their_rows():
    attend, mask = rows_of([2, 3], [3, 0, 6, 1, 2, 2, 0, 5])
    whole, rolled = laid_out(attend, mask), numbered(attend, mask)
    total = jnp.zeros((N, T))
    for number in range(N // 2):
        part = part_of(whole, rolled, number)
        total = total + packing.scatter(part, part.response.astype(jnp.float32), (N, T))
    np.testing.assert_array_equal(total, rolled.response * mask)


def test_what_the_rows_have_comes_to_their_parts():
    """`gather` and `scatter` are inverse, for numbers and vectors; empty places get 0."""
    attend, mask = rows_of([2, 3], [3, 0, 6, 1, 2, 2, 0, 5])
    whole, rolled = laid_out(attend, mask), numbered(attend, mask)
    numbers = jnp.arange(1.0, N * T * 2 + 1).reshape(N, T, 2)
    total = jnp.zeros((N, T, 2))
    for number in range(N // 2):
        part = part_of(whole, rolled, number)
        found = packing.gather(part, numbers)
        exists = part.targets.reshape(2, T) < N * T
        assert found.shape == (2, T, 2) and not (np.asarray(found) == 0)[exists].any()
        assert not np.asarray(found)[~np.asarray(exists)].any()
        np.testing.assert_array_equal(packing.gather(part, numbers[..., 0]), found[..., 0])
        total = total + packing.scatter(part, found, (N, T))
    np.testing.assert_array_equal(total, numbers * mask[..., None])


def test_what_reads_nothing_stays_within_its_row():
    """Group 0, of one prompt token, has no responses. The prompts of groups 1 and 2, two tokens of
    row 2's three and none of row 4's one fill a packed row: 4 + 4 + 2 = 10 slots. What empty
    places read, multiplied by weights of 0, must not be NaN.
    """
    attend, mask = rows_of([1, 4, 4, 4], [0, 0, 3, 0, 1, 0, 0, 0], group_size=2)
    whole = laid_out(attend, mask, group_size=2)
    part = part_of(whole, numbered(attend, mask), 0, size=1)
    assert int(whole.count) == 1 and part.attend.all()
    assert part.reads.tolist() == [[3, 4, 5, 9, 0, 0]]


def test_parts_of_a_batch():
    assert packing.part_rows(Config(microbatches=4), 16, 8) == 4
    assert packing.part_rows(Config(tokens_per_microbatch=7), 16, 8) == 1
    assert packing.part_rows(Config(tokens_per_microbatch=10**6), 16, 8) == 16
    assert packing.part_rows(Config(), 16, 1536) == 2  # an eighth
    assert packing.part_rows(Config(), 16, 40) == 8  # 640 tokens: two parts of 256 or more


@pytest.mark.ci
def test_the_loop_runs_as_often_as_there_are_parts(monkeypatch):
    """Three full responses, and one token that finds no room beside them: four packed rows, one a
    part. Dense, or with all tokens at a time, there is one part.
    """
    monkeypatch.setattr(packing, "LEAST_TOKENS", LENGTH)
    monkeypatch.setattr(packing, "PARTS", N)
    attend, mask = rows_of([P, P], [6, 6, 1, 0, 0, 0, 0, 6])
    rolled, model = numbered(attend, mask), toys.llama().model

    def times(config):
        total = packing.make_sum(model, config, rolled, mask, group_size=G)
        return jax.jit(lambda: total(lambda part: jnp.ones(())))()

    assert float(times(Config())) == 4
    assert float(times(Config(layout="dense"))) == 1
    assert float(times(Config(tokens_per_microbatch=10**6))) == 1


@pytest.mark.parametrize("kind", ["gru", "lstm", "convolution", "window"])
def test_other_networks_stay_dense(kind):
    model = models.make(shapes.network(kind, vocab_size=11, width=16))
    assert not packing.is_packed(model, Config())
    assert packing.is_packed(toys.llama().model, Config())
