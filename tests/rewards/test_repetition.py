import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo.rewards import in_program, text
from jaxppo.rewards.metrics import Text


def rows(*ids, width=6) -> Text:
    """What stands behind a text's end repeats its first token, and does not count."""
    tokens = np.array(
        [[*row, *[row[0] if row else 0] * (width - len(row))] for row in ids], np.int32
    )
    return Text(jnp.asarray(tokens), jnp.asarray([len(row) for row in ids], jnp.int32))


def test_by_hand():
    """1 2 1 2 1: bigrams 12 21 12 21, two of four stood before. 1 1 1: 11 11, one of two. Without
    bigrams nothing repeats.
    """
    some = rows([1, 2, 1, 2, 1], [1, 1, 1], [1, 2, 3], [1], [])
    assert in_program.repeats(some, 2).tolist() == [2, 1, 0, 0, 0]
    assert in_program.repeated(some, 2).tolist() == [0.5, 0.5, 0.0, 0.0, 0.0]
    assert in_program.distinct(some, 2).tolist() == [0.5, 0.5, 1.0, 0.0, 0.0]
    np.testing.assert_allclose(in_program.repeated(some, 1), [3 / 5, 2 / 3, 0, 0, 0], rtol=1e-6)
    assert in_program.repeated(some, 7).tolist() == [0.0] * 5  # longer than any text


@pytest.mark.parametrize("n", [1, 2, 3])
def test_as_on_the_host(n):
    rng = np.random.default_rng(n)
    ids = [rng.integers(0, 4, rng.integers(0, 13)).tolist() for _ in range(1000)]
    some = rows(*ids, width=12)
    spell = lambda row: " ".join(map(str, row))
    np.testing.assert_allclose(
        in_program.repeated(some, n), [text.repeated(spell(row), n) for row in ids], atol=1e-6
    )
    np.testing.assert_allclose(
        in_program.distinct(some, n), [text.distinct([row], n) for row in ids], atol=1e-6
    )


def test_as_a_penalty(llama):
    """The end of text is no part of what is said: 3 3 3 and its end have one repeated bigram of
    two, not of three.
    """
    rolled = toys.roll(llama, toys.prompts())
    said = jnp.zeros((8, 5), jnp.int32).at[:, :4].set(jnp.array([3, 3, 3, toys.EOS]))
    rolled = rolled.replace(
        tokens=jnp.concatenate([rolled.tokens[:, :4], said], 1),
        mask=jnp.ones((8, 5)).at[:, 4].set(0.0),
    )
    scores, valid = jax.jit(in_program.repetition(eos=toys.EOS, scale=3.0))({}, rolled)
    assert scores.tolist() == [-1.5] * 8 and valid.all()
