import json

import numpy as np
import pytest
from runs import RUN

from jaxppo.data import sentiment
from jaxppo.errors import UserError
from jaxppo.run import load
from jaxppo.tasks import TaskConfig, sources


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
