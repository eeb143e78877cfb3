"""Hostile text is shown in HTML, Markdown and CSV, and does nothing there. A Markdown parser
reads the Markdown with HTML allowed.
"""

import base64
import csv
import io
import re

import pytest
from hostile import TEXTS, Read
from markdown_it import MarkdownIt

from jaxppo.commands.report import pages
from jaxppo.commands.report.pages import Heading, Listing, Picture, Table, Text

SVG = '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


def blocks(text: str) -> list[pages.Block]:
    row = [text, "in between", text]
    tables = [Table(row, [row, row]), Table(row, [row], text_columns=None)]
    return [Heading(text), Text(text), *tables, Listing([text, text]), Picture(SVG, text, "a.svg")]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_html_shows_everything_and_runs_nothing(text):
    page = pages.html(text, blocks(text))
    page.encode()  # no lone surrogates
    found, seen = Read(page), " ".join(pages.visible(text).split())
    assert found.harmless()
    same = lambda texts: {" ".join(x.split()) for x in texts}
    assert (
        same(found.of("h1"))
        == same(found.of("h2"))
        == same(found.of("p"))
        == same(found.of("title"))
        == {seen}
    )
    assert same(found.of("td")) == {seen, "in between"} and len(found.of("td")) == 9
    assert found.of("pre")[0].split("\n")[0] == pages.visible(text).strip()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e]", page)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_markdown_shows_everything_and_runs_nothing(text):
    page = pages.markdown(text, blocks(text))
    page.encode()
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    found, seen = Read(reader.render(page)), pages.visible(text).strip()
    assert found.harmless(), found.tags
    assert found.of("h1") == [seen] and found.of("h2") == [seen]
    assert (
        found.of("td") == [seen, "in between", seen] * 3
        and found.of("th") == [seen, "in between", seen] * 2
    )
    assert [x for x in found.of("p") if x] == [seen]
    assert found.of("code")[0].split("\n")[0] == pages.visible(text).rstrip() or text.startswith(
        " "
    )
    assert not re.search(r"(?i)www\.|https?://", page.split("\n```")[0])  # a link without any mark
    assert len(page.split("\n")) == 22


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_no_text_cell_is_a_formula(text):
    page = pages.csv_text([text, "b"], [[text, -0.5], [text, None]])
    page.encode()
    for delimiter in ",;\t":
        for row in csv.reader(io.StringIO(page), delimiter=delimiter):
            for cell in row:
                numeric = delimiter == "," and cell == "-0.5"
                assert numeric or not re.match(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]", cell), (
                    delimiter,
                    cell,
                )
    rows = list(csv.reader(io.StringIO(page)))
    assert len(rows) == 3 and float(rows[1][1]) == -0.5 and rows[2][1] == ""
    assert rows[1][0].replace("'", "") == pages.visible(text).replace("'", "")


def test_numbers_in_csv_are_unchanged():
    assert (
        pages.csv_text(["a"], [[0.1], [1e-12], [float("nan")], [-3.0]])
        == "a\n0.1\n1e-12\nnan\n-3.0\n"
    )


def test_html_needs_no_other_file():
    page = pages.html("title", [Picture(SVG, "about", "a.svg")])
    assert "://" not in page.replace(base64.b64encode(SVG.encode()).decode(), "")
    found = Read(page)
    policy = next(x["content"] for tag, x in found.tags if tag == "meta" and "http-equiv" in x)
    assert (
        policy.startswith("default-src 'none';")
        and "script" not in policy
        and "img-src data:;" in policy
    )
    (source,) = [x["src"] for tag, x in found.tags if tag == "img"]
    assert base64.b64decode(source.split(",")[1]).decode() == SVG  # scripts of an image never run


def test_markdown_text():
    table = Table(["number", "on", "a"], [["kl_coef", "x", "1"]], text_columns=2)
    cells = "| number | on | a |\n| --- | --- | ---: |\n| kl\\_coef | x | 1 |"
    want = f"# t\n\n## h\n\n{cells}\n\n```\n$ python a_b.py\n```\n\n![c](a.svg)\n"
    assert (
        pages.markdown(
            "t", [Heading("h"), table, Listing(["$ python a_b.py"]), Picture(SVG, "c", "a.svg")]
        )
        == want
    )
