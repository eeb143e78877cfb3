import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo import algorithms, kl, masked, ppo
from jaxppo.config import Config
from jaxppo.rewards import in_program, shaping
from jaxppo.rewards.shaping import penalise_missing_eos, token_rewards
from jaxppo.types import Environment, Rollout

MASK = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])


def rollout(logprobs, ref_logprobs, tokens=None) -> Rollout:
    tokens = jnp.full((3, 4), 1) if tokens is None else tokens
    return Rollout(
        tokens,
        tokens > -1,
        MASK,
        jnp.array([True, False, False]),
        jnp.zeros((3, 3)),
        logprobs,
        ref_logprobs,
        jnp.zeros((3, 3)),
    )


ROLLOUT = rollout(
    jnp.array([[-1.0, -2.0, 9.0], [-1.0, -1.0, -1.0], [5.0, 5.0, 5.0]]),
    jnp.array([[-2.0, -1.0, 0.0], [-1.0, -3.0, -1.0], [0.0, 0.0, 0.0]]),
)


def test_the_score_is_on_the_last_acting_token(strict):
    """Not on the pad after it, and nowhere in a row without tokens."""
    out = token_rewards(jnp.array([7.0, 8.0, 9.0]), ROLLOUT, kl_coef=0.0, kl=kl.k1)
    assert out.tolist() == [[0.0, 7.0, 0.0], [0.0, 0.0, 8.0], [0.0, 0.0, 0.0]]


def test_the_penalty_is_on_every_acting_token(strict):
    out = token_rewards(jnp.array([7.0, 8.0, 9.0]), ROLLOUT, kl_coef=jnp.float32(0.5), kl=kl.k1)
    # k1: −1 + 2 = 1, −2 + 1 = −1; 0, −1 + 3 = 2, 0; halves of them, negative
    assert out.tolist() == [[-0.5, 7.5, 0.0], [0.0, -1.0, 8.0], [0.0, 0.0, 0.0]]


def test_the_estimator_is_an_argument():
    out = token_rewards(jnp.zeros(3), ROLLOUT, kl_coef=1.0, kl=kl.k2)
    np.testing.assert_allclose(out, [[-0.5, -0.5, 0.0], [0.0, -2.0, 0.0], [0.0, 0.0, 0.0]])


def test_the_temperature_only_log_probs_are_compared():
    """`logprobs` (of all processors) may be anything."""
    other = ROLLOUT.replace(logprobs=jnp.full((3, 3), jnp.nan))
    np.testing.assert_array_equal(
        token_rewards(jnp.ones(3), other, kl_coef=0.5, kl=kl.k1),
        token_rewards(jnp.ones(3), ROLLOUT, kl_coef=0.5, kl=kl.k1),
    )


def test_infinite_padding_changes_nothing():
    off = MASK == 0
    other = rollout(
        jnp.where(off, jnp.nan, ROLLOUT.raw_logprobs),
        jnp.where(off, -jnp.inf, ROLLOUT.ref_logprobs),
    )
    np.testing.assert_array_equal(
        token_rewards(jnp.ones(3), other, kl_coef=0.5, kl=kl.k3),
        token_rewards(jnp.ones(3), ROLLOUT, kl_coef=0.5, kl=kl.k3),
    )


def test_rewards_are_float32_from_birth():
    """Scores scattered among token ids would become integers."""
    out = token_rewards(jnp.array([0.25, 0.5, 0.75]), ROLLOUT, kl_coef=0.0, kl=kl.k1)
    assert out.dtype == jnp.float32
    assert float(out.sum()) == 0.75


@pytest.mark.parametrize("token", [0, 1])
def test_a_missing_end_is_known_from_finished(token, strict):
    """Row 0 finished; rows 1 and 2 did not, whatever their tokens are."""
    same = rollout(ROLLOUT.raw_logprobs, ROLLOUT.ref_logprobs, jnp.full((3, 4), token))
    assert penalise_missing_eos(jnp.array([1.0, 1.0, 1.0]), same, penalty=0.75).tolist() == [
        1.0,
        0.25,
        0.25,
    ]


VALID = jnp.array([True, True, False])


def shape(scores, rows, *, valid, **options):
    shaper, statistics = shaping.make_shaper(scores, rows, valid=valid, **options)
    return shaper(scores, rows, valid), statistics


def shaped(scores, statistics=None, **settings):
    start = shaping.init_statistics() if statistics is None else statistics
    return shape(
        jnp.asarray(scores), ROLLOUT, valid=VALID, statistics=start, config=Config(**settings)
    )


# Episodes of two turns of at most two tokens, each with an answer of two: 3, 4 and 2 acting tokens.
# The second was cut off by the last turn.
ACTING = jnp.array([[1.0, 1, 0, 0, 1, 0, 0, 0], [1, 1, 0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]])
TURN_REWARDS = jnp.array(
    [[0.0, 0.5, 0, 0, 2, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0], [0, 3, 0, 0, 0, 0, 0, 0]]
)
ZEROS = jnp.zeros((3, 8))
EPISODES = Rollout(
    jnp.ones((3, 9), int),
    jnp.ones((3, 9), bool),
    ACTING,
    jnp.array([True, False, True]),
    *[ZEROS] * 4,
    rewards=TURN_REWARDS,
)
GAME = Environment(reset=None, step=None, max_turns=2, turn_length=2, observation_length=2)


def test_rewards_of_turns_stay_and_the_rest_of_the_score_is_on_the_last_acting_token(strict):
    """Sums of turns 2.5, 1 and 3: the scores have 1.5 more, as much, and .5 less."""
    out = token_rewards(jnp.array([4.0, 1.0, 2.5]), EPISODES, kl_coef=0.0, kl=kl.k1)
    assert out.tolist() == [
        [0, 0.5, 0, 0, 3.5, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0, 0],
        [0, 2.5, 0, 0, 0, 0, 0, 0],
    ]


def episode_scores(**settings):
    """The shaped scores of the episodes, whose sums are 2.5, 1 and 3."""
    config = Config(**settings)
    parts = algorithms.make_parts(config, in_program.episode_score)._replace(environment=GAME)
    start = shaping.init_statistics()
    return ppo.score_rollout(parts, config, {}, EPISODES, lambda: None, start, None)[0].scores


def test_an_episode_that_the_last_turn_cut_off_misses_its_end():
    """Though the third one has fewer turns. The penalty is on the last acting token."""
    scores = episode_scores(missing_eos_penalty=0.75)
    assert scores.tolist() == [2.5, 0.25, 3]
    out = token_rewards(scores, EPISODES, kl_coef=0.0, kl=kl.k1)
    assert (out - TURN_REWARDS).tolist() == [[0] * 8, [0, 0, 0, 0, 0, -0.75, 0, 0], [0] * 8]


def test_the_overlong_penalty_of_an_episode_is_by_its_acting_tokens():
    """3, 4 and 2 of at most 2 · 2 tokens, a buffer of 2: (3 − 2) / 2 = .5, (4 − 2) / 2 = 1, 0."""
    scores = episode_scores(overlong_buffer=2, overlong_penalty=0.5)
    assert scores.tolist() == [2.25, 0.5, 3]


def test_without_settings_scores_are_unchanged():
    out, statistics = shaped([2.0, -3.0, 0.0])
    assert out.tolist() == [2.0, -3.0, 0.0]
    toys.assert_same(statistics, shaping.init_statistics())


def test_clip_then_running_scale():
    """(4, 2) clipped at 3 are (3, 2): mean 2.5, variance with ddof 1 is .5, so 3 / √.5 and 2 / √.5;
    no shift.
    """
    out, statistics = shaped([4.0, 2.0, 99.0], reward_clip=3.0, reward_norm="running")
    np.testing.assert_allclose(out, [3 / 0.5**0.5, 2 / 0.5**0.5, 0.0], rtol=1e-6)
    # with (1, 0) joined: 3 2 1 0, variance 5 / 3
    again, _ = shaped([1.0, 0.0, 99.0], statistics, reward_norm="running")
    np.testing.assert_allclose(again, [1 / (5 / 3) ** 0.5, 0.0, 0.0], rtol=1e-6)


def test_batch_whitening_of_scores():
    out, _ = shaped([3.0, 1.0, 99.0], reward_norm="batch")
    np.testing.assert_allclose(out, [1.0, -1.0, 0.0], atol=1e-6)
    out, _ = shaped([3.0, 1.0, 99.0], reward_norm="batch", whiten_shift=False)
    np.testing.assert_allclose(out, [3.0, 1.0, 0.0], atol=1e-6)  # the deviation is 1 already


def by_task(scores, tasks, valid, **settings):
    settings = Config(reward_norm="task", num_tasks=2, **settings)
    zeros = jnp.zeros((6, 3))
    rows = Rollout(
        jnp.zeros((6, 4), jnp.int32),
        jnp.ones((6, 4), bool),
        jnp.ones((6, 3)),
        jnp.ones(6, bool),
        zeros,
        zeros,
        zeros,
        zeros,
        {"task": jnp.asarray(tasks)},
    )
    start = shaping.init_statistics()

    def one(rows, scores, valid, axis_name=None):
        return shape(
            scores, rows, valid=valid, statistics=start, config=settings, axis_name=axis_name
        )[0]

    scores, valid = jnp.asarray(scores), jnp.asarray(valid)
    whole = jax.jit(one)(rows, scores, valid)
    # the same with half of the rows on each of two devices
    halves = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), (rows, scores, valid))
    split = jax.vmap(lambda *parts: one(*parts, axis_name="devices"), axis_name="devices")
    np.testing.assert_allclose(jax.jit(split)(*halves).reshape(whole.shape), whole, atol=1e-5)
    return whole


def test_whitening_within_tasks():
    """Task 0 has 1 and 3 (mean 2, deviation 1), task 1 has 10, 30 and 50 (mean 30, variance 800 /
    3), and 99 is invalid.
    """
    tasks, valid = [0, 0, 1, 1, 1, 0], [True, True, True, True, True, False]
    out = by_task([1.0, 3.0, 10.0, 30.0, 50.0, 99.0], tasks, valid)
    far = 20 / (800 / 3) ** 0.5
    np.testing.assert_allclose(out, [-1.0, 1.0, -far, 0.0, far, 0.0], atol=1e-6)
    # ddof 1: variances 2 and 400; without the shift the means stay: 2 ± 1 / √2, 30 ± 1
    out = by_task(
        [1.0, 3.0, 10.0, 30.0, 50.0, 99.0], tasks, valid, whiten_ddof=1, whiten_shift=False
    )
    np.testing.assert_allclose(out, [2 - 0.5**0.5, 2 + 0.5**0.5, 29.0, 30.0, 31.0, 0.0], rtol=1e-5)


def test_whitening_columns_within_tasks():
    """Over rows and columns of a task, as for the batch: task 0 has 0 2 0 2, task 1 has 5 5 5 9
    (mean 6, variance 3).
    """
    scores = [[0.0, 2.0], [0.0, 2.0], [5.0, 5.0], [5.0, 9.0], [7.0, 7.0], [7.0, 7.0]]
    out = by_task(scores, [0, 0, 1, 1, 0, 1], [True, True, True, True, False, False])
    low, high = -1 / 3**0.5, 3 / 3**0.5
    np.testing.assert_allclose(
        out, [[-1, 1], [-1, 1], [low, low], [low, high], [0, 0], [0, 0]], atol=1e-6
    )


def test_overlong_penalty():
    """Lengths 2, 3, 0 of at most 3, a buffer of 2: (2 − 1) / 2 = .5, (3 − 1) / 2 = 1, 0."""
    out, _ = shaped([1.0, 1.0, 0.0], overlong_buffer=2, overlong_penalty=0.4)
    np.testing.assert_allclose(out, [0.8, 0.6, 0.0], rtol=1e-6)


def test_penalties_are_divided_among_columns():
    out, _ = shaped([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]], missing_eos_penalty=1.0)
    assert out.tolist() == [[1.0, 2.0], [0.5, 1.5], [0.0, 0.0]]  # row 0 finished, row 2 is invalid


def test_normalisation_to_the_reference():
    """Scores 1, 5 of the reference have mean 3 and deviation 2: gain .5, bias −1.5."""
    statistics = shaping.normalise_to_reference(
        shaping.init_statistics(), jnp.array([1.0, 5.0, jnp.nan])
    )
    assert (float(statistics["gain"]), float(statistics["bias"])) == (0.5, -1.5)
    assert shaped([1.0, 5.0, 0.0], statistics)[0].tolist() == [-1.0, 1.0, 0.0]
    assert float(shaping.normalise_to_reference(statistics, jnp.ones(3))["gain"]) == 1.0
    # what is clipped is 9 / 2 − 1.5 = 3, and not 9; 4 / 2 − 1.5 = .5
    assert shaped([9.0, 4.0, 0.0], statistics, reward_clip=2.5)[0].tolist() == [2.5, 0.5, 0.0]


def test_equal_scores_are_not_scaled():
    """A third of a run may be all wrong at its start: −1 over a deviation of rounding would be tens
    of millions.
    """
    for value in (-1.0, 0.1):
        rows = jnp.full(63, value)
        statistics = shaping.normalise_to_reference(shaping.init_statistics(), rows)
        assert (float(statistics["gain"]), float(statistics["bias"])) == (
            1.0,
            pytest.approx(-value),
        )
        out, statistics = shaped([value, value, 9.0], reward_norm="running")
        again, _ = shaped([value, value, 9.0], statistics, reward_norm="running")
        np.testing.assert_allclose([out, again], [[value, value, 0.0]] * 2)


@pytest.mark.parametrize(
    ("norm", "want"), [("none", 1.0), ("running", 1.0 / 2**0.5), ("batch", 1.0), ("task", 1.0)]
)
def test_other_responses_are_shaped_on_the_same_scale(norm, want):
    """Scores 1 and 3: deviation 1 (√2 with ddof 1, of the running moments). Others that are one
    higher are one unit higher, which a scale of their own would not say; and the statistics are
    those of the first alone.
    """
    config, rows = (
        Config(reward_norm=norm),
        ROLLOUT.replace(extra={"task": jnp.zeros(3, jnp.int32)}),
    )
    scores, start = jnp.array([1.0, 3.0, 9.0]), shaping.init_statistics()
    shape, statistics = shaping.make_shaper(
        scores, rows, valid=VALID, statistics=start, config=config
    )
    np.testing.assert_allclose(
        shape(scores + 1, rows, VALID) - shape(scores, rows, VALID), [want, want, 0.0], rtol=1e-6
    )
    assert float(statistics["reward"].count) == (2 if norm == "running" else 0)


def test_missing_eos_score():
    """Row 0 finished, row 1 did not: −1 in the place of 5; shared by columns."""
    assert shaped([5.0, 5.0, 5.0], missing_eos_score=-1.0)[0].tolist() == [5.0, -1.0, 0.0]
    assert shaped([[5.0, 1.0]] * 3, missing_eos_score=-1.0)[0].tolist() == [
        [5.0, 1.0],
        [-0.5, -0.5],
        [0.0, 0.0],
    ]


def test_the_bias_is_divided_among_columns():
    """Row sums 1 and 3 become −1 and 1: gain 1, bias −2, half of it to each of two columns."""
    statistics = shaping.normalise_to_reference(shaping.init_statistics(), jnp.array([1.0, 3.0]))
    out, _ = shaped([[0.0, 1.0], [1.0, 2.0], [0.0, 0.0]], statistics)
    assert out.tolist() == [[-1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]


def test_running_moments_do_not_depend_on_the_number_of_devices():
    scores, valid = jnp.array([1.0, 2.0, 3.0, 7.0]), jnp.array([True, True, False, True])
    whole = masked.add_moments(masked.no_moments(), scores, valid)
    add = lambda s, v: masked.add_moments(masked.no_moments(), s, v, axis_name="devices")
    halves = jax.vmap(add, axis_name="devices")(scores.reshape(2, 2), valid.reshape(2, 2))
    toys.assert_close(jax.tree.map(lambda x: x[1], halves), whole, rtol=1e-6)
    # the shaper's: 4 and 2 on one device, 1 and 0 on the other; mean 7 / 4, squares 8.75
    run = lambda scores: shape(
        scores,
        ROLLOUT,
        valid=VALID,
        statistics=shaping.init_statistics(),
        config=Config(reward_norm="running"),
        axis_name="devices",
    )[1]["reward"]
    both = jnp.array([[4.0, 2.0, 99.0], [1.0, 0.0, 99.0]])
    np.testing.assert_allclose(
        jax.vmap(run, axis_name="devices")(both), [[4.0] * 2, [1.75] * 2, [8.75] * 2], rtol=1e-6
    )


def test_groups_of_equal_scores_are_not_informative():
    """The third group differs in an invalid row alone; the fourth has one valid row."""
    scores = jnp.array([1.0, 2.0, 3.0, 3.0, 1.0, 9.0, 4.0, 5.0])
    valid = jnp.array([True, True, True, True, True, False, False, True])
    assert shaping.informative(scores, valid, group_size=2).tolist() == [True, True, *[False] * 6]


def test_invalid_rows_are_not_informative():
    valid = jnp.array([True, True, False])
    assert shaping.informative(jnp.array([1.0, 2.0, 0.0]), valid, group_size=3).tolist() == [
        True,
        True,
        False,
    ]


def test_first_groups_puts_useful_groups_first():
    # groups 1 and 3; a row of group 1 is invalid
    useful = jnp.array([0, 0, 1, 0, 0, 0, 1, 1], bool)
    assert shaping.first_groups(useful, group_size=2, rows=4).tolist() == [2, 3, 6, 7]
    assert shaping.first_groups(useful, group_size=2, rows=6).tolist() == [2, 3, 6, 7, 0, 1]
