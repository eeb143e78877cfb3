import json

import numpy as np
import pytest
from runs import RUN

from jaxppo.data import examples, sentiment
from jaxppo.data.examples import Example, Examples
from jaxppo.errors import UserError
from jaxppo.run import load
from jaxppo.tasks import TASKS, TaskConfig, sources
from jaxppo.tasks.datasets import dialogue


def test_examples_of_a_file(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(f'{{"prompt": "p{i}", "reference": "r{i}"}}\n' for i in range(200)))
    found = sources.load_examples(TaskConfig(task="translation", data=str(path)))
    assert [len(part) for part in found] == [160, 20, 20]  # 80, 10 and 10 %
    small = sources.load_examples(TaskConfig(task="translation", data=str(path), tiny=True))
    assert [len(part) for part in small] == [64, 8, 8]


def test_openings_are_cut_by_the_policys_tokenizer(monkeypatch):
    """The main job's split: no test prompt begins a sentence that was trained on."""

    _, policy = load.load_policy(RUN)
    texts = [f"{chr(65 + i % 26)}{i:03d} is a good film." for i in range(100)]
    monkeypatch.setattr(
        sentiment, "load_reviews", lambda: sentiment.Reviews(texts, np.zeros(100, np.float32))
    )
    found = sources.load_examples(TaskConfig(task="sentiment"), policy.tokenizer)
    assert [len(part) for part in found] == [80, 10, 10]
    assert all(len(x.prompt) == 8 for part in found for x in part)  # of bytes
    split = sentiment.split_by_opening(texts, policy.tokenizer.encode)
    assert [x.prompt + x.reference for x in found.test] == [texts[i] for i in split.test]
    with pytest.raises(UserError, match="experiments/sentiment.py"):
        sources.load_examples(TaskConfig(task="sentiment"))


def test_a_file_with_too_few_prompts(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"p{i}", "reference": "x"}) + "\n" for i in range(3))
    )
    with pytest.raises(
        UserError,
        match=r"few\.jsonl: the split by prompt gives 3 training, 0 validation, 0 test examples",
    ):
        sources.load_examples(TaskConfig(task="spelling", data=str(path)))


def test_letters_are_spelled_with_spaces(monkeypatch):
    words = [Example("Spell backward: cat", "tac"), Example("Spell backward: ninebytes", "x" * 9)]
    monkeypatch.setattr(sources.reasoning, "load", lambda kind, size: Examples(words, words, words))
    for part in sources.load_examples(TaskConfig(task="letters")):
        assert part == [Example("c a t", "t a c")]


def test_sentences_are_short_and_backward(monkeypatch):
    turns = ["See me. Come to Hecuba; then show it me!", "Away!", "See me.", "a " * 20]
    monkeypatch.setattr(
        dialogue, "load", lambda: Examples([Example("x", y) for y in turns], [], [])
    )
    found = [x for part in sources.SOURCES["sentences"](TaskConfig(), None) for x in part]
    assert sorted(x[:2] for x in found) == [
        ("Come to Hecuba;", ";abuceH ot emoC"),
        ("See me.", ".em eeS"),
        ("then show it me!", "!em ti wohs neht"),
    ]


ROWS = {
    "openai/gsm8k": {"question": "6 * 7?", "answer": "6*7 = <<6*7=42>>42\n#### 42"},
    "PrimeIntellect/Reverse-Text-RL": {"prompt": "See me."},
    "Jiayi-Pan/Countdown-Tasks-3to4": {"target": 26, "nums": [5, 3, 7]},
}
READ = {
    "openai/gsm8k": Example("6 * 7?", "6*7 = <<6*7=42>>42\n#### 42"),
    "PrimeIntellect/Reverse-Text-RL": Example("See me.", ".em eeS"),
    "Jiayi-Pan/Countdown-Tasks-3to4": Example(
        "5 3 7 -> 26", "5 3 7 -> 26", {"numbers": "[5, 3, 7]", "target": "26"}
    ),
}


@pytest.mark.parametrize("name", sources.HUB)
def test_columns_of_data_sets_on_a_hub(name):
    found = sources.HUB[name].read(ROWS[name])
    assert found == READ[name]
    task = {"o": "gsm8k", "P": "reverse_text", "J": "countdown"}[name[0]]
    assert TASKS[task].expected(found.reference) in ("42", ".em eeS", "5 3 7 -> 26")


def test_the_hubs_own_test_part(monkeypatch):
    """It is the test; training and validation are of the part "train"."""
    asked = []

    def from_hub(name, columns, *, part="train"):
        asked.append((name, columns.configuration, part))
        return [Example(f"{part} {i}", "#### 1") for i in range(100)]

    monkeypatch.setattr(examples, "from_hub", from_hub)
    found = sources.load_examples(TaskConfig(task="gsm8k", data="openai/gsm8k"))
    assert asked == [("openai/gsm8k", "main", part) for part in ("train", "test")]
    assert [len(part) for part in found] == [95, 5, 100]
    assert {x.prompt.split()[0] for x in found.test} == {"test"}
    assert {x.prompt.split()[0] for part in found[:2] for x in part} == {"train"}
