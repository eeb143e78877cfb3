"""The documentation and the docstrings match the records."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "experiments" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["tables"] = module
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_up_to_date(tables):
    for name, (_, page) in tables.TABLES.items():
        text = (ROOT / "docs" / page).read_text()
        assert f"<!-- {name} -->" in text and f"<!-- /{name} -->" in text
        assert tables.render(text) == text, "run python experiments/tables.py"


def test_a_changed_number_is_corrected(tables, tmp_path):
    for _, page in tables.TABLES.values():
        (tmp_path / page).write_text((ROOT / "docs" / page).read_text())
    text = (ROOT / "docs" / "results.md").read_text()
    assert text.count("5.51 ± .16") == 1
    wrong = text.replace("5.51 ± .16", "5.50 ± .16")
    (tmp_path / "results.md").write_text(wrong)
    tables.main(tables.Tables(docs=tmp_path))
    assert (tmp_path / "results.md").read_text() == text


@pytest.mark.parametrize(
    ("values", "digits", "sign", "expected"),
    [
        ([0.25], 2, False, ".25"),
        ([1.0, 2.0, 3.0], 2, False, "2.00 ± .58"),  # deviation 1, over sqrt 3
        ([0.1, 0.3], 1, True, "+.2 ± .1"),
        ([-0.5, -0.5], 1, True, "-.5 ± .0"),
    ],
)
def test_mean_and_error(tables, values, digits, sign, expected):
    assert tables.mean_and_error(values, digits, sign=sign) == expected


def test_tasks_are_grouped_by_what_was_trained(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "sums").mkdir()
    new = {"model": "", "model_kind": "gru", "width": 64, "layers": 2, "lora": 0}
    for seed in (0, 1):
        record = {
            "task": "sums",
            "seed": seed,
            "minutes": {"supervised": 1.0, "policy": 2.0 + seed},
            "supervised": {"exact": 0.5},
            "policy": {"exact": 0.6 + 0.2 * seed},
            "gain": {"exact": [0.1 + 0.2 * seed, 0.0, 0.4]},
            "config": {**new, "advantage": "rloo", "group_size": 4},
            "versions": {"git": "0123456789"},
        }
        (tmp_path / "sums" / f"sums-{seed}.json").write_text(json.dumps(record))
        del record["supervised"]  # the policy stage alone
        record |= {"start": {"exact": 0.25}, "policy": {"exact": 0.375}}
        (tmp_path / "sums" / f"alone-{seed}.json").write_text(json.dumps(record))
    record["config"] |= {"advantage": "gae", "group_size": 1}
    (tmp_path / "sums" / "ppo-0.json").write_text(json.dumps(record | {"seed": 0}))
    (tmp_path / "classify").mkdir()
    for seed in (0, 1):
        record = {
            "minutes": 2.2,
            "result": {"test_accuracy": 0.8 + 0.02 * seed},
            "config": {"seed": seed, "layers": ["pool", "gru"]},
        }
        (tmp_path / "classify" / f"classify-{seed}.json").write_text(json.dumps(record))
    (tmp_path / "sft").mkdir()
    record = {
        "minutes": 9.6,
        "result": {"perplexity": 48.25, "token_accuracy": 0.3125},
        "config": {"seed": 0, "model": "smollm2", "lora": 8},
    }
    (tmp_path / "sft" / "sft-0.json").write_text(json.dumps(record))
    assert tables.tasks().splitlines()[2:] == [
        # gains .1 and .3: .2 ± 12.706 · .1; 3.5 minutes, rounded to even
        "| sums | gru 64 × 2, new; rloo × 4; 2 seeds, 4 min (0123456) | exact | .250 | .500 |"
        " .700 | +.200 [-1.071, +1.471] | .375, +.125 [+.125, +.125] |",
        "| sums | gru 64 × 2, new; gae; 1 seed, 4 min (0123456) | exact | .250 | | | |"
        " .375, +.125 |",
        "| sft | smollm2, LoRA 8; 1 seed, 10 min | held-out perplexity | | 48.2 | | | |",
        "| | | token accuracy | | .312 | | | |",
        "| classify | pool, gru, new; 2 seeds, 2 min | accuracy | | .810 ± .010 | | | |",
    ]


def test_a_critic_and_groups_are_compared_from_the_same_start(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "sums").mkdir()
    new = {"model": "", "model_kind": "gru", "width": 64, "layers": 2, "lora": 0}
    for seed, size, start, end in (
        (0, 1, 0.5, 0.75),
        (0, 8, 0.5, 0.625),  # + .125
        (1, 1, 0.25, 0.5),
        (1, 8, 0.25, 0.625),  # - .125
        (2, 1, 0.25, 0.5),
        (2, 8, 0.375, 0.625),  # another start: no pair
        (3, 8, 0.5, 0.75),  # alone
    ):
        record = {
            "task": "sums",
            "supervised": {"score": start, "exact": start},
            "policy": {"score": end, "exact": end},
            "config": {**new, "seed": seed, "group_size": size},
        }
        (tmp_path / "sums" / f"{seed}-{size}.json").write_text(json.dumps(record))
    assert tables.methods().splitlines()[2:] == [
        # 0 ± 12.706 · .125
        "| sums, gru 64 × 2, new | 2 | exact | .375 | .625 | .625 | +.000 [-1.588, +1.588] |"
    ]


def test_a_task_together_and_alone(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "multitask").mkdir()
    for seed, names, before, after in (
        (0, ("sums",), 0.25, 0.5),
        (0, ("sums", "quiz"), 0.375, 0.625),  # + .125
        (1, ("sums",), 0.25, 0.25),
        (1, ("sums", "quiz"), 0.125, 0.125),  # - .125
        (2, ("sums", "quiz"), 0.5, 0.5),  # nothing to compare with
    ):
        measured = lambda x, names=names: {
            f"{kind} {task}": x for kind in ("exact", "sampled_exact") for task in names
        }
        record = {
            "supervised": measured(before),
            "policy": measured(after),
            "config": {"seed": seed, "tasks": names},
        }
        path = tmp_path / "multitask" / f"{len(names)}-{seed}.json"
        path.write_text(json.dumps(record))
    numbers = "| .250 | .250 | .375 | .375 | +.000 [-1.588, +1.588] |"  # 0 ± 12.706 · .125
    assert tables.together().splitlines()[2:] == [
        f"| sums | 2 | exact {numbers}", f"| | | sampled exact {numbers}"
    ]  # fmt: skip


def test_aims_of_each_pair_of_weights(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "safety").mkdir()
    for name, weights, seed, moved in (("a", (1.0, 0.5), 0, 0.25), ("a", (1.0, 0.5), 1, 0.125),
                                       ("b", (0.0, 0.0), 0, 0.5)):  # fmt: skip
        measured = lambda x: {"negative": 0.25 + x, "profane": 0.25 - x / 2, "gap": 0.125}
        record = {
            "start": measured(0.0) | {"kl": 0.0},
            "policy": measured(moved) | {"kl": 3.0},
            "config": {"profanity": weights[0], "bias": weights[1], "seed": seed},
        }
        (tmp_path / "safety" / f"{name}-{seed}.json").write_text(json.dumps(record))
    assert tables.safety().splitlines()[2:] == [
        "| 0 | 0 | 1 | .750, +.500 | .000, -.250 | .125, +.000 | 3.0 |",
        # .1875 ± 12.706 · .0625; .15625, -.09375 ± half of that
        "| 1 | .5 | 2 | .438, +.188 [-.607, +.982] | .156, -.094 [-.491, +.303] |"
        " .125, +.000 [+.000, +.000] | 3.0 |",
    ]


def test_docstrings_match_their_records(tables):
    known = tables.records(tables.RESULTS / "ablations")
    for path in sorted((ROOT / "experiments" / "ablations").glob("*.py")):
        if found := [x for x in known if x["question"] == path.stem]:
            text = path.read_text()
            assert tables.write_findings(text, found) == text, (
                f"{path.name}: run python experiments/tables.py"
            )


def test_findings_in_a_docstring(tables):
    claim = {
        "says": "more is more",
        "metric": "-kl",
        "difference": [0.5, 0.25, 0.75],
        "verdict": "agrees",
    }
    record = {"scale": "ladder", "about": {"minutes": 2.2}, "claims": [claim]}
    text = '"""A question.\n\nCommand    python x.py\n"""\n\nrest = """no docstring"""\n'
    want = (
        '"""A question.\n\nCommand    python x.py\n'
        "Found      2 minutes at --scale ladder on a core that other work shared.\n"
        "           more is more: agrees (fewer nats to the reference +.500, 95 % interval +.250 "
        "to +.750).\n"
        '"""\n\nrest = """no docstring"""\n'
    )
    assert tables.write_findings(text, [record]) == want
    assert tables.write_findings(want, [record]) == want
    assert tables.write_findings(want, [{**record, "claims": []}]) != want


def test_a_row_for_each_claim(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "ablations").mkdir()
    claims = [
        {
            "says": s,
            "paper": "https://x.y" * (s == "a"),
            "metric": "end",
            "difference": [0.1, -0.2, 0.4],
            "verdict": "not decided",
        }
        for s in "ab"
    ]
    for scale, asked in (("ladder", claims), ("smollm2", claims[1:])):
        record = {"question": "q", "scale": scale, "claims": asked}
        (tmp_path / "ablations" / f"q-{scale}.json").write_text(json.dumps(record))
    cell = "**not decided** +.100 [-.200, +.400]"
    assert tables.ablations().splitlines()[2:] == [
        "| [q](../experiments/ablations/q.py) | a ([paper](https://x.y)) | reward at the end "
        f"| {cell} | | |",
        f"| | b (ours) | reward at the end | {cell} | | {cell} |",
    ]


def test_games_are_rows_with_an_interval_over_seeds(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "episodes").mkdir()
    new, pretrained = {"model": ""}, {"model": "smollm2", "lora": 8}
    found = [(new, 0.2, 0.6), (new, 0.2, 0.7), (new, 0.2, 0.8), (pretrained, 0.2, 0.3)]
    for seed, (config, before, after) in enumerate(found):
        record = {
            "config": config,
            "environment": "guess",
            "game": ["n=7"],
            "supervised": {"score": 0.5, "sampled": before},
            "policy": {"score": 0.75, "sampled": after},
            "script": 1.0,
            "minutes": {"supervised": 1.5, "policy": 2.5},
        }
        (tmp_path / "episodes" / f"{seed}.json").write_text(json.dumps(record))
    # gains .4, .5, .6: mean .5, deviation .1, over sqrt 3, by Student's 4.303 of two degrees
    row = "| `guess` n=7 | 3 | .200 | .700 | .500 | .750 | +.500 [+.252, +.748] | 1.000 | 4 |"
    other = "| `guess` n=7, smollm2, LoRA 8 | 1 | .200 | .300 | .500 | .750 | +.100 | 1.000 | 4 |"
    assert tables.episodes().splitlines()[2:] == [row, other]
    assert "guess" not in tables.tasks()
