import pytest
from toy_scale import SCALE

from jaxppo.ablation.question import Arm, Claim, Question
from jaxppo.ablation.record import make_record


def rows(values: dict[str, list[float]], metric: str = "end") -> list[dict]:
    return [
        {"arm": arm, "task": "token", "seed": seed, "diverged": 0.0, metric: x}
        for arm, numbers in values.items()
        for seed, x in enumerate(numbers)
    ]


def test_verdicts():
    question = Question(
        "q",
        {"a": Arm(), "b": Arm()},
        (Claim("", "", "a", "b"), Claim("", "", "b", "a"), Claim("", "", "b", "a", "-end")),
        ("end",),
    )
    scale = SCALE._replace(tasks=("token",))
    sure = make_record(
        question, scale, rows({"a": [1.0, 1.1, 1.2, 1.3, 1.2, 1.1, 1.0, 1.4], "b": [0.5] * 8})
    )
    assert [claim["verdict"] for claim in sure["claims"]] == [
        "agrees",
        "disagrees",
        "agrees",
    ]  # less is better in the last
    value, low, high = sure["claims"][0]["difference"]
    assert value == pytest.approx(9.3 / 8 - 0.5) and low < value < high
    assert sure["claims"][0]["p"] == pytest.approx(2 / 2**8)  # eight differences of one sign
    unsure = make_record(question, scale, rows({"a": [1.0, 0.0] * 4, "b": [0.4, 0.6] * 4}))
    assert {claim["verdict"] for claim in unsure["claims"]} == {"not decided"}


def test_a_diverged_run_counts():
    found = rows({"a": [1.0] * 8, "b": [1.0] * 7 + [0.0]})
    found[-1]["diverged"] = 1.0
    question = Question("q", {"a": Arm(), "b": Arm()}, (Claim("", "", "a", "b"),), ("end",))
    record = make_record(question, SCALE._replace(tasks=("token",)), found)
    assert record["arms"]["b"]["diverged"] == 1 and record["arms"]["b"]["runs"] == 8
    assert record["arms"]["b"]["end"]["mean"][0] == 7 / 8


def test_a_diverged_run_gets_the_worst_value():
    """It has not moved away from its reference, but it gets the worst KL of all."""
    found = rows({"a": [2.0, 3.0, 2.0, 3.0, 2.0, 3.0, 2.0, 3.0], "b": [0.5] * 8}, "kl")
    for row in found:
        row["end"] = 0.0
    question = Question("q", {"a": Arm(), "b": Arm()}, (Claim("", "", "b", "a", "-kl"),), ("end",))
    scale = SCALE._replace(tasks=("token",))
    assert make_record(question, scale, found)["claims"][0]["verdict"] == "agrees"
    for row in found[8:]:
        row["diverged"] = 1.0
    (claim,) = make_record(question, scale, found)["claims"]
    assert (
        claim["difference"][0] == -0.5 and claim["verdict"] != "agrees"
    )  # 3 nats each, where the others have 2.5 in the mean
    found[8]["kl"] = None  # as a record has what was not finite
    assert make_record(question, scale, found)["claims"][0]["difference"][0] == -0.5


def test_a_record_has_the_settings_of_its_tasks():
    question, found = Question("q", {"a": Arm()}, (), ("end",)), rows({"a": [1.0, 0.0]})
    scale = SCALE._replace(tasks=("token",))
    assert "of_task" not in make_record(question, scale, found)
    more = scale._replace(of_task={"token": {"eos": 5}, "prompt": {"eos": 6}})
    assert make_record(question, more, found)["of_task"] == {"token": {"eos": 5}}
