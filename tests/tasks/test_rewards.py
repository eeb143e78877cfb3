from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import RUN

from jaxppo.errors import UserError
from jaxppo.run import load
from jaxppo.tasks import TaskConfig, rewards
from jaxppo.types import Rollout


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="--reward 'blue': choose one of text_bleu"):
        rewards.make_reward(TaskConfig(task="translation", reward="blue"), None)  # type: ignore[arg-type]


def test_a_reward_model_has_to_be_named(policy):
    with pytest.raises(UserError, match="--reward model needs --reward-model RUN"):
        rewards.reward_name(TaskConfig(task="translation", reward="model"))
    with pytest.raises(
        UserError,
        match="nowhere: there is no run; give the folder of one of experiments/reward_model.py",
    ):
        rewards.make_reward(
            TaskConfig(task="translation", reward="model", reward_model="nowhere"), policy
        )


def test_fluency_is_under_the_initial_policy(policy):
    """Minus the mean log-prob, by hand from its logits."""
    reward = rewards.make_reward(TaskConfig(task="translation", reward="fluency"), policy)
    row = rollout(policy, "ab", "x", width=0)

    @jax.jit
    def mean_logprob(params):
        hidden, _ = policy.model.apply(params, row.tokens, row.attend)
        logp = jax.nn.log_softmax(policy.model.logits(params, hidden))[0, :-1]
        return jnp.take_along_axis(logp, row.tokens[0, 1:, None], 1).mean()

    assert score(reward, row) == pytest.approx(float(mean_logprob(reward.params)), rel=1e-5)


def test_profanity_is_a_penalty(policy):
    pytest.importorskip("profanity_check")
    reward = rewards.make_reward(TaskConfig(task="translation", reward="clean"), policy)
    texts = ("you fucking idiot", "a kind word")
    rude, kind = (score(reward, rollout(policy, text, "x")) for text in texts)
    assert -1 <= rude < -0.9 < -0.1 < kind <= 0


@pytest.fixture(scope="module")
def policy():
    return load.load_policy(RUN)[1]


def rollout(policy, response: str, reference: str, width: int = 32) -> Rollout:
    """One row of a response and its end of text, padded to one width, and the reference's ids."""
    eos = policy.tokenizer.eos_id
    ids, wanted = [*policy.tokenizer.encode(response), eos], policy.tokenizer.encode(reference)
    pad = lambda ids: [*ids, *[eos] * (width - len(ids))]
    tokens = jnp.asarray([[eos, *pad(ids)]], jnp.int32)
    mask = (jnp.arange(max(width, len(ids))) < len(ids)).astype(jnp.float32)[None]
    extra = {
        "reference": jnp.asarray([pad(wanted)], jnp.int32),
        "reference_length": jnp.asarray([len(wanted)], jnp.int32),
    }
    return Rollout(tokens, tokens >= 0, mask, jnp.ones(1, bool), mask, mask, mask, mask, extra)


def score(reward, row: Rollout) -> float:
    scores, valid = jax.jit(reward.fn)(reward.params, row)
    assert bool(valid[0])
    return float(scores[0])


CASES = [
    ("exact", "ab", "ab", 1.0),
    ("exact", "ab", "ac", 0.0),
    ("edit", "abcd", "abxd", -0.25),  # one of four bytes
    ("token_f1", "ab", "bc", 0.5),  # one common byte of two and two
    ("rouge_l", "abc", "acb", 2 / 3),  # two of three in order
    ("text_rouge_l", " yes", "yes", 1.0),  # space around a text does not count
    ("text_wer", "a b", "a c", -0.5),
]


@pytest.mark.parametrize(("name", "response", "reference", "expected"), CASES)
def test_rewards_by_name(policy, name, response, reference, expected):
    if name.startswith("text_"):
        pytest.importorskip({"text_wer": "jiwer", "text_rouge_l": "rouge_score"}[name])
    reward = rewards.make_reward(replace(TaskConfig(task="translation"), reward=name), policy)
    row = rollout(policy, response, reference)
    assert score(reward, row) == pytest.approx(expected, abs=1e-6)


def test_perfect_responses_have_the_highest_reward(policy):
    for package in ("jiwer", "rouge_score", "sacrebleu"):
        pytest.importorskip(package)
    texts = "the small cat sat on the mat"
    for name in rewards.REWARDS:
        if name in (
            "named_f1",
            "named_gain",
            "clean",
            "fluency",
            "model",
            "reverse_text",
            "countdown",
            "gsm8k",
        ):  # each has a test of its own
            continue
        reward = rewards.make_reward(replace(TaskConfig(task="translation"), reward=name), policy)
        if name == "vader":  # asks about the response alone
            assert score(reward, rollout(policy, "a good film", texts)) > 0.4
            continue
        same, other = (score(reward, rollout(policy, text, texts)) for text in (texts, "a dog"))
        assert same > other and np.isclose(same, {"edit": 0, "text_wer": 0}.get(name, 1)), name


@pytest.mark.parametrize(
    ("name", "response", "reference", "expected"),
    [
        (
            "named_f1",
            " Jack = person",
            "Jack = person; New York = place",
            2 / 3,
        ),  # one of one, one of two
        ("named_f1", " Jack = place", "Jack = person", 0),
        ("named_f1", " none", "none", 1),
        ("named_f1", " none", "Jack = person", 0),
        ("named_gain", " none", "none", 0),  # nothing to gain, nothing lost
        ("named_gain", " Jack = person", "none", -0.5),  # 0 - .5 · (1 + 0)
        ("named_gain", " none", "Jack = person", -0.5),  # 0 - .5 · (0 + 1)
        ("named_gain", " Jack = person", "Jack = person", 1.0),  # 2 - .5 · (1 + 1)
        ("named_gain", " Jack = place", "Jack = person", -1.0),  # 0 - .5 · (1 + 1)
    ],
)
def test_f1_of_entities(policy, name, response, reference, expected):
    reward = rewards.make_reward(TaskConfig(task="entities", reward=name), policy)
    assert score(reward, rollout(policy, response, reference)) == pytest.approx(expected)


def test_named_scores(policy):
    """Of an answer in the right form, and a right one; their weights are the reward's."""
    reward = rewards.make_reward(TaskConfig(task="countdown"), policy)
    assert reward.weights == (("format", 0.1), ("result", 0.9))
    for response, expected in (("<answer>3</answer>", [1, 0]), ("<answer>1+2</answer>", [1, 1])):
        scores, valid = jax.jit(reward.fn)({}, rollout(policy, response, "1 2 -> 3"))
        assert scores.tolist() == [expected] and valid.tolist() == [True]


@pytest.mark.parametrize(
    ("name", "response", "reference", "expected"),
    [
        ("reverse_text", " <reversed_text>ba</reversed_text>", "ba", 1),
        ("reverse_text", "ba", "ba", 0),
        ("gsm8k", "#### 42", "42", 1),
        ("gsm8k", "42", "42", 0),
    ],
)
def test_rewards_of_recipes(policy, name, response, reference, expected):
    reward = rewards.make_reward(TaskConfig(task="translation", reward=name), policy)
    assert score(reward, rollout(policy, response, reference)) == expected
