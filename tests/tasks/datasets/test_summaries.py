"""Abstracts and their summaries by aspect."""

import json

import pytest

from jaxppo.data.fetch import FetchError
from jaxppo.tasks.datasets import summaries

PAPER = {
    "id": "P06-1112",
    "summary": {"outcome": "It  works.", "challenge": "It is hard.", "approach": "They try."},
    "sentences": {
        "abstract": ["We don 't use ( NER ) systems , here .", "50 % of it 's [ new ] !"],
        "introduction": ["Long ."],
    },
}


def test_parse():
    rows = summaries.parse(f"{json.dumps(PAPER)}\n\n{json.dumps(PAPER | {'id': 7})}\n".encode())
    assert len(rows) == 6
    assert {row.prompt for row in rows} == {"We don 't use (NER) systems, here. 50% of it's [new]!"}
    assert [row.reference for row in rows[:3]] == ["It is hard.", "They try.", "It works."]
    assert (
        [row.extra["aspect"] for row in rows[:3]]
        == list(summaries.ASPECTS)
        == ["challenge", "approach", "outcome"]
    )
    assert [row.extra["paper"] for row in rows[::3]] == ["P06-1112", "7"]


@pytest.fixture(scope="module")
def real():
    try:
        return summaries.load()
    except FetchError as error:
        pytest.skip(str(error))


@pytest.mark.ci
def test_real_papers(real):
    assert [len(part) for part in real] == [300, 150, 300]  # 3 aspects of 100, 50 and 100 papers
    papers = [{row.extra["paper"] for row in part} for part in real]
    assert len(set.union(*papers)) == 250
    lengths = [len(row.prompt.split()) for part in real for row in part]
    assert 100 < sum(lengths) / len(lengths) < 160
