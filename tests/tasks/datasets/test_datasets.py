import pytest

from jaxppo.data.examples import Example
from jaxppo.data.fetch import FetchError
from jaxppo.tasks.datasets import first_of_each_prompt, read_json_lines


def test_the_first_of_equal_prompts_stays():
    found = first_of_each_prompt([Example("a", "1"), Example("b", "2"), Example("a", "3")], "x.txt")
    assert [(x.prompt, x.reference) for x in found] == [("a", "1"), ("b", "2")]
    with pytest.raises(FetchError, match="no examples in x.txt"):
        first_of_each_prompt([], "x.txt")


def test_lines_of_json_become_examples():
    read = lambda data: read_json_lines(
        data, lambda row: [Example(row["q"], row["a"])], what="x.jsonl", expected="a question"
    )
    assert read(b'{"q": "1 + 1", "a": "2"}\n\n') == [Example("1 + 1", "2")]
    for data in (b'{"q": "1 + 1", "a": "2"}\n{"q": ', b'{"q": "1 + 1", "a": "2"}\n[]'):
        with pytest.raises(FetchError, match="line 2 of x.jsonl is not a question"):
            read(data)
    with pytest.raises(FetchError, match="no examples in x.jsonl"):
        read(b"\n")
