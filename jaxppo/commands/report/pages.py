"""A page of text, tables, listings and pictures as one HTML file, as Markdown, and a
table as CSV.

Every word may come from a model or from a file that somebody sent. So all of it is
shown and none of it works: control characters and halves of characters are written out,
marks of HTML and Markdown become plain characters, what a spreadsheet would take for a
formula gets an apostrophe before it. The HTML forbids the browser scripts and requests.
"""

import base64
import csv
import html as escaping
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxppo.run.files import printable


class Heading(NamedTuple):
    text: str


class Text(NamedTuple):
    text: str


class Table(NamedTuple):
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1  # columns at the left that are no numbers; 0 = none is a number


class Listing(NamedTuple):
    lines: Sequence[str]  # of a terminal


class Picture(NamedTuple):
    svg: str
    about: str
    file: str  # its name beside the Markdown


Block = Heading | Text | Table | Listing | Picture

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
div { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; margin: .6rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #888; vertical-align: bottom; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td { overflow-wrap: break-word; } td.number { min-width: 3.5rem; }
table.numbers td:first-child { white-space: nowrap; }
table.words td { overflow-wrap: anywhere; min-width: 6rem; }
pre { background: #f5f5f5; padding: .7rem; font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; }
img { width: 100%; height: auto; }
@media print {
  html { font-size: 9pt; }
  body { max-width: none; margin: 0; padding: 0; font-size: 9pt; }
  div { overflow: visible; } th, td { padding: .1rem .4rem; }
  img { max-height: 22cm; width: auto; max-width: 100%; }
  img, tr, pre { break-inside: avoid; } h2 { break-after: avoid; }
}
"""

# The browser's own lock: no scripts, no requests, nothing but this style and pictures
# that are written here.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
# What Markdown (GitHub's, too: tables, names, formulas) could take for a mark.
MARKS = {ord(mark): f"\\{mark}" for mark in "\\`*_[]~$#"} | {ord("|"): "&#124;", ord("@"): "&#64;"}


MARKS |= {ord(mark): escaping.escape(mark) for mark in "&<>"}


FORMULA = re.compile(
    r"(^|;)(\s*)(?=[=+\-@\uff1d\uff0b\uff0d\uff20])"
)  # also where ; and not , is between cells


def visible(text: str) -> str:
    """The text with its ends of lines and control characters shown.

    >>> visible("a\\nb\\x1b[2J\\ud800")
    'a↵b\\\\x1b[2J\\\\ud800'
    """
    return printable(text.replace("\r\n", "\n").replace("\n", "↵"))


def html(title: str, blocks: Sequence[Block]) -> str:
    """One file that needs no other."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{_safe(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{_safe(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _safe(text: str) -> str:
    return escaping.escape(visible(text))


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{_safe(text)}</h2>"
        case Text(text):
            return f"<p>{_safe(text)}</p>"
        case Listing(lines):
            return "<pre>" + "\n".join(_safe(line) for line in lines) + "</pre>"
        case Picture(svg, about, _):
            # as an image a picture can run nothing, whatever it holds
            data = base64.b64encode(svg.encode()).decode()
            return f'<img src="data:image/svg+xml;base64,{data}" alt="{_safe(about)}">'
        case Table(header, rows, words):
            kind = lambda place: "number" if 0 < words <= place else "word"
            cell = lambda tag, place, text: f'<{tag} class="{kind(place)}">{_safe(text)}</{tag}>'
            line = lambda tag, row: (
                "<tr>" + "".join(cell(tag, place, text) for place, text in enumerate(row)) + "</tr>"
            )
            lines = "\n".join([line("th", header), *(line("td", row) for row in rows)])
            return (
                f'<div><table class="{"numbers" if words else "words"}">\n{lines}\n</table></div>'
            )


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The same; pictures are files beside it."""
    return "\n\n".join([f"# {_plain(title)}", *(_markdown(block) for block in blocks)]) + "\n"


def _plain(text: str) -> str:
    text = visible(text).strip().translate(MARKS).replace("://", "&#58;//")
    return re.sub(
        r"(?i)www\.", lambda found: f"{found[0][:-1]}&#46;", text
    )  # either would become a link without any mark


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {_plain(text)}"
        case Text(text):  # a list or a rule would begin so
            return re.sub(
                r"^(\d*)([-+.)])", lambda found: f"{found[1]}&#{ord(found[2])};", _plain(text)
            )
        case Listing(lines):
            shown = [visible(line) for line in lines]
            fence = "`" * (
                3 + max((len(run) for line in shown for run in re.findall("`+", line)), default=0)
            )
            return "\n".join([fence, *shown, fence])
        case Picture(_, about, file):
            return f"![{_plain(about)}]({file})"
        case Table(header, rows, words):
            line = lambda cells: "| " + " | ".join(_plain(cell) or " " for cell in cells) + " |"
            rule = "|" + "".join(
                " ---: |" if 0 < words <= place else " --- |" for place in range(len(header))
            )
            return "\n".join([line(header), rule, *(line(row) for row in rows)])


def comma_separated(header: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> str:
    """CSV. Numbers are written as numbers, so that one below 0 begins with its sign; no
    text begins with a sign.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in [header, *rows]:
        writer.writerow(
            [
                ""
                if cell is None
                else guarded(cell)
                if isinstance(cell, str)
                else repr(float(cell))
                for cell in row
            ]
        )
    return out.getvalue()


def guarded(text: str) -> str:
    """A text that no spreadsheet takes for a formula.

    >>> guarded("=cmd()"), guarded(" @x; -y"), guarded("a=b")
    ("'=cmd()", " '@x; '-y", 'a=b')
    """
    return FORMULA.sub(r"\1\2'", visible(text))
