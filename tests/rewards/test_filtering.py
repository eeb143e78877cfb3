import jax.numpy as jnp

from jaxppo.rewards import shaping


def test_groups_with_one_score_teach_nothing():
    """The third group differs in an invalid row only; the fourth has one valid row."""
    scores = jnp.array([1.0, 2.0, 3.0, 3.0, 1.0, 9.0, 4.0, 5.0])
    valid = jnp.array([True, True, True, True, True, False, False, True])
    assert shaping.informative(scores, valid, group_size=2).tolist() == [True, True, *[False] * 6]


def test_an_invalid_row_of_a_useful_group_stays_out():
    valid = jnp.array([True, True, False])
    assert shaping.informative(jnp.array([1.0, 2.0, 0.0]), valid, group_size=3).tolist() == [
        True,
        True,
        False,
    ]


def test_useful_groups_come_first_and_in_order():
    useful = jnp.array(
        [0, 0, 1, 0, 0, 0, 1, 1], bool
    )  # groups 1 and 3; a row of group 1 is invalid
    assert shaping.first_groups(useful, group_size=2, rows=4).tolist() == [2, 3, 6, 7]
    assert shaping.first_groups(useful, group_size=2, rows=6).tolist() == [2, 3, 6, 7, 0, 1]


def test_take_rows():
    tree = {"a": jnp.arange(4), "b": jnp.arange(8).reshape(4, 2)}
    got = shaping.take_rows(tree, jnp.array([3, 0]))
    assert got["a"].tolist() == [3, 0]
    assert got["b"].tolist() == [[6, 7], [0, 1]]
