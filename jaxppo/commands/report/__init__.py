"""What runs have come to, on one page: report.html, report.md, the final table as
report.csv and the curves as report.svg.

Runs that differ by chance alone are a group, with a band and an interval over its
seeds; groups are compared. Nothing is left out because it went wrong: a run that
diverged is counted, is in the final table, and is drawn as far as it has numbers (from
there on the line is the mean of the others, as the remark below the picture says).
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from jaxppo.ablation import statistics
from jaxppo.commands.report import figures, outcomes, pages, records
from jaxppo.commands.report.outcomes import End, Key
from jaxppo.commands.report.pages import Heading, Listing, Picture, Table, Text
from jaxppo.commands.report.records import Group, Run
from jaxppo.errors import UserError
from jaxppo.presets import ALGORITHMS
from jaxppo.run import files

SHOWN = 10  # samples of a group
LONGEST = 300  # characters of a sample
FORMS = ("report.html", "report.md", "report.csv", "report.svg")
# columns of samples
FIRST = ("prompt", "reference", "supervised", "before", "policy", "after")


def write(paths: Sequence[Path], out: Path | None = None) -> list[Path]:
    """The report on runs, in a folder: `out`, or else a single run's own, or ./report
    for several. Returns its files.

    Raises UserError for a folder without a run, for runs of which none has a step, and
    where it cannot be written.
    """
    if not paths:
        raise UserError("no runs; give at least one folder")
    runs = [records.read(path) for path in dict.fromkeys(paths)]
    if not any(run.rows for run in runs):
        raise UserError(
            f"no step yet in {', '.join(str(run.path) for run in runs)}; there is nothing to report"
        )
    place = out or (runs[0].path if len(runs) == 1 else Path("report"))
    groups = records.groups(runs)
    ends = [outcomes.group_ends(group) for group in groups]
    svg = figures.curves(groups)
    title = (
        " and ".join(group.label for group in groups)
        if len(groups) < 4
        else f"{len(groups)} groups of runs"
    )
    blocks = page(groups, ends, svg)
    texts = (
        pages.html(title, blocks),
        pages.markdown(title, blocks),
        pages.comma_separated(*outcomes.as_lines(groups, ends)),
        svg,
    )
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, text in zip(FORMS, texts, strict=True):
            files.write_whole(place / name, text)
    except OSError as error:
        raise UserError(
            f"cannot write to {place} ({error.strerror}); choose another --out folder"
        ) from error
    return [place / name for name in FORMS]


def page(groups: Sequence[Group], ends: Sequence[dict[Key, End]], svg: str) -> list[pages.Block]:
    """The report from top to bottom."""
    runs = [run for group in groups for run in group.runs]
    count = (
        f"{len(runs)} run{'s' * (len(runs) > 1)} in {len(groups)} group{'s' * (len(groups) > 1)}"
    )
    window = figures.smoothing(groups)
    about = [f"Training: running means of {window} steps of each run."] * (window > 1)
    about += ["Line: mean over a group's seeds; band: lowest to highest of them."] * (
        len(runs) > len(groups)
    )
    about += ["Thin: each step."] * (len(runs) == 1 < window)
    blocks: list[pages.Block] = [
        Text(
            f"{count}; runs that differ in their seed alone (and in places and machines) are one group."
        ),
        *(Text(f"Note: {remark}") for remark in remarks(groups)),
        Heading("Where they ended"),
        Table(*outcomes.table(groups, ends), words=2),
        Text(ABOUT_INTERVALS),
        *against_the_first(groups),
        Heading("Curves"),
        Picture(svg, f"Curves of {count} over training steps", "report.svg"),
        *([Text(" ".join(about))] if about else []),
        Heading("Settings"),
        *settings_table(groups),
        Heading("Samples"),
        *(block for group in groups for block in sample_tables(group)),
        Heading("What went wrong"),
        fault_table(groups),
        Heading("Versions"),
        version_table(runs),
        Heading("To do it again"),
        *(block for run in runs for block in again(run)),
    ]
    return blocks


ABOUT_INTERVALS = (
    "In brackets: 95 %. Over several seeds by Student's t, which is wide for two or three of them and says how sure the mean is "
    "for other seeds; for a single run on test examples by bootstrap over the examples, which says nothing of other seeds; for "
    f"training and validation of a single run there is none. Training: mean of the last {outcomes.LAST} steps. Every run is in "
    "report.csv."
)


def against_the_first(groups: Sequence[Group]) -> list[pages.Block]:
    """The other groups less the first, where seeds are in both."""
    found = outcomes.differences(groups)
    if not found:
        return []
    pairs, ends = zip(*found, strict=True)
    return [Text(ABOUT_DIFFERENCES), Table(*outcomes.table(pairs, ends), words=2)]


ABOUT_DIFFERENCES = (
    "The other groups less the first, run against run of the same seed; in brackets 95 % by Student's t over the seeds. p: how "
    f"often signs thrown at random come so far from 0; there is none below {statistics.FEW} seeds, where it could not fall below "
    ".05. No number is held to a stricter level because many are compared."
)


def remarks(groups: Sequence[Group]) -> list[str]:
    """What a reader has to know before the numbers."""
    found = []
    for group in groups:
        seeds = [run.settings.get("seed") for run in group.runs]
        if len(set(seeds)) < len(seeds):
            found.append(
                f"{group.label} has a seed more than once; its interval takes them for independent runs"
            )
        for run in group.runs:
            found += [f"{run.name}: {remark}" for remark in run.remarks]
            if not run.rows:
                found.append(f"{run.name} has no step yet")
            elif run.rows[-1]["step"] < run.settings.get("steps", 0):
                found.append(
                    f"{run.name} ends at step {int(run.rows[-1]['step'])} of {run.settings['steps']}"
                )
            if bad := records.faults(run)["steps with a number that is not finite"]:
                found.append(f"{run.name} has {int(bad)} steps with a number that is not finite")
    return found


def settings_table(groups: Sequence[Group]) -> list[pages.Block]:
    """What the groups differ in, and what they have in common that is no default of the
    library's.
    """
    base = records.defaults(groups[0].runs[0].settings)
    each = [records.compared(group.runs[0]) for group in groups]
    names = [
        name
        for name in dict.fromkeys(name for own in each for name in own)
        if name not in ("eos", "pad")
    ]
    differ = [
        name for name in names if any(own.get(name, ...) != each[0].get(name, ...) for own in each)
    ]
    common = [name for name in names if name not in differ and each[0][name] != base.get(name, ...)]
    blocks: list[pages.Block] = []
    seeds = lambda group: ", ".join(str(run.settings.get("seed", 0)) for run in group.runs)
    if len(groups) > 1:
        rows = [
            [name, worded(base.get(name, "–")), *(worded(own.get(name)) for own in each)]
            for name in differ
        ]
        rows.append(["seed", "0", *map(seeds, groups)])
        blocks += [
            Text("What the groups differ in:"),
            Table(["setting", "default", *(group.label for group in groups)], rows, words=0),
        ]
    rows = [[name, worded(base.get(name, "–")), worded(each[0][name])] for name in common]
    rows += [["seed", "0", seeds(groups[0])]] if len(groups) == 1 else []
    known = "All of them" if len(groups) > 1 else "What is set"
    about = Text(f"{known}, where the library's defaults are others (a script may have its own):")
    return [*blocks, about, Table(["setting", "default", "here"], rows, words=0)]


def worded(x: Any) -> str:
    """A setting as a word.

    >>> worded(None), worded(True), worded([["tau", 1.0]]), worded("")
    ('none', 'yes', '[["tau", 1.0]]', '(empty)')
    """
    words = {None: "none", True: "yes", False: "no", "": "(empty)"}
    if x is None or isinstance(x, bool | str):
        return words.get(x, str(x))
    return json.dumps(x) if isinstance(x, list | dict) else str(x)


def sample_tables(group: Group) -> list[pages.Block]:
    """Prompts with their responses before and after, as they come in the file: the
    first of them, not the best.
    """
    run = next((run for run in group.runs if run.samples), None)
    if run is None:
        return [Text(f"{group.label}: none were written.")]
    rows = run.samples[:SHOWN]
    found = dict.fromkeys(
        name for row in rows for name, x in row.items() if isinstance(x, str | int | float)
    )
    columns = sorted(found, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))[:8]
    stages = {"supervised": "before: supervised", "policy": "after: policy"}
    cells = [[cut(row.get(name, "")) for name in columns] for row in rows]
    about = (
        f"{run.name}: the first {len(rows)} of {len(run.samples)} held-out prompts, as they come."
    )
    return [Text(about), Table([stages.get(name, name) for name in columns], cells, words=0)]


def cut(x: Any) -> str:
    """A cell of a table of samples."""
    text = f"{x:.3g}" if isinstance(x, float) else str(x)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text)} characters)"


def fault_table(groups: Sequence[Group]) -> Table:
    """A line a run: how far it came, and the counters of its metrics."""
    runs = [run for group in groups for run in group.runs]
    counted = [records.faults(run) for run in runs]
    rows = []
    for run, found in zip(runs, counted, strict=True):
        done = int(run.rows[-1]["step"]) if run.rows else 0
        rows.append(
            [
                run.name,
                f"{done} / {run.settings.get('steps', '?')}",
                *(f"{x:.3g}" for x in found.values()),
            ]
        )
    return Table(["run", "steps", *counted[0]], rows)


def version_table(runs: Sequence[Run]) -> Table:
    """What the runs ran on; one line for those that are alike."""
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(json.dumps(run.versions, sort_keys=True), []).append(run)
    own = {"this report": files.versions()}
    found = {", ".join(run.name for run in some): some[0].versions for some in alike.values()} | own
    names = list(dict.fromkeys(name for versions in found.values() for name in versions))
    return Table(
        ["", *names],
        [[who, *(x.get(name, "–")[:10] for name in names)] for who, x in found.items()],
        words=99,
    )


def again(run: Run) -> list[pages.Block]:
    """The command that made a run; for one that did not write it down, its settings as
    options.
    """
    if run.commands:
        later = " and gone on with" * (len(run.commands) > 1)
        return [
            Text(f"{run.name} was started{later} so:"),
            Listing([f"$ {command}" for command in run.commands]),
        ]
    if run.whole:
        settings = run.result.get("config")
        settings = settings if isinstance(settings, dict) else {}
        about = "has no command.txt. Its script with these options, and those of the script's own defaults that are others:"
        return [
            Text(f"{run.name} {about}"),
            Listing(["$ python SCRIPT.py --name NEW " + options(settings)]),
        ]
    return [
        Text(
            f"{run.name} has no command.txt. All its settings again, with the script that made it:"
        ),
        Listing(
            [
                f"$ python SCRIPT.py --config {shlex.quote(str(run.place / 'config.json'))} --name NEW"
            ]
        ),
        Text("Those that are no defaults of the library's, as options:"),
        Listing([options(run.settings)]),
    ]


def options(settings: dict[str, Any]) -> str:
    """The settings that are neither defaults nor the algorithm's, as they are typed.

    >>> options(
    ...     {
    ...         "steps": 7,
    ...         "kl_adaptive": False,
    ...         "name": "a b",
    ...         "loss_settings": [["tau", 1.0]],
    ...         "clip_low": None,
    ...     }
    ... )
    '--no-kl-adaptive --loss-settings tau 1.0 --steps 7'
    """
    chosen = ALGORITHMS.get(str(settings.get("algorithm")))
    base, words = records.defaults(settings) | (chosen.settings if chosen else {}), []
    for name, x in sorted(
        settings.items(), key=lambda pair: (not isinstance(pair[1], bool | list), pair[0])
    ):
        if x == base.get(name, ...) or name in ("name", "runs", "resume", "results", "eos", "pad"):
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(x, bool):
            words.append(option if x else option.replace("--", "--no-", 1))
        else:
            flat = (
                [y for part in x for y in (part if isinstance(part, list) else [part])]
                if isinstance(x, list)
                else [x]
            )
            words += [option, *(shlex.quote(str(y)) for y in flat)]
    return " ".join(words)


@dataclass(frozen=True)
class ReportOptions:
    """What runs have come to, on one page: report.html, report.md, report.csv and
    report.svg.

    $ jaxppo report runs/sentiment
    $ jaxppo report runs/grpo-* runs/rloo-* --out comparison
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs, or of tasks' whole ways; those that differ in their seed alone
    are one group
    """
    out: Path | None = None
    """folder for the report; without it the folder of a single run, or ./report for
    several
    """


def report(options: ReportOptions) -> None:
    """Write the report on runs."""

    print(f"written: {', '.join(str(path) for path in write(options.runs, options.out))}")
