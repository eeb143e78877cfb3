import pytest
from hostile import Read
from report_runs import rows, seeds
from runs import a_run, lines

from jaxppo.commands import report
from jaxppo.commands.report import records, sections
from jaxppo.commands.report.pages import Table
from jaxppo.config import RunConfig
from jaxppo.errors import UserError


def test_the_commands_of_a_run(tmp_path):
    commands = "python a.py --lr 1\npython a.py --lr 1 --resume\n"
    report.write([a_run(tmp_path / "a", command_txt=commands)])
    page = Read((tmp_path / "a" / "report.html").read_text())
    assert page.of("pre") == ["$ python a.py --lr 1\n$ python a.py --lr 1 --resume"]
    assert "a was started and resumed with:" in page.of("p")


def test_runs_without_steps_and_repeated_seeds(tmp_path):
    a = seeds(tmp_path, "a", [0.0, 1.0])
    again = a_run(
        tmp_path / "again", RunConfig(steps=2), metrics_jsonl=rows([1.0, 1.0]) + "{half\n"
    )
    empty = a_run(tmp_path / "empty", RunConfig(steps=2, lr=1.0), metrics_jsonl="")
    report.write([*a, *a, again, empty], tmp_path / "out")
    said = Read((tmp_path / "out" / "report.html").read_text()).of("p")
    assert (
        "Note: a-0 and 1 more has a seed more than once; "
        "its interval takes these runs as independent" in said
    )
    assert (
        "Note: empty has no step yet" in said
        and "Note: again: metrics.jsonl: ignored 1 damaged line" in said
    )
    with pytest.raises(UserError, match=f"^no step yet in {empty}; there is nothing to report$"):
        report.write([empty])


@pytest.mark.parametrize(("more", "differ"), [([], False), ([[0.5, 0.5]], True)])
def test_seeds_are_among_the_settings_that_differ_only_if_they_do(tmp_path, more, differ):
    """Seeds 0 and 1 of both groups; or 0, 1 and 2 of the second."""
    curves = [[0.0, 1.0], [1.0, 1.0]]
    runs = [*seeds(tmp_path, "a", *curves), *seeds(tmp_path, "b", *curves, *more, lr=1.0)]
    found = sections.settings_tables(records.groups([records.read(path) for path in runs]))
    first, shared = (block.rows for block in found if isinstance(block, Table))
    assert ["seed" in (row[0] for row in table) for table in (first, shared)] == [
        differ,
        not differ,
    ]
    assert tuple(shared[-1]) == ("seed", "0", "0, 1") or differ


@pytest.mark.parametrize("functions", ["reward f@1, environment 0a1b", "reward environment@1"])
def test_episodes_are_shown_turn_by_turn(tmp_path, functions):
    """A line a turn; a run without an environment may write such brackets itself."""
    sample = {"step": 1, "prompt": "1-9", "response": "5\n⟦higher\n⟧7 7⟦?⟧", "reward": 1.0}
    config = RunConfig(steps=1, functions=functions)
    said = lines(sample, {**sample, "response": "no"})
    run = a_run(tmp_path / "a", config, metrics_jsonl=rows([1.0]), samples_jsonl=said)
    about, table = sections.sample_table(records.groups([records.read(run)])[0])
    if "environment 0a1b" in functions:
        assert table.header == [
            "prompt", "turn", "the policy wrote", "the environment answered", "step", "reward",
        ]  # fmt: skip
        assert [[*row] for row in table.rows] == [
            ["1-9", "1", "no", "", "1", "1"],
            ["1-9", "1", "5\n", "higher\n", "1", "1"],
            ["", "2", "7 7", "?", "", ""],
        ]
        assert about.text.endswith("Each line is a turn of an episode.")
    else:
        assert table.rows[1][2] == sample["response"]
