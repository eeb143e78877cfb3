"""Render a page of text, tables, listings and pictures as HTML and as Markdown, and a
table as CSV.

Any text may come from a model or from a stranger's file, so it is shown and never
acted on. Each template escapes every expression: control characters are written out,
and marks of HTML and Markdown become plain characters. A text that a spreadsheet would
take for a formula gets an apostrophe in front.
"""

import base64
import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, select_autoescape

from jaxppo.run.files import printable


class Heading(NamedTuple):
    text: str


class Text(NamedTuple):
    text: str


class Table(NamedTuple):
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int | None = 1  # at the left; the others hold numbers; None: all


class Listing(NamedTuple):
    lines: Sequence[str]  # of a terminal


class Picture(NamedTuple):
    svg: str
    about: str
    file: str  # its name, in the folder of the Markdown

    @property
    def data(self) -> str:
        """The image in base64. As an image, an SVG cannot run scripts."""
        return base64.b64encode(self.svg.encode()).decode()


Block = Heading | Text | Table | Listing | Picture

# What Markdown, or GitHub's Markdown, could take for a mark.
MARKS = str.maketrans(
    {mark: f"\\{mark}" for mark in "\\`*_[]~$#"}
    | {"|": "&#124;", "@": "&#64;", "&": "&amp;", "<": "&lt;", ">": "&gt;"}
)
# A formula may also begin where ; separates cells.
FORMULA = re.compile(r"(^|;)(\s*)(?=[=+\-@\uff1d\uff0b\uff0d\uff20])")


def visible(text: str) -> str:
    """The text with its line ends and control characters shown.

    >>> visible("a\\nb\\x1b[2J\\ud800")
    'a↵b\\\\x1b[2J\\\\ud800'
    """
    return printable(text.replace("\r\n", "\n").replace("\n", "↵"))


def plain(text: str) -> str:
    """The text as Markdown that shows it and does nothing else.

    >>> print(plain("a_b <i> www.example.org"))
    a\\_b &lt;i&gt; www&#46;example.org
    """
    marked = visible(text).strip().translate(MARKS)
    marked = marked.replace("://", "&#58;//")  # otherwise an address becomes a link
    return re.sub(r"(?i)(www)\.", r"\1&#46;", marked)


def paragraph(text: str) -> str:
    """Plain Markdown that does not begin a list or a rule."""
    character = lambda found: f"{found[1]}&#{ord(found[2])};"
    return re.sub(r"^(\d*)([-+.)])", character, plain(text))


def fenced(lines: Sequence[str]) -> str:
    """A Markdown code block, whose fence is longer than any run of backticks in it."""
    shown = [visible(line) for line in lines]
    runs = re.findall("`+", "\n".join(shown))
    fence = "`" * (3 + max(map(len, runs), default=0))
    return "\n".join([fence, *shown, fence])


def _render(
    template: str, escape: Callable[[str], str], title: str, blocks: Sequence[Block]
) -> str:
    """Fill a template. `escape` is applied to every expression that is not marked safe;
    HTML is escaped by jinja2 after it.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.jinja"]),
        finalize=lambda x: x if hasattr(x, "__html__") else escape(str(x)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"paragraph": paragraph, "fenced": fenced}
    named = [(type(block).__name__, block) for block in blocks]
    return environment.get_template(template).render(title=title, blocks=named)


def html(title: str, blocks: Sequence[Block]) -> str:
    """The page as one HTML file that needs no other."""
    return _render("page.html.jinja", visible, title, blocks)


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The page as Markdown; pictures are files in the same folder."""
    return _render("page.md.jinja", plain, title, blocks)


def csv_text(header: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> str:
    """The rows as CSV. Numbers stay numbers; no text begins with a sign."""
    as_cell = lambda x: "" if x is None else guarded(x) if isinstance(x, str) else float(x)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([as_cell(x) for x in row] for row in [header, *rows])
    return out.getvalue()


def guarded(text: str) -> str:
    """The text in a form that no spreadsheet takes for a formula.

    >>> guarded("=cmd()"), guarded(" @x; -y"), guarded("a=b")
    ("'=cmd()", " '@x; '-y", 'a=b')
    """
    return FORMULA.sub(r"\1\2'", visible(text))
