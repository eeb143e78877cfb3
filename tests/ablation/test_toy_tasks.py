"""PPO on toy tasks that each need one thing more, so that a failure names the broken part; then
the module of toy tasks.

PPO on a Llama of one layer and width 32 over 8 tokens, with 128 rollouts of 4 tokens a step,
reaches 95 % of the best reward, 1, within 100 steps. One program serves all tasks and seeds: the
task and the treatment of the advantages come in with the prompts.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo import algorithms, estimators, models, parallel, ppo
from jaxppo.ablation import toy_tasks
from jaxppo.config import Config
from jaxppo.models import shapes
from jaxppo.types import Prompts, Rollout

VOCAB, STEPS, OPTIMUM = 8, 100, 1.0
TASKS = ("one token", "the prompt", "the previous token", "delayed")
RIGHT, FLIPPED, SHUFFLED = 0, 1, 2
SETTINGS = Config(
    batch_size=128,
    prompt_length=1,
    response_length=4,
    minibatches=4,
    steps=STEPS,
    lora=0,
    lr=3e-3,
    value_coef=0.5,
    kl_coef=0.0,
    kl_adaptive=False,
)


def reward(params, rollout):
    """Four tasks, in the order of TASKS; the best reward is 1, a random policy gets 1/8."""
    tokens, response = rollout.tokens, rollout.response
    share = lambda hits: hits.astype(jnp.float32).mean(1)
    scores = [
        share(response == 3),
        share(response == (3 * tokens[:, :1] + 1) % VOCAB),  # a permutation of the prompt's token
        share(response == (tokens[:, :-1] + 1) % VOCAB),  # one more than the token before
        # only the first token counts, but the reward comes with the last
        (response[:, 0] == (3 * tokens[:, 0] + 1) % VOCAB).astype(jnp.float32),
    ]
    chosen = jnp.take_along_axis(jnp.stack(scores, 1), rollout.extra["task"][:, None], 1)[:, 0]
    return chosen, jnp.ones(chosen.shape, bool)


def advantage(rewards, scores, rollout, *, valid, statistics, axis_name=None):
    """GAE, or a wrong version of it: with the sign flipped, or shuffled over rows."""
    adv, returns, statistics = estimators.gae(SETTINGS)(
        rewards, scores, rollout, valid=valid, statistics=statistics, axis_name=axis_name
    )
    treatment = rollout.extra["treatment"][:, None]
    wrong = jnp.where(treatment == FLIPPED, -adv, jnp.roll(adv, 1, axis=0))
    return jnp.where(treatment == RIGHT, adv, wrong), returns, statistics


@pytest.fixture(scope="module")
def train():
    """train(task, seed) -> the reward of each step."""
    model = models.make(
        shapes.llama(
            vocab_size=VOCAB, width=32, num_layers=1, num_heads=2, num_kv_heads=2, max_length=8
        )
    )
    parts = algorithms.make_parts(SETTINGS, reward)._replace(advantage=advantage)
    step = parallel.compile_step(ppo.make_train_step(model, parts, SETTINGS))
    init = jax.jit(model.init)

    def prompts(task, treatment, seed, number):
        tokens = np.random.default_rng([seed, number]).integers(0, VOCAB, (128, 1)).astype(np.int32)
        extra = {
            "task": np.full(128, task, np.int32),
            "treatment": np.full(128, treatment, np.int32),
        }
        return jax.device_put(Prompts(tokens, tokens >= 0, np.arange(128, dtype=np.int32), extra))

    def run(task, seed, treatment=RIGHT):
        params = init(jax.random.key(seed))
        frozen = {"base": {}, "reference": toys.copied(params), "reward": {}}
        state, rewards = ppo.init_state(SETTINGS, params, frozen, jax.random.key(seed)), []
        for number in range(STEPS):
            state, metrics = step(state, prompts(TASKS.index(task), treatment, seed, number))
            rewards.append(metrics["reward"])
        assert step.traces == 1
        return np.asarray(jax.device_get(rewards))

    return run


def reached(rewards) -> float:
    """The reward of the last ten steps: 1280 rollouts."""
    return float(rewards[-10:].mean())


@pytest.mark.ci
@pytest.mark.learning
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]
)
@pytest.mark.parametrize("task", TASKS)
def test_ppo_learns(train, task, seed):
    rewards = train(task, seed)
    assert rewards[0] < 0.3  # 1/8 by chance
    assert reached(rewards) >= 0.95 * OPTIMUM


@pytest.mark.ci
@pytest.mark.learning
@pytest.mark.parametrize(
    "treatment", [pytest.param(FLIPPED, id="flipped"), pytest.param(SHUFFLED, id="shuffled")]
)
@pytest.mark.parametrize("task", TASKS)
def test_ppo_does_not_learn_from_wrong_advantages(train, task, treatment):
    """So the test above would catch a wrong advantage."""
    assert reached(train(task, 0, treatment)) < 0.5


# The module `jaxppo.ablation.toy_tasks`


def rolled(prompt: list[int], response: list[list[int]], task: str = "token") -> Rollout:
    """Rollouts with these symbols; 0 ends a response."""
    said = jnp.asarray(response)
    mask = jnp.cumsum(jnp.pad(said[:, :-1] == 0, ((0, 0), (1, 0))), 1) == 0
    tokens, zeros = jnp.concatenate([jnp.asarray(prompt)[:, None], said], 1), jnp.zeros(said.shape)
    task = jnp.full(len(prompt), toy_tasks.TASKS.index(task))
    return Rollout(
        tokens,
        tokens > 0,
        mask.astype(jnp.float32),
        mask[:, -1],
        zeros,
        zeros,
        zeros,
        zeros,
        {"task": task},
        jnp.arange(len(prompt)),
    )


def test_scores_of_the_tasks():
    # partners of 1 and 2 are 2 and 5
    done = rolled([1, 2], [[2, 3, 4, 5], [5, 5, 5, 0]])
    found = dict(zip(toy_tasks.TASKS, toy_tasks.scores(done).tolist()))
    assert found["token"] == [0.25, 0]  # one 3 of four
    assert found["prompt"] == [0.25, 0.75]  # an early end earns no more
    assert found["previous"] == [1, 0]  # 2 3 4 5 after 1
    assert found["delayed"] == [1, 1]
    assert found["answer"] == [1, 1]  # prompts 1 and 2 can be learned
    assert found["hack"] == found["token"]


def test_a_random_answer_cannot_be_learned():
    """For prompts 5 to 7 every first symbol is right as often as any other."""
    rng = np.random.default_rng(0)
    others = rng.integers(1, 8, (700, 3))
    hits = []
    for first in range(1, 8):
        said = np.concatenate([np.full((700, 1), first), others], 1)
        hits.append(
            float(
                toy_tasks.scores(rolled([6] * 700, said.tolist()))[
                    toy_tasks.TASKS.index("answer")
                ].mean()
            )
        )
    assert (
        sum(hits) == pytest.approx(1) and max(hits) < 0.2 and min(hits) > 0.09
    )  # 1/7 = .143, s.e. .013


@pytest.mark.ci
def test_reward_and_judge():
    done = rolled([1, 1, 1], [[3, 3, 0, 0], [5, 5, 5, 3], [1, 1, 1, 1]])
    assert toy_tasks.reward(None, done)[0].tolist() == [0.5, 0.25, 0]
    found = {name: float(x) for name, x in toy_tasks.judge(done).items()}
    assert set(found) == set(toy_tasks.JUDGE_METRICS)
    assert found["score"] == pytest.approx(0.75 / 3)
    assert found["gold"] == pytest.approx(
        (1 + 0.5 + 0) / 3
    )  # half, a quarter and none of the symbols are 3s
    # lengths with the end token: 3 and 4 with a reward, 4 without
    assert (found["right_length"], found["wrong_length"], found["excess_length"]) == (3.5, 4, 0.5)
    none = toy_tasks.judge(rolled([1], [[3, 3, 0, 0]]))
    assert (
        np.isnan(none["wrong_length"])
        and np.isnan(none["excess_length"])
        and none["right_length"] == 3
    )


@pytest.mark.ci
def test_the_best_of_eight():
    done = rolled([1] * 8 + [2] * 8, [[3, 0]] + [[5, 5]] * 7 + [[1, 3]] * 7 + [[3, 3]])
    # the best of the first eight is 1/2, that of the second 1
    rewards = toy_tasks.reward(None, done)[0]
    assert toy_tasks.best_of_8(rewards, done) == 0.75
    assert rewards.mean() == pytest.approx((0.5 + 7 * 0.5 + 1) / 16)
    mixed = rolled([1] * 7 + [2], [[3, 3]] * 8)  # two prompts
    assert np.isnan(toy_tasks.best_of_8(jnp.ones(8), mixed))
    assert np.isnan(toy_tasks.best_of_8(jnp.ones(2), rolled([1, 1], [[3, 3]] * 2)))  # two rows


def test_random_prompts():
    settings = toy_tasks.ToyConfig(batch_size=40, group_size=4, minibatches=1)
    one, same, later = (
        toy_tasks.RandomPrompts("prompt").batches(settings, cursor) for cursor in (0, 0, 10)
    )
    toys.assert_same(one, same)
    assert (one.tokens != later.tokens).any()
    assert (
        one.tokens.shape == (40, 1) and (one.tokens[:4] == one.tokens[0]).all()
    )  # a group has one prompt
    assert (
        set(one.extra["task"].tolist()) == {1} and one.tokens.min() >= 1 and one.tokens.max() <= 7
    )
    two = toy_tasks.RandomPrompts("prompt").batches(replace(settings, steps_per_call=2), 0)
    np.testing.assert_array_equal(two.tokens[0], one.tokens)
    np.testing.assert_array_equal(two.tokens[1], later.tokens)


def test_networks():
    first, other = (toy_tasks.load(toy_tasks.ToyConfig(seed=seed)) for seed in (0, 1))
    assert not np.array_equal(jax.tree.leaves(first.params)[0], jax.tree.leaves(other.params)[0])
    assert first.shape.vocab_size == toy_tasks.SYMBOLS + 1 and first.tokenizer.eos_id == 0
    recurrent = toy_tasks.load(toy_tasks.ToyConfig(model_kind="gru"))
    assert recurrent.shape.kind == "gru"
    assert set(toy_tasks.load(toy_tasks.ToyConfig(lora=2)).frozen["base"]) == set(
        first.frozen["reference"]
    )
