from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxppo import sampling
from jaxppo.config import Config


def kept(probabilities, **options) -> list[int]:
    logits = jnp.log(jnp.array([probabilities]))
    return np.flatnonzero(np.isfinite(sampling.keep_set(logits, **options)[0])).tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [2]),
        ({"top_k": 2}, [1, 2]),
        ({"top_k": 9}, [0, 1, 2, 3]),  # more than there are
        ({"top_p": 0.3}, [2]),  # .4 reaches .3
        ({"top_p": 0.5}, [1, 2]),  # .4 < .5 <= .7
        ({"top_p": 0.85}, [1, 2, 3]),  # .7 < .85 <= .9
        ({"top_p": 1e-6}, [2]),  # the likeliest always stays
        ({"top_k": 2, "top_p": 0.5}, [2]),  # of .3 + .4 the .4 is .57 already
    ],
)
def test_keep_set(options, expected, strict):
    assert kept([0.1, 0.3, 0.4, 0.2], **options) == expected


def test_ties_at_the_border_are_kept():
    assert kept([0.25, 0.5, 0.25], top_k=2) == [0, 1, 2]
    assert kept([0.25, 0.5, 0.25], top_p=0.6) == [0, 1, 2]


def test_top_p_may_be_traced():
    logits = jnp.log(jnp.array([[0.1, 0.3, 0.6]]))
    out = jax.jit(lambda p: sampling.keep_set(logits, top_p=p))
    assert np.isfinite(out(0.5)).tolist() == [[False, False, True]]
    assert np.isfinite(out(0.8)).tolist() == [[False, True, True]]
    assert np.isfinite(out(1.0)).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(0.05, 0.95))
def test_keep_set_against_a_loop(seed, top_k, top_p):
    logits = np.random.default_rng(seed).standard_normal(12).astype(np.float32)
    order = np.argsort(-logits)[:top_k]
    p = np.exp(logits[order]) / np.exp(logits[order]).sum()
    want, reached = [], 0.0
    for token, probability in zip(order, p, strict=True):
        if abs(reached - top_p) < 1e-5:  # a border that rounding may move
            return
        if reached < top_p:
            want.append(int(token))
        reached += probability
    got = sampling.keep_set(jnp.asarray(logits)[None], top_k=top_k, top_p=top_p)[0]
    assert np.flatnonzero(np.isfinite(got)).tolist() == sorted(want)
    np.testing.assert_array_equal(np.asarray(got)[want], logits[want])  # what stays is unchanged


def test_temper(strict):
    assert sampling.temper(jnp.array([[1.0, -2.0]]), temperature=2.0).tolist() == [[0.5, -1.0]]


def test_noise_hangs_on_the_key_and_the_row_alone():
    key = jax.random.key(0)
    four = sampling.row_uniforms(key, jnp.arange(4), 6)
    assert four.shape == (4, 6)
    assert (four >= 0).all() and (four < 1).all()
    assert len(np.unique(four)) == 24
    np.testing.assert_array_equal(
        sampling.row_uniforms(key, jnp.array([2, 0]), 6), four[jnp.array([2, 0])]
    )
    assert not np.isin(sampling.row_uniforms(jax.random.key(1), jnp.arange(4), 6), four).any()


@pytest.mark.ci
def test_draw_stays_in_the_keep_set():
    n = 20_000
    logits = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4]]))
    limited = jnp.broadcast_to(sampling.keep_set(logits, top_k=2), (n, 4))
    tokens = sampling.draw(limited, jax.random.uniform(jax.random.key(0), (n,)))
    counts = np.bincount(tokens, minlength=4)
    assert counts[:2].tolist() == [0, 0]
    # 4/7 of 20 000 = 11 429, standard deviation √(n p q) = 70
    assert abs(counts[3] - 11_429) < 350


def test_greedy_takes_the_likeliest_and_no_noise(strict):
    logits = jnp.array([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    for uniform in (0.0, 0.99):
        token = sampling.draw(logits, jnp.full((2,), uniform), greedy=True)
        assert token.tolist() == [1, 0] and token.dtype == jnp.int32


def test_has_keep_set():
    assert not sampling.has_keep_set(Config())
    assert sampling.has_keep_set(Config(top_k=1))
    assert sampling.has_keep_set(Config(top_p=0.9))


HELD = Config(min_tokens=2, eos=1)


def test_the_end_of_text_is_barred_before_min_tokens(strict):
    """At positions 0 and 1, not at 2; a scalar is the position of all rows."""
    logits = jnp.tile(jnp.array([[0.0, 9.0, 1.0]]), (3, 1))
    held = sampling.process(logits, sample=HELD, t=jnp.arange(3))
    assert held.tolist() == [[0.0, -np.inf, 1.0]] * 2 + [[0.0, 9.0, 1.0]]
    assert sampling.bar_eos(logits, jnp.array(2), sample=HELD) is not logits
    np.testing.assert_array_equal(sampling.bar_eos(logits, jnp.array(2), sample=HELD), logits)
    np.testing.assert_array_equal(
        sampling.bar_eos(logits, jnp.array(0), sample=HELD)[:, 1], [-np.inf] * 3
    )


def test_the_keep_set_is_chosen_without_a_barred_end_of_text():
    """The end of text has .7 of the probability: top-k 1 takes the likeliest of the others."""
    logits = jnp.log(jnp.array([[0.1, 0.7, 0.2]] * 2))
    kept = sampling.process(logits, sample=replace(HELD, top_k=1), t=jnp.array([0, 2]))
    assert np.isfinite(kept).tolist() == [[False, False, True], [False, True, False]]


def test_a_nucleus_of_the_end_of_text_alone_is_dropped_while_it_is_barred():
    logits = jnp.zeros((3, 3))
    allowed = jnp.array([[False, True, False], [True, True, False], [False, True, False]])
    kept = sampling.process(logits, sample=HELD, allowed=allowed, t=jnp.array([0, 0, 2]))
    assert np.isfinite(kept).tolist() == [
        [True, False, True],
        [True, False, False],
        [False, True, False],
    ]


def test_without_an_end_of_text_nothing_is_barred():
    assert not sampling.bars_eos(Config(min_tokens=3, eos=-1))
    assert not sampling.bars_eos(Config(min_tokens=0, eos=1))
    logits = jnp.zeros((1, 2))
    assert sampling.process(logits, sample=Config(min_tokens=3, eos=-1)) is logits


# Tokens 2 and then 3 complete the stop text; token 0 leaves the state as it is.
STOPS = sampling.Stops(
    column=jnp.array([0, 1, 2, 3]),
    next=jnp.array([[0, 0, 1, 0], [1, 0, 1, 0]]),
    ends=jnp.array([[False] * 4, [False, False, False, True]]),
)


@pytest.mark.parametrize(
    ("tokens", "eos", "expected"),
    [
        ([2, 3], 1, [False, True]),
        ([3, 2, 0, 3], 1, [False, False, False, True]),
        ([2, 1], 1, [False, True]),  # the end of text
        ([2, 1, 3], -1, [False, False, False]),
    ],
)
def test_the_end_of_a_response(tokens, eos, expected, strict):
    state, found = jnp.zeros((1,), jnp.int32), []
    for t, token in enumerate(tokens):
        ended, state = sampling.end_of_response(
            jnp.array([token]), jnp.array(t), eos=eos, sample=Config(), stops=STOPS, state=state
        )
        found.append(bool(ended[0]))
    assert found == expected


def test_a_stop_text_before_min_tokens_is_no_end():
    """Tokens 0 to 2 of a response cannot end it; the automaton goes on."""
    state, found = jnp.zeros((1,), jnp.int32), []
    for t, token in enumerate([2, 3, 2, 3]):
        ended, state = sampling.end_of_response(
            jnp.array([token]),
            jnp.array(t),
            eos=1,
            sample=Config(min_tokens=3),
            stops=STOPS,
            state=state,
        )
        found.append(bool(ended[0]))
    assert found == [False, False, False, True]


def test_any_of_several_ends_of_text_ends_a_response(strict):
    tokens = jnp.array([0, 1, 2, 3])
    for eos, expected in (((1, 3), [0, 1, 0, 1]), ((2,), [0, 0, 1, 0]), (2, [0, 0, 1, 0])):
        ended, _ = sampling.end_of_response(tokens, jnp.array(0), eos=eos, sample=Config())
        assert ended.tolist() == expected, eos


def test_min_tokens_bars_all_ends_of_text(strict):
    several = replace(HELD, eos=(0, 2))
    assert sampling.bars_eos(several) and not sampling.bars_eos(replace(HELD, eos=()))
    held = sampling.process(jnp.zeros((2, 4)), sample=several, t=jnp.array([1, 2]))
    assert held.tolist() == [[-np.inf, 0.0, -np.inf, 0.0], [0.0] * 4]
