from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from runs import RUN

from jaxppo import assemble, evaluation, tasks
from jaxppo.config import UserError
from jaxppo.data.examples import Example
from jaxppo.tasks import Task, TaskConfig
from jaxppo.types import Rollout


def test_every_row_of_the_table_is_whole():
    for name, task in tasks.TASKS.items():
        assert task.source.partition(":")[0] in tasks.SOURCES, name
        assert task.reward in tasks.REWARDS or task.reward == "learned", name
        assert set(task.metrics) <= set(evaluation.METRICS), name
        assert "{reference}" in task.response, name


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match="--task 'translatoin': choose one of sentiment, sentiment_label, translation"):
        tasks.task_of(TaskConfig(task="translatoin"))
    with pytest.raises(UserError, match="--reward 'blue': choose one of bleu"):
        tasks.make_reward(TaskConfig(task="translation", reward="blue"), None)  # type: ignore[arg-type]


def test_examples_of_a_file(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(f'{{"prompt": "p{i}", "reference": "r{i}"}}\n' for i in range(200)))
    found = tasks.load_examples(TaskConfig(task="translation", data=str(path)))
    assert [len(part) for part in found] == [160, 20, 20]  # 80, 10 and 10 %
    small = tasks.load_examples(TaskConfig(task="translation", data=str(path), tiny=True))
    assert [len(part) for part in small] == [64, 8, 8]


def test_openings_are_cut_by_the_policys_tokenizer(policy, monkeypatch):
    """The main job's split: no test prompt begins a sentence that was trained on."""
    from jaxppo.data import sentiment

    texts = [f"{chr(65 + i % 26)}{i:03d} is a good film." for i in range(100)]
    monkeypatch.setattr(sentiment, "load", lambda: sentiment.Reviews(texts, np.zeros(100, np.float32)))
    found = tasks.load_examples(TaskConfig(task="sentiment"), policy.tokenizer)
    assert [len(part) for part in found] == [80, 10, 10]
    assert all(len(x.prompt) == 8 for part in found for x in part)  # of bytes
    split = sentiment.split_by_opening(texts, policy.tokenizer.encode)
    assert [x.prompt + x.reference for x in found.test] == [texts[i] for i in split.test]
    with pytest.raises(UserError, match="experiments/sentiment.py"):
        tasks.load_examples(TaskConfig(task="sentiment"))


def test_only_texts_may_stand_in_a_prompt():
    example = Example("p", "r", {"aspect": "outcome", "letters": ["a"], "number": 3})
    assert tasks.words(example) == {"aspect": "outcome"}


def test_one_of_many():
    task = Task("", "", "exact", ("exact",), prompt="{prompt} ({aspect})=", response=" {reference}")
    found = tasks.as_one_of_many("sums", task, 2, [Example("1+1", "2", {"aspect": "easy"})])
    assert found == [Example("sums: 1+1 (easy)=", " 2", {"task": 2})]


def test_mixed_with_and_without_weights():
    groups = [[Example("a", str(i)) for i in range(6)], [Example("b", str(i)) for i in range(2)]]
    count = lambda found: [sum(x.prompt == name for x in found) for name in "ab"]
    plain = tasks.mixed(groups, seed=0)
    assert count(plain) == [6, 2] and plain != groups[0] + groups[1] and tasks.mixed(groups, seed=0) == plain
    even = tasks.mixed(groups, (1, 1), seed=0)
    assert count(even) == [4, 4]  # 8 examples in equal shares; the two of b stand twice each
    assert sorted(x.reference for x in even if x.prompt == "b") == ["0", "0", "1", "1"]
    with pytest.raises(UserError, match="--weights has 1 numbers for 2 tasks"):
        tasks.mixed(groups, (1,), seed=0)


@pytest.fixture(scope="module")
def policy():
    return assemble.load_policy(RUN)[1]


def rollout(policy, response: str, reference: str) -> Rollout:
    """One row of a response and its end, and the reference's ids."""
    ids = [*policy.tokenizer.encode(response), policy.tokenizer.eos_id]
    wanted = policy.tokenizer.encode(reference)
    tokens = jnp.asarray([[policy.tokenizer.eos_id, *ids]], jnp.int32)
    mask = jnp.ones((1, len(ids)))
    extra = {"reference": jnp.asarray([wanted], jnp.int32), "reference_length": jnp.asarray([len(wanted)], jnp.int32)}
    return Rollout(tokens, tokens >= 0, mask, jnp.ones(1, bool), mask, mask, mask, mask, extra)


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
    reward = tasks.make_reward(replace(TaskConfig(task="translation"), reward=name), policy)
    score, valid = reward.fn(reward.params, rollout(policy, response, reference))
    assert bool(valid[0]) and float(score[0]) == pytest.approx(expected, abs=1e-6)


def test_perfect_responses_have_the_highest_reward(policy):
    for package in ("jiwer", "rouge_score", "sacrebleu"):
        pytest.importorskip(package)
    texts = "the small cat sat on the mat"
    for name in tasks.REWARDS:
        if name in ("entity_f1", "named_f1", "named_gain"):  # below
            continue
        reward = tasks.make_reward(replace(TaskConfig(task="translation"), reward=name), policy)
        if name == "vader":  # asks about the response alone
            assert float(reward.fn(reward.params, rollout(policy, "a good film", texts))[0][0]) > 0.4
            continue
        same, other = (float(reward.fn(reward.params, rollout(policy, text, texts))[0][0]) for text in (texts, "a dog"))
        assert same > other and np.isclose(same, {"edit": 0, "text_wer": 0}.get(name, 1)), name


@pytest.mark.parametrize(
    ("name", "response", "reference", "expected"),
    [
        ("entity_f1", " O B-person O", "O B-person I-person", 0),  # another end
        ("entity_f1", " O B-person I-person", "O B-person I-person", 1),
        ("entity_f1", " O O", "O O O", 1),  # none, and none found
        ("named_f1", " Jack = person", "Jack = person; New York = place", 2 / 3),  # one of one, one of two
        ("named_f1", " Jack = place", "Jack = person", 0),
        ("named_f1", " none", "none", 1),
        ("named_f1", " none", "Jack = person", 0),
        ("named_gain", " none", "none", 0),  # nothing to gain, nothing lost
        ("named_gain", " Jack = person", "none", -0.3),  # 0 - .3 · (1 + 0)
        ("named_gain", " none", "Jack = person", -0.3),  # 0 - .3 · (0 + 1)
        ("named_gain", " Jack = person", "Jack = person", 1.4),  # 2 - .3 · (1 + 1)
        ("named_gain", " Jack = place", "Jack = person", -0.6),  # 0 - .3 · (1 + 1)
    ],
)
def test_f1_of_entities(policy, name, response, reference, expected):
    reward = tasks.make_reward(TaskConfig(task="entities", reward=name), policy)
    score, _ = reward.fn(reward.params, rollout(policy, response, reference))
    assert float(score[0]) == pytest.approx(expected)
