import numpy as np

from jaxppo.run import files
from jaxppo.run.samples import SampleLog


def batch():
    """Prompts of two tokens, responses of two, two scores; -1 is padding."""
    return np.array([[-1, 1, 2, 3, 1, 2], [4, 5, 6, -1, 3, 4]], np.float32)


def decode(rows):
    return [" ".join(map(str, row)) for row in rows]


SIZES = {
    "show_prompts": decode,
    "prompt_length": 2,
    "length": 4,
    "weights": (("right", 1.0), ("short", 0.25)),
}


def test_the_first_and_every_tenth_step_are_written_without_padding(tmp_path):
    log = SampleLog(tmp_path, decode, **SIZES, first_step=0)
    for step in range(1, 12):
        log.write(step, batch())
    rows = files.read_jsonl(tmp_path / "samples.jsonl")
    assert [row["step"] for row in rows] == [1, 1, 10, 10]
    assert rows[0] == {
        "step": 1,
        "prompt": "1",
        "response": " 2 3",
        "reward": 1.5,  # 1 + .25 x 2
        "right": 1.0,
        "short": 2.0,
    }
    assert rows[3]["prompt"] == "4 5" and rows[3]["response"] == " 6"


def test_a_resumed_run_drops_the_steps_that_run_again(tmp_path):
    log = SampleLog(tmp_path, decode, **SIZES, first_step=0)
    for step in (1, 10, 20):
        log.write(step, batch())
    SampleLog(tmp_path, decode, **SIZES, first_step=15)
    rows = files.read_jsonl(tmp_path / "samples.jsonl")
    assert [row["step"] for row in rows] == [1, 1, 10, 10]


def test_prompts_are_shown_in_their_own_way(tmp_path):
    """The format of a chat has tokens that no response has."""
    show = lambda rows: [f"<{text}>" for text in decode(rows)]
    SampleLog(tmp_path, decode, **{**SIZES, "show_prompts": show}, first_step=0).write(1, batch())
    rows = files.read_jsonl(tmp_path / "samples.jsonl")
    assert [(row["prompt"], row["response"]) for row in rows] == [("<1>", " 2 3"), ("<4 5>", " 6")]


def test_answers_are_marked(tmp_path):
    """Tokens 3 and 1, answered by 7 and 0 (as -9 and -2), then 5."""
    rows = np.array([[-1, 2, 3, 1, -9, -2, 5, -1, 1.0], [1, 2, 3, -1, -1, -1, -1, -1, 0.0]])
    sizes = SIZES | {"length": 8, "weights": ()}
    SampleLog(tmp_path, decode, **sizes, first_step=0).write(1, rows.astype(np.float32))
    found = files.read_jsonl(tmp_path / "samples.jsonl")
    assert [row["response"] for row in found] == ["3 1⟦7 0⟧5", "3"]
