import pytest

from jaxppo.run import files
from jaxppo.run.sampler import Sample
from jaxppo.tasks import judged


def reading(*rows):
    """Continuations from (response, tokens, KL, sentiment)."""
    return [(Sample("p", response, tokens, kl, True), x) for response, tokens, kl, x in rows]


def test_a_checkpoint_is_chosen_by_sentiment_within_8_nats():
    found = judged.summarise(reading(("a", [1, 2, 1, 2], 6.0, 0.5), ("b", [3, 4], 12.0, 0.1)))
    assert found["sentiment"] == pytest.approx(0.3) and found["kl"] == 9.0
    assert found["score"] == pytest.approx(0.3 - 1.0)  # 9 - 8 nats too many
    assert found["distinct_2"] == pytest.approx(3 / 4)  # 12 21 12 and 34


def test_a_comparison_pairs_prompts_and_seeds_and_cuts_to_equal_text():
    before = [reading(("a", [1, 2, 3], 0.0, 0.0)), reading(("b", [1, 2, 3], 0.0, 0.2))]
    after = [reading(("c", [1, 1], 2.0, 0.5)), reading(("d", [1, 2, 3, 4], 4.0, 0.3))]
    found = judged.compare(before, after)
    assert found["sentiment_before"] == pytest.approx(0.1)
    assert found["sentiment_after"] == pytest.approx(0.4)
    assert found["gain"] == pytest.approx(0.3)  # .5 and .1
    assert found["gain_se"] == pytest.approx(0.2)  # deviation .2 sqrt(2), over sqrt(2)
    assert found["kl"] == 3.0 and found["kl_se"] == pytest.approx(1.0)
    # the shortest reading has two tokens: 12 and 12 before, 11 and 12 after, all distinct
    assert found["distinct_2_before"] == found["distinct_2_after"] == 1.0


def test_outputs_have_both_continuations(tmp_path, capsys):
    before, after = reading(("a", [1], 0.0, 0.25)), reading(("b", [2], 1.5, 0.75))
    judged.write_outputs(tmp_path, before, after)
    (row,) = files.read_jsonl(tmp_path / "outputs.jsonl")
    assert row == {
        "prompt": "p",
        "before": "a",
        "sentiment_before": 0.25,
        "after": "b",
        "sentiment_after": 0.75,
        "kl": 1.5,
    }
    assert "+0.75" in capsys.readouterr().out
