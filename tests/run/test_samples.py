import numpy as np

from jaxppo.run import files
from jaxppo.run.samples import SampleLog


def batch():
    return {
        "tokens": np.array([[0, 1, 2, 3], [4, 5, 6, 0]]),  # prompts of 2 tokens, responses of 2
        "attend": np.array([[0, 1, 1, 1], [1, 1, 1, 0]], bool),
        "mask": np.array([[1, 1], [1, 0]], np.float32),
        "scores": np.array([[1, 2], [3, 4]], np.float32),
        "reward": np.array([1.5, 3.5], np.float32),
    }


def decode(rows):
    return [" ".join(map(str, row)) for row in rows]


def test_the_first_and_every_tenth_step_are_written_without_padding(tmp_path):
    log = SampleLog(tmp_path, decode, ["right", "short"], first_step=0)
    for step in range(1, 12):
        log.write(step, batch())
    rows = files.read_jsonl(tmp_path / "samples.jsonl")
    assert [row["step"] for row in rows] == [1, 1, 10, 10]
    assert rows[0] == {
        "step": 1,
        "prompt": "1",
        "response": "2 3",
        "reward": 1.5,
        "right": 1.0,
        "short": 2.0,
    }
    assert rows[3]["prompt"] == "4 5" and rows[3]["response"] == "6"


def test_a_resumed_run_drops_the_steps_that_run_again(tmp_path):
    log = SampleLog(tmp_path, decode, [], first_step=0)
    for step in (1, 10, 20):
        log.write(step, batch())
    SampleLog(tmp_path, decode, [], first_step=15)
    rows = files.read_jsonl(tmp_path / "samples.jsonl")
    assert [row["step"] for row in rows] == [1, 1, 10, 10]
