from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo.decoding import compaction
from jaxppo.decoding.compaction import Size


@pytest.mark.parametrize(
    ("groups", "group_size", "length", "want"),
    [
        (4, 8, 1024, [(4, 8), (4, 4), (4, 2)]),  # 8 rows are the fewest
        (64, 1, 256, [(64, 1), (32, 1), (16, 1), (8, 1)]),  # alone: whole groups leave
        (16, 3, 256, [(16, 3), (8, 3), (4, 3)]),  # 12 rows; the next would be 6
        (5, 3, 256, [(5, 3)]),  # neither divides
        (4, 8, 32, [(4, 8)]),  # too short
    ],
)
def test_half_the_rows_each_time(groups, group_size, length, want):
    assert compaction.sizes(groups, group_size, length) == [Size(*size) for size in want]


def test_blocks_split_where_their_rows_go_on():
    """Three blocks of four rows. Of the first all go on, of the second none, of the third one: in
    blocks of two, 2 + 0 + 1.
    """
    live = jnp.array([[[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]]], bool)
    assert bool(compaction.fits(live, Size(3, 2))) and not bool(compaction.fits(live, Size(2, 2)))
    rows, prompts = compaction.choose(live, Size(3, 2))
    assert rows.tolist() == [[0, 1, 2, 3, 10, 8]]
    assert prompts.tolist() == [[0, 0, 2]]


def test_every_shard_has_to_fit():
    live = jnp.array([[[True], [False]], [[True], [True]]])
    assert not bool(compaction.fits(live, Size(1, 1)))
    assert bool(compaction.fits(live.at[1, 0].set(False), Size(1, 1)))
    rows, prompts = compaction.choose(live.at[1, 0].set(False), Size(1, 1))
    assert rows.tolist() == prompts.tolist() == [[0], [1]]  # numbers within the shard


def test_put_is_the_inverse_of_take():
    x, rows = jnp.arange(8.0).reshape(8, 1), jnp.array([[3, 0], [1, 2]])
    taken = compaction.take(x, rows)
    assert taken[:, 0].tolist() == [3, 0, 5, 6]  # rows 4 to 7 are the second shard's
    np.testing.assert_array_equal(
        compaction.put(x, rows, 10 + taken)[:, 0], [10, 1, 2, 13, 4, 15, 16, 7]
    )


@pytest.mark.ci
@pytest.mark.parametrize(
    ("network", "group_size"),
    [
        ("window", 4),
        ("scan", 1),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in (("plain", 1), ("plain", 4), ("window", 1), ("scan", 4))
        ),
    ],
)
def test_rows_that_have_ended_leave_the_others_as_they_were(monkeypatch, group_size, network):
    """Rows of 1 to 70 tokens, decoded by 16, 8, 4 and 2: tokens are those of the plain loop,
    and log-probs and values within float32 rounding.
    """
    monkeypatch.setattr(compaction, "LEAST_ROWS", 2)
    shape = replace(toys.LLAMA, num_layers=2, max_length=128)
    if network == "window":
        shape = replace(shape, window=30)
    toy = toys.make(shape, scan=network == "scan")
    settings = replace(toys.SETTINGS, batch_size=16, response_length=70)
    prompts = toys.grouped(group_size, 16)
    options = {"length": 70, "group_size": group_size, "key": 3}
    packed = toys.roll(toy, prompts, settings, **options)
    plain = toys.roll(toy, prompts, replace(settings, layout="dense"), **options)
    lengths = np.sort(np.asarray(plain.mask.sum(1)))
    assert lengths[0] < 5 and lengths[7] < 25 < lengths[-1]
    np.testing.assert_array_equal(packed.tokens, plain.tokens)
    np.testing.assert_array_equal(packed.finished, plain.finished)
    toys.assert_close(packed.replace(tokens=None), plain.replace(tokens=None), atol=1e-5)


@pytest.mark.ci
@pytest.mark.parametrize("ends", ["text", "limit"])
def test_only_live_rows_are_decoded(monkeypatch, ends):
    """16 rows of which 15 end at their first token, or have limits of 1, 5, 9, ...: what the
    network reads afterwards are 2 rows.
    """
    monkeypatch.setattr(compaction, "LEAST_ROWS", 2)
    toy, read = toys.llama(), []

    def apply(params, tokens, attend, **options):
        if options.get("cache") is not None and tokens.shape[1] == 1:
            jax.debug.callback(lambda: read.append(tokens.shape[0]))
        return toy.model.apply(params, tokens, attend, **options)

    settings = replace(toys.SETTINGS, batch_size=16, response_length=64, min_tokens=0)
    prompts, eos = toys.grouped(1, 16), settings.eos
    if ends == "limit":
        prompts, eos = prompts.replace(extra={"max_tokens": 1 + 4 * jnp.arange(16)}), -1
    watched = toys.Toy(toy.config, toy.model._replace(apply=apply), toy.params)
    rolled = toys.roll(watched, prompts, settings, length=64, key=3, eos=eos)
    jax.effects_barrier()
    lengths = np.asarray(rolled.mask.sum(1))
    # after token t, rows longer than t go on; half of the rows suffice as soon as they hold them
    want, rows = [], 16
    for t in range(1, int(lengths.max())):
        while rows > 2 and (lengths > t).sum() <= rows // 2:
            rows //= 2
        want.append(rows)
    assert read == want and want[-1] == 2
