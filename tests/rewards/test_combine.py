import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo.rewards import combine
from jaxppo.rewards.in_program import count_token

A, B = jnp.array([1.0, 2.0, 3.0, jnp.nan]), jnp.array([10.0, 20.0, jnp.nan, 40.0])


def plain(scores):
    """The scores times the factor that stands in the parameters, if any; valid where they are
    numbers.
    """
    return lambda params, rollout: (
        scores * params.get("factor", 1.0),
        jnp.isfinite(scores.reshape(4, -1)).all(1),
    )


def rolled(task=None):
    rows = toys.roll(toys.llama(), toys.prompts(4))
    return rows.replace(extra={} if task is None else {"task": jnp.asarray(task)})


@pytest.mark.ci
def test_a_weighted_sum():
    """2 a − b / 2 is −3 and −6; rows 2 and 3 lack one part each."""
    reward = combine.weighted_sum({"a": (2.0, plain(A)), "b": (-0.5, plain(B))})
    scores, valid = jax.jit(reward)({}, rolled())
    assert scores[:2].tolist() == [-3.0, -6.0] and valid.tolist() == [True, True, False, False]
    # a factor 3 for b alone: 2 − 15, 4 − 30
    assert reward({"b": {"factor": 3.0}}, rolled())[0][:2].tolist() == [-13.0, -26.0]


def test_columns_of_a_part_are_summed():
    both = jnp.stack([A, A + 1], 1)
    scores, _ = combine.weighted_sum({"a": (2.0, plain(both))})({}, rolled())
    assert scores[:3].tolist() == [6.0, 10.0, 14.0]  # 2 (1 + 2), 2 (2 + 3), 2 (3 + 4)


def test_each_row_is_scored_by_its_task():
    """Row 2 is NaN in b and row 3 in a: of their own tasks they are good; turned around both are
    not.
    """
    reward = combine.by_task([plain(A), plain(B)])
    scores, valid = reward({}, rolled([0, 1, 0, 1]))
    np.testing.assert_array_equal(jax.jit(reward)({}, rolled([0, 1, 0, 1]))[0], scores)
    assert scores.tolist() == [1.0, 20.0, 3.0, 40.0] and valid.all()
    _, valid = reward({}, rolled([0, 1, 1, 0]))
    assert valid.tolist() == [True, True, False, False]
    assert reward({"1": {"factor": 2.0}}, rolled([0, 1, 0, 1]))[0].tolist() == [
        1.0,
        40.0,
        3.0,
        80.0,
    ]


def test_a_task_without_reward_is_invalid():
    scores, valid = combine.by_task([plain(A)])({}, rolled([0, 1, -1, 0]))
    assert valid.tolist() == [True, False, False, False] and scores[:3].tolist() == [1.0, 0.0, 0.0]


def test_two_tasks_count_two_tokens():
    """Two tasks that ask for two tokens: what counts in one does not in the other."""
    rows = rolled([0, 1, 0, 1])
    scores, _ = combine.by_task(
        [count_token(3), combine.weighted_sum({"four": (2.0, count_token(4))})]
    )({}, rows)
    hits = lambda token: np.asarray(((rows.response == token) * rows.mask).sum(1))
    np.testing.assert_array_equal(scores, np.where(np.arange(4) % 2, 2 * hits(4), hits(3)))
