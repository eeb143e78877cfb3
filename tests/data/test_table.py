import json
from types import SimpleNamespace

import numpy as np
import pytest

from jaxppo.data import rows, table
from jaxppo.errors import UserError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def tokenizer():
    """A token a character; a chat is its contents between bars."""
    return SimpleNamespace(
        encode=lambda text: [ord(c) % 50 for c in text],
        apply_chat=lambda messages: "|".join(x["content"] for x in messages) + ">",
        pad_id=0,
        start_id=9,
        vocab_size=50,
    )


class Frame:
    """A table as pandas has it: iterating gives the names of its columns."""

    columns = ("prompt", "answer")

    def __iter__(self):
        return iter(self.columns)


@pytest.mark.parametrize(
    ("prompts", "columns"),
    [
        (["a", "b"], {"prompt": ["a", "b"]}),
        ([CHAT], {"prompt": [CHAT]}),
        (
            [{"answer": 1, "prompt": "a"}, {"prompt": "b", "hint": "c"}],
            {"prompt": ["a", "b"], "answer": [1, None], "hint": [None, "c"]},
        ),
    ],
)
def test_forms_of_prompts(prompts, columns):
    found = table.read_columns(prompts)
    assert found == columns and next(iter(found)) == "prompt"


def test_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": CHAT, "x": 1}) + "\n" + json.dumps({"prompt": "a"}))
    assert table.read_columns(path) == table.read_columns(str(path))
    assert table.read_columns(path) == {"prompt": [CHAT, "a"], "x": [1, None]}


def test_a_bad_line_has_its_number_or_is_skipped(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"text": "b"}\n')
    with pytest.raises(UserError, match="line 3: 'prompt' is missing"):
        table.read_columns(path)
    with pytest.warns(UserWarning, match="skipped 1 bad line"):
        assert table.read_file(path, bad_lines="skip") == [{"prompt": "a"}]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("one text", "is one text; give a list"),
        ([], "there are no prompts"),
        (["a", " "], "prompt 1 is empty"),
        ([{"text": "a"}], "prompt 0 is missing"),
        ([3], "prompt 0 is a int"),
        ([["a", "b"]], "prompt 0 is no chat"),
        ([[{"role": "user"}]], "prompt 0 is no chat"),
        (7, "prompts are a int"),
        ({"train": [], "test": []}, "are a dict of train, test, not rows; give a list of dicts"),
        ({"prompt": ["a"], "answer": [1]}, "are a dict of prompt, answer, not rows"),
        (Frame(), "are a Frame of prompt, answer, not rows"),
        ({"a", "b"}, "are a set, which has no order"),
        ([[*CHAT, {"role": "assistant", "content": "Yo"}]], "ends with the assistant's message"),
    ],
)
def test_what_is_no_prompt(prompts, words):
    with pytest.raises(UserError) as error:
        table.read_columns(prompts)
    assert words in str(error.value)


def test_prompts_are_rendered_and_keep_the_number_of_their_row():
    found = table.encode_columns({"prompt": ["abcdef", CHAT, "ab"]}, tokenizer(), 5)
    assert found.extra["row"].tolist() == [2]  # the others are longer than 5 tokens
    found = table.encode_columns({"prompt": ["ab", CHAT]}, tokenizer(), 0)
    assert found.tokens.shape == (2, len("Be brief.|Hi>"))  # the length of the longest


def test_columns_that_only_a_reward_reads_are_part_of_the_data():
    """The tokens are the same for every answer, whatever its type."""
    answers = [[1, 2], [1, 3], ["1", "2"], [None, None], [np.int32(1), np.zeros(2)]]
    prompts = {"prompt": ["ab", "cd"]}
    found = [table.encode_columns({**prompts, "answer": x}, tokenizer(), 2) for x in answers]
    assert len({x.columns for x in found}) == len(answers)
    assert len({rows.identity(x) for x in found}) == len(answers)
    again = table.encode_columns({"answer": [1, 2], **prompts}, tokenizer(), 2)
    assert rows.identity(again) == rows.identity(found[0])
    unnamed = lambda: table.hash_columns({"x": [object()]})
    assert unnamed() == unnamed()  # not by its address


def test_texts_begin_with_the_start_token_and_chats_do_not():
    found = table.encode_columns({"prompt": ["ab"]}, tokenizer(), 0, start=9)
    assert found.tokens.tolist() == [[9, ord("a") % 50, ord("b") % 50]]
    found = table.encode_columns({"prompt": [CHAT]}, tokenizer(), 0, start=9)
    assert found.tokens[0, 0] == ord("B") % 50


@pytest.mark.parametrize("prompts", [["ab", CHAT], [CHAT, "ab"]])
def test_only_texts_get_the_start_token_where_chats_are_among_them(prompts):
    columns = {"prompt": prompts}
    found = table.encode_columns(columns, tokenizer(), 12, start=9, too_long="last")
    rows = {type(prompts[row]): n for n, row in enumerate(found.extra["row"])}
    ids = lambda kind: found.tokens[rows[kind]][found.mask[rows[kind]]].tolist()
    assert ids(str) == [9, ord("a") % 50, ord("b") % 50]
    assert ids(list) == [ord(c) % 50 for c in "Be brief.|Hi>"][-12:]  # nothing makes room for 9


def test_hints_stand_in_front_of_what_a_teacher_reads():
    """A prompt that is too long is left out with its hint. In a chat the hint goes before the
    question.
    """
    columns = {"prompt": ["cd", "abcdefghijklmnop", CHAT], "hint": ["ab", "no", "Oh: "]}
    few = table.encode_columns(columns, tokenizer(), 13, start=9)
    found = table.with_hints(few, columns, tokenizer(), start=9)
    rows = zip(found.extra["hint_tokens"], found.extra["hint_mask"], strict=True)
    ids = lambda text: [ord(c) % 50 for c in text]
    read = [tokens[mask].tolist() for tokens, mask in rows]
    assert read == [[9, *ids("abcd")], ids("Be brief.|Oh: Hi>")]
    assert found.extra["row"].tolist() == [0, 2] and found.tokens is few.tokens


def test_without_a_hint_the_teacher_reads_the_prompt():
    columns = {"prompt": ["cd", "abc"], "hint": [None, ""]}
    few = table.encode_columns(columns, tokenizer(), 0)
    extra = table.with_hints(few, columns, tokenizer()).extra
    np.testing.assert_array_equal(extra["hint_tokens"], few.tokens)
    np.testing.assert_array_equal(extra["hint_mask"], few.mask)
    with pytest.raises(UserError, match="the hint of prompt 1 is no text"):
        table.with_hints(few, {**columns, "hint": ["a", 3]}, tokenizer())


def test_values_that_are_not_json_are_part_of_the_data():
    ring = []
    ring.append(ring)
    found = {table.hash_columns({"prompt": ["a"], "x": [x]}) for x in ({(1, 2): 3}, ring, 5)}
    assert len(found) == 3


def test_a_data_set_of_the_package_datasets():
    """Its rows, a column, and one part of several; columns keep their types."""
    datasets = pytest.importorskip("datasets", reason="needs the extra `data`")
    chat = [{"role": "user", "content": "hi"}]
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]
    made = datasets.Dataset.from_list(rows)
    assert table.read_columns(made) == {"prompt": ["a", "b"], "answer": [1, 2]}
    assert table.read_columns(made["prompt"]) == {"prompt": ["a", "b"]}
    assert table.read_columns(made.to_iterable_dataset())["answer"] == [1, 2]
    chats = datasets.Dataset.from_list([{"prompt": chat}])
    assert table.read_columns(chats) == {"prompt": [chat]}
    parts = datasets.DatasetDict(train=made)
    assert table.read_columns(parts["train"])["answer"] == [1, 2]
    with pytest.raises(UserError, match=r"DatasetDict of train, not rows; .* data\['train'\]"):
        table.read_columns(parts)


def test_columns_of_numbers():
    """They go into `extra` with 32 bits, next to the row's number; the others say why not."""
    columns = {
        "prompt": ["abcdef", "ab", "a"],
        "integer": [1, np.int64(2), 3],
        "number": [1, 2.5, True],
        "flag": [True, False, True],
        "array": [[1, 2], [3, 4], np.array([5, 6], np.uint8)],
        "large": [1, 2**31, 3],
        "text": [1, "b", 2],
        "missing": [1, None, 2],
        "ragged": [[1], [1, 2], [1]],
        "nested": [[1, [2]], [1, [2]], [1, [2]]],
        "row": [7, 8, 9],
    }
    found, problems = table.read_numbers(columns)
    assert {name: (x.dtype, x.tolist()) for name, x in found.items()} == {
        "integer": (np.int32, [1, 2, 3]),
        "number": (np.float32, [1.0, 2.5, 1.0]),
        "flag": (np.bool_, [True, False, True]),
        "array": (np.int32, [[1, 2], [3, 4], [5, 6]]),
    }
    assert problems == {
        "prompt": "has a name with another meaning; rename it",
        "large": "has no number of 32 bits in row 1",
        "text": "has no number of 32 bits in row 1",
        "missing": "has no number of 32 bits in row 1",
        "ragged": "has arrays of different shapes, (1,) and (2,)",
        "nested": "has no number of 32 bits in row 0",
        "row": "has a name with another meaning; rename it",
    }
    few = table.encode_columns(columns, tokenizer(), 3, extra=found)  # the first is too long
    assert few.extra["row"].tolist() == [1, 2] and few.extra["integer"].tolist() == [2, 3]
