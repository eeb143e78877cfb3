import json
import math

import pytest
from report_runs import OUTPUTS, a_task, in_csv, rows, seeds
from runs import a_run, lines

from jaxppo.commands import report
from jaxppo.commands.report import outcomes, records
from jaxppo.commands.report.outcomes import Outcome
from jaxppo.config import RunConfig


def test_outcomes_of_a_run(tmp_path):
    """Twelve steps, of which the last ten count: 2 to 11, mean 6.5; the last validation."""
    text = rows(range(12)) + lines(
        {"step": 12, "reward": 11.0, "validation_score": 0.2, "validation_x": 0.1}
    )
    found = outcomes.of_run(records.read(a_run(tmp_path / "a", steps=12, metrics_jsonl=text)))
    assert found["reward", "training"] == Outcome(6.5)
    assert found["score", "validation, last"] == Outcome(0.2) and found[
        "x", "validation, last"
    ] == Outcome(0.1)
    assert set(found) == {
        ("reward", "training"),
        ("kl", "training"),
        ("score", "validation, last"),
        ("x", "validation, last"),
    }
    assert outcomes.csv_rows([], []) == []


def test_outcomes_of_a_task_have_intervals_over_the_test_examples(tmp_path):
    """Three of four right: a bootstrap of four draws reaches from 1/4 to 1."""
    found = outcomes.of_run(records.read(a_task(tmp_path / "w")))
    assert found["exact", outcomes.STARTS["supervised"]] == Outcome(
        0.0, 0.0, 0.0, "4 test examples"
    )
    assert found["exact", outcomes.AFTER] == Outcome(0.75, 0.25, 1.0, "4 test examples")
    assert found["exact", outcomes.GAIN] == Outcome(0.75, 0.25, 1.0, "4 test examples")
    assert ("score", outcomes.AFTER) not in found and (
        "score",
        "validation, last",
    ) not in found  # they are exact itself


@pytest.mark.parametrize("outputs", [OUTPUTS[:3], [OUTPUTS[0] | {"policy": 3}], []])
def test_no_interval_from_responses_that_do_not_give_the_result(tmp_path, outputs):
    outcome = outcomes.of_run(records.read(a_task(tmp_path / "w", outputs=outputs)))[
        "exact", outcomes.AFTER
    ]
    assert outcome.value == 0.75 and math.isnan(outcome.low)


def test_outcomes_of_a_script(tmp_path):
    """A standard error gives value ± 1.96 of it."""
    result = json.dumps({"gain": 0.5, "gain_se": 0.1, "seed": 3, "text": "x", "distinct": 0.9})
    found = outcomes.of_run(records.read(a_run(tmp_path / "a", result_json=result)))
    assert found["gain", "result.json"] == Outcome(
        0.5, pytest.approx(0.304), pytest.approx(0.696), "its standard error"
    )
    assert found["distinct", "result.json"].value == 0.9 and ("seed", "result.json") not in found


@pytest.mark.parametrize(
    "result",
    [{"policy": 3}, {"policy": {"exact": "x"}}, {"policy": {"exact": 1}, "gain": {"exact": [1]}}],
)
def test_strange_results_are_ignored(tmp_path, result):
    found = outcomes.of_run(records.read(a_task(tmp_path / "w", result=result)))
    assert (
        found["reward", "training"].value == pytest.approx(0.2)
        and ("exact", outcomes.GAIN) not in found
    )


def test_a_group_has_a_t_interval_over_its_seeds(tmp_path):
    """Ends 1, 2, 3: 2 ± 4.303 / √3. One that is not finite is not left out: then there is no
    mean.
    """
    runs = [records.read(path) for path in seeds(tmp_path, "a", [1.0], [2.0], [3.0])]
    (group,) = records.groups(runs)
    outcome = outcomes.of_group(group)["reward", "training"]
    assert (
        outcome[:3] == pytest.approx((2.0, -0.4841, 4.4841), abs=1e-3) and outcome.over == "3 seeds"
    )
    runs[2].rows[0]["reward"] = math.nan
    outcome = outcomes.of_group(group)["reward", "training"]
    assert (
        math.isnan(outcome.value)
        and math.isnan(outcome.low)
        and outcomes.shown(outcome) == "not finite"
    )


def test_groups_are_compared_seed_by_seed(tmp_path):
    """Rewards 1, 2, 6 minus 0, 0, 3 are 1, 2, 3: mean 2, deviation 1, t 4.303 of two degrees, so 2
    -+ 4.303 / sqrt 3 = 2.484.
    """
    a = seeds(tmp_path, "a", [0.0], [0.0], [3.0], lr=1e-3)
    b = seeds(tmp_path, "b", [1.0], [2.0], [6.0], [9.0], lr=1e-4)  # the fourth seed has no other
    ((pairs, found),) = outcomes.differences(records.groups([records.read(path) for path in a + b]))
    assert pairs.label == "b minus a" and len(pairs.runs) == 3
    outcome = found["reward", "training"]
    assert (
        outcome[:3] == pytest.approx((2.0, -0.484, 4.484), abs=1e-3)
        and outcome.over == "3 paired seeds"
        and math.isnan(outcome.p)
    )
    report.write(a + b, tmp_path / "out")
    assert in_csv(tmp_path / "out")["b minus a", "", "reward", "training"] == pytest.approx(
        (2.0, -0.484, 4.484), abs=1e-3
    )
    text = (tmp_path / "out" / "report.md").read_text()
    assert "b minus a (3 seeds)" in text and "paired by seed" in text


def test_a_difference_of_many_seeds_has_its_p(tmp_path):
    """Six differences above 0: two of 64 sign flips are so far from 0."""
    a, b = (
        seeds(tmp_path, "a", *[[0.0]] * 6, lr=1e-3),
        seeds(tmp_path, "b", *[[1.0 + k] for k in range(6)], lr=1e-4),
    )
    ((_, found),) = outcomes.differences(records.groups([records.read(path) for path in a + b]))
    assert found["reward", "training"].p == 2 / 64 and ", p 0.031" in outcomes.shown(
        found["reward", "training"]
    )


def test_seeds_that_cannot_be_paired_are_not_compared(tmp_path):
    read = lambda paths: records.groups([records.read(path) for path in paths])
    a, b = (
        seeds(tmp_path, "a", [0.0], [1.0], lr=1e-3),
        seeds(tmp_path, "b", [0.0], [math.nan], lr=1e-4),
    )
    ((_, found),) = outcomes.differences(
        read(a + b)
    )  # a run that diverged is no reason to leave the seed out
    assert math.isnan(found["reward", "training"].value)
    assert (
        outcomes.differences(read(a)) == outcomes.differences(read(a + b[:1])) == []
    )  # one group; one pair
    twice = a_run(
        tmp_path / "b-again", RunConfig(steps=1, lr=1e-4, seed=0), metrics_jsonl=rows([0.5])
    )
    assert outcomes.differences(read([*a, *b, twice])) == []  # which of the two?
