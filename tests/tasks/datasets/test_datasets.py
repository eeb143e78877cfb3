from jaxppo.data.examples import Example
from jaxppo.tasks.datasets import first_of_each_prompt, read_json_lines


def test_the_first_of_equal_prompts_stays():
    found = first_of_each_prompt([Example("a", "1"), Example("b", "2"), Example("a", "3")])
    assert [(x.prompt, x.reference) for x in found] == [("a", "1"), ("b", "2")]


def test_lines_of_json_become_examples():
    read = lambda data: read_json_lines(data, lambda row: [Example(row["q"], row["a"])])
    assert read(b'{"q": "1 + 1", "a": "2"}\n\n') == [Example("1 + 1", "2")]
