"""The sections of a report, as blocks of text and tables."""

import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

from jaxppo.ablation import statistics
from jaxppo.commands.report import outcomes, records
from jaxppo.commands.report.outcomes import Outcomes
from jaxppo.commands.report.pages import Block, Heading, Listing, Picture, Table, Text
from jaxppo.commands.report.records import Group, Run, counted
from jaxppo.run import figures, files

NEVER = ("eos", "pad", "start", "chats")  # settings that scripts set
SHOWN_SAMPLES = 10  # of a group
MAX_CHARACTERS = 300  # of a sample
# Columns of samples: these first, then others up to 8.
FIRST_COLUMNS = (
    "prompt",
    "turn",
    "written",
    "answered",
    "reference",
    "supervised",
    "start",
    "before",
    "policy",
    "after",
)
COLUMN_TITLES = {
    "supervised": "before: supervised",
    "policy": "after: policy",
    "written": "the policy wrote",
    "answered": "the environment answered",
}

ABOUT_INTERVALS = (
    "In brackets: 95 % intervals. With several seeds, Student's t over the seeds (wide for two or "
    "three). With one run, a bootstrap over the test examples, which says nothing about other "
    "seeds; its training and validation numbers have no interval. Training: mean of the last "
    f"{outcomes.LAST} steps. report.csv has every run."
)
ABOUT_DIFFERENCES = (
    "The other groups minus the first, paired by seed, with 95 % intervals by Student's t over the "
    "seeds. p: how often random signs give a difference as far from 0; it is left out below "
    f"{statistics.MIN_SEEDS_FOR_P} seeds, where it cannot fall below .05. Nothing is corrected "
    "for multiple comparisons."
)


def report(groups: Sequence[Group], results: Sequence[Outcomes], svg: str) -> list[Block]:
    """The whole report."""
    runs = [run for group in groups for run in group.runs]
    count = f"{counted(len(runs), 'run')} in {counted(len(groups), 'group')}"
    samples = [block for group in groups for block in sample_table(group)]
    return [
        Text(f"{count}. Runs that differ only in seed, folders and machine form one group."),
        *(Text(f"Note: {note}") for note in notes(groups)),
        Heading("Results"),
        Table(*outcomes.table(groups, results), text_columns=2),
        Text(ABOUT_INTERVALS),
        *difference_table(groups),
        Heading("Curves"),
        Picture(svg, f"Curves of {count} over training steps", "report.svg"),
        *about_curves(groups),
        Heading("Settings"),
        *settings_tables(groups),
        Heading("Samples"),
        *samples,
        Heading("Faults"),
        fault_table(runs),
        Heading("Versions"),
        version_table(runs),
        Heading("Reproduce"),
        *(block for run in runs for block in reproduction(run)),
    ]


def notes(groups: Sequence[Group]) -> list[str]:
    """What a reader must know before the numbers."""
    found = []
    for group in groups:
        seeds = [run.settings.get("seed") for run in group.runs]
        if len(set(seeds)) < len(seeds):
            found.append(
                f"{group.label} has a seed more than once; its interval takes these runs as "
                "independent"
            )
        for run in group.runs:
            found += [f"{run.name}: {note}" for note in run.notes]
            steps = run.settings.get("steps", 0)
            if not run.rows:
                found.append(f"{run.name} has no step yet")
            elif run.rows[-1]["step"] < steps:
                found.append(f"{run.name} ends at step {int(run.rows[-1]['step'])} of {steps}")
            if bad := int(records.faults(run)["steps with a non-finite number"]):
                found.append(f"{run.name} has {counted(bad, 'step')} with a non-finite number")
    return found


def difference_table(groups: Sequence[Group]) -> list[Block]:
    """The other groups minus the first, if they share seeds."""
    found = outcomes.differences(groups)
    if not found:
        return []
    pairs, results = zip(*found)
    return [Text(ABOUT_DIFFERENCES), Table(*outcomes.table(pairs, results), text_columns=2)]


def about_curves(groups: Sequence[Group]) -> list[Block]:
    """How to read the lines of the picture."""
    window, runs = figures.smoothing(groups), sum(len(group.runs) for group in groups)
    about = [f"Training: averages over {window} steps of each run."] * (window > 1)
    if runs > len(groups):
        about.append("Line: mean over the seeds of a group; band: lowest to highest.")
    if runs == 1 < window:
        about.append("Thin line: each step.")
    return [Text(" ".join(about))] if about else []


def settings_tables(groups: Sequence[Group]) -> list[Block]:
    """The settings in which groups differ, then shared ones that are not defaults."""
    base = records.defaults(groups[0].runs[0].settings)
    each = [records.group_settings(group.runs[0]) for group in groups]
    default = lambda name: setting_text(base.get(name, "–"))
    names = dict.fromkeys(name for own in each for name in own if name not in NEVER)
    differ = [
        name for name in names if any(own.get(name, ...) != each[0].get(name, ...) for own in each)
    ]
    shared = [
        [name, default(name), setting_text(each[0][name])]
        for name in names
        if name not in differ and each[0][name] != base.get(name, ...)
    ]
    seeds_of = lambda group: ", ".join(str(run.settings.get("seed", 0)) for run in group.runs)
    seeds = [*map(seeds_of, groups)]
    same = len({*seeds}) == 1
    shared += [["seed", "0", seeds[0]]] * same
    header = ["setting", "default", "here"]
    if len(groups) == 1:
        about = Text("Settings that are not the library's defaults (a script may have its own):")
        return [about, Table(header, shared, text_columns=None)]
    rows = [
        [name, default(name), *(setting_text(own.get(name)) for own in each)] for name in differ
    ]
    rows += [["seed", "0", *seeds]] * (not same)
    labels = [group.label for group in groups]
    return [
        Text("Settings in which the groups differ:"),
        Table(["setting", "default", *labels], rows, text_columns=None),
        Text("Shared settings that are not the library's defaults (a script may have its own):"),
        Table(header, shared, text_columns=None),
    ]


def setting_text(x: Any) -> str:
    """A setting's value for readers.

    >>> (
    ...     setting_text(None),
    ...     setting_text(True),
    ...     setting_text([["tau", 1.0]]),
    ...     setting_text(""),
    ... )
    ('none', 'yes', '[["tau", 1.0]]', '(empty)')
    """
    if x is None or isinstance(x, bool | str):
        return {None: "none", True: "yes", False: "no", "": "(empty)"}.get(x, str(x))
    return json.dumps(x) if isinstance(x, list | dict) else str(x)


def sample_table(group: Group) -> list[Block]:
    """The first samples of the group's first run that has any, unselected."""
    run = next((run for run in group.runs if run.samples), None)
    if run is None:
        return [Text(f"{group.label}: no samples.")]
    rows = run.samples[:SHOWN_SAMPLES]
    about = f"{run.name}: the first {len(rows)} of {len(run.samples)} held-out prompts, unselected."
    if "step" in rows[0]:
        rows = run.samples[::-1][:SHOWN_SAMPLES]
        about = f"{run.name}: responses to training prompts, newest first, unselected."
    if run.plays_episodes:
        rows = [turn for row in rows for turn in by_turn(row)]
        about += " Each line is a turn of an episode."
    names = dict.fromkeys(
        k for row in rows for k, x in row.items() if isinstance(x, str | int | float)
    )
    rank = lambda name: FIRST_COLUMNS.index(name) if name in FIRST_COLUMNS else len(FIRST_COLUMNS)
    columns = sorted(names, key=rank)[:8]
    cells = [[sample_text(row.get(name, "")) for name in columns] for row in rows]
    header = [COLUMN_TITLES.get(name, name) for name in columns]
    return [Text(about), Table(header, cells, text_columns=None)]


def by_turn(row: dict[str, Any]) -> list[dict[str, Any]]:
    """An episode's row as one for each turn. In the response, answers are in ⟦ ⟧
    (`run.samples`); the first turn's row has the other columns.

    >>> [(x["written"], x["answered"]) for x in by_turn({"response": "5⟦higher⟧7"})]
    [('5', 'higher'), ('7', '')]
    """
    pairs = re.findall("([^⟦]*)(?:⟦([^⟧]*)⟧)?", str(row.get("response", "")))
    turns = [
        {"turn": number, "written": written, "answered": answered}
        for number, (written, answered) in enumerate(filter(any, pairs), 1)
    ]
    others = {name: x for name, x in row.items() if name != "response"}
    return [others | turns[0], *turns[1:]] if turns else [others]


def sample_text(x: Any) -> str:
    """A cell of the table of samples; a long text is cut."""
    text = f"{x:.3g}" if isinstance(x, float) else str(x)
    long = len(text) > MAX_CHARACTERS
    return f"{text[:MAX_CHARACTERS]} … ({len(text)} characters)" if long else text


def fault_table(runs: Sequence[Run]) -> Table:
    """The steps and the fault counters of each run."""
    counts = [records.faults(run) for run in runs]
    rows = []
    for run, found in zip(runs, counts):
        done = int(run.rows[-1]["step"]) if run.rows else 0
        steps = f"{done} / {run.settings.get('steps', '?')}"
        rows.append([run.name, steps, *(f"{x:.3g}" for x in found.values())])
    return Table(["run", "steps", *counts[0]], rows)


def version_table(runs: Sequence[Run]) -> Table:
    """The library versions of the runs; runs with the same versions share a row."""
    names_of: dict[str, list[str]] = {}
    for run in runs:
        names_of.setdefault(json.dumps(run.versions, sort_keys=True), []).append(run.name)
    found = {", ".join(names): json.loads(versions) for versions, names in names_of.items()}
    found["this report"] = files.versions()
    columns = dict.fromkeys(name for versions in found.values() for name in versions)
    rows = [[who, *(x.get(name, "–")[:10] for name in columns)] for who, x in found.items()]
    return Table(["", *columns], rows, text_columns=1 + len(columns))


def reproduction(run: Run) -> list[Block]:
    """The commands that made a run, or its settings if they are unknown."""
    if run.commands:
        resumed = " and resumed" * (len(run.commands) > 1)
        commands = [f"$ {command}" for command in run.commands]
        return [Text(f"{run.name} was started{resumed} with:"), Listing(commands)]
    if run.is_task:
        return [Text(f"{run.name} has no command.txt. Its settings are in result.json.")]
    path = shlex.quote(str(run.config_folder / "config.json"))
    return [
        Text(f"{run.name} has no command.txt. Run its script with the stored settings:"),
        Listing([f"$ python SCRIPT.py --config {path} --name NEW"]),
    ]
