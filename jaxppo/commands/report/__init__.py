"""`jaxppo report`: the results of runs as HTML, Markdown, CSV and SVG.

Runs that differ only by chance form a group, with intervals over its seeds, and groups
are compared. Failed runs stay in: a run that diverged is counted, is in the table of
results, and is drawn as far as its numbers are finite.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from jaxppo.commands.report import outcomes, pages, records, sections
from jaxppo.errors import UserError
from jaxppo.run import figures, files

FILES = ("report.html", "report.md", "report.csv", "report.svg")


@dataclass(frozen=True)
class ReportOptions:
    """Compare runs on one page: report.html, report.md, report.csv and report.svg.

    $ jaxppo report runs/sentiment
    $ jaxppo report runs/grpo-* runs/rloo-* --out comparison
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs or tasks; runs that differ only in the seed form one group"""
    out: Path | None = None
    """folder for the report; default: the run's, or ./report for several runs"""


def report(options: ReportOptions) -> None:
    """Write the report and print where it is."""
    print(f"written: {', '.join(str(path) for path in write(options.runs, options.out))}")


def write(folders: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Write a report on the runs in these folders. Returns its files.

    Raises UserError for a folder without a run, for runs without a step, and if the
    report cannot be written.
    """
    if not folders:
        raise UserError("no runs; give at least one folder")
    runs = [records.read(folder) for folder in dict.fromkeys(folders)]
    if not any(run.rows for run in runs):
        names = ", ".join(str(run.folder) for run in runs)
        raise UserError(f"no step yet in {names}; there is nothing to report")
    place = out or (runs[0].folder if len(runs) == 1 else Path("report"))
    groups = records.groups(runs)
    labels = [group.label for group in groups]
    title = " and ".join(labels) if len(groups) < 4 else f"{len(groups)} groups of runs"
    results = [outcomes.of_group(group) for group in groups]
    svg = figures.draw(groups)
    blocks = sections.report(groups, results, svg)
    texts = (
        pages.html(title, blocks),
        pages.markdown(title, blocks),
        pages.csv_text(outcomes.CSV_HEADER, outcomes.csv_rows(groups, results)),
        svg,
    )
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, text in zip(FILES, texts, strict=True):
            files.write_atomically(place / name, text)
    except OSError as error:
        raise UserError(
            f"cannot write to {place} ({error.strerror}); choose another --out folder"
        ) from error
    return [place / name for name in FILES]
