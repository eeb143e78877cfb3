"""Transcripts as they are spoken, WAV files, and features by clip: scaled, joined, stacked."""

import io
import wave

import numpy as np
import pytest

from jaxppo.data.examples import Example, Examples
from jaxppo.data.fetch import FetchError
from jaxppo.errors import UserError
from jaxppo.tasks.datasets import speech

RATE = 8000


def wav(samples: np.ndarray, *, channels: int = 1, width: int = 2, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.asarray(samples, "<i2").tobytes())
    return buffer.getvalue()


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Press 5 to leave a message", "press five to leave a message"),
        ("Please enter...  (long)  the 7 key", "please enter the seven key"),
        ("press * to toggle, # to go on", "press star to toggle pound to go on"),
        ("party's voice-mail", "partys voice mail"),
        ("3D audio; H.323", "three d audio h 323"),
        ("[sound of monkeys screaming]", ""),
        ("caf\u00e9", "caf"),
    ],
)
def test_normalise_transcript(text, expected):
    assert speech.normalise_transcript(text) == expected


def test_parse():
    text = "; Core\n\nactivated: Activated.\r\ndigits/0: zero\nsilence/1: (1 second)\nx: y: z\n"
    assert speech.parse(text.encode()) == {
        "activated": "activated",
        "digits/0": "zero",
        "silence/1": "",
        "x": "y z",
    }
    for bad in ("a line", ": words"):
        with pytest.raises(FetchError, match="line 2 "):
            speech.parse(f"a: b\n{bad}\n".encode())


def test_read_wav():
    samples = speech.read_wav(wav(np.array([0, 16384, -32768])))
    assert samples.dtype == np.float32 and samples.tolist() == [0, 0.5, -1]
    with pytest.raises(FetchError, match="x has 2 channels of 16 bits"):
        speech.read_wav(wav(np.zeros(4), channels=2), "x")
    with pytest.raises(FetchError, match="x has 1 channels of 8 bits"):
        speech.read_wav(wav(np.zeros(4), width=1), "x")
    with pytest.raises(FetchError, match="16 bits at 16000 Hz"):
        speech.read_wav(wav(np.zeros(4), rate=16000), "x")
    for damaged in (
        b"",
        b"RIFF",
        b"not a sound at all, but long enough to be one",
        wav(np.zeros(4))[:20],
    ):
        with pytest.raises(FetchError, match="x is not a WAV file"):
            speech.read_wav(damaged, "x")


def test_make_examples():
    """beep has no words, and long is too long."""
    second = (noise(1) * 9000).astype(np.int16)
    sounds = {
        "b": wav(second),
        "a": wav(second[:400]),
        "beep": wav(second),
        "long": wav(np.tile(second, 2)),
    }
    encode = lambda clips, rate: [np.full((len(x), 2), rate) for x in clips]
    transcripts = {"a": "one", "b": "two", "beep": "", "long": "three", "other": "x"}
    found = speech.make_examples(sounds, transcripts, encode, seconds=1)
    assert [(row.prompt, row.reference, row.extra["name"]) for row in found] == [
        ("", "one", "a"),
        ("", "two", "b"),
    ]
    assert [row.extra["features"].shape for row in found] == [(400, 2), (RATE, 2)]
    assert found[0].extra["features"][0, 0] == RATE
    with pytest.raises(FetchError, match="the sound b has no transcript"):
        speech.make_examples(sounds, {"a": "one"}, encode)


def clip(words: str, *rows: list[float]) -> Example:
    return Example("", words, {"features": np.array(rows, np.float16), "name": words})


def test_standardise():
    """By the training part: means 3 and 5; deviations 2 and 0, which counts as .001."""
    parts = Examples([clip("a", [1, 5]), clip("b", [5, 5])], [clip("c", [7, 5])], [])
    found = speech.standardise(parts)
    assert [x.extra["features"].tolist() for x in found.train] == [[[-1, 0]], [[1, 0]]]
    (other,) = found.validation
    assert other.extra["features"].tolist() == [[2, 0]] and other.extra["name"] == "c"
    assert other.extra["features"].dtype == np.float32


def test_join_pairs():
    """Of clips of 1, 2 and 4 frames, that of 4 goes with nothing in 4 frames."""
    own = [clip("a", [1]), clip("b", [2], [3]), clip("c", *(4 * [[4]]))]
    found = speech.join_pairs(own, 40, frames=4)
    frames = {"a": [[1]], "b": [[2], [3]]}
    assert {x.reference for x in found} == {"a a", "a b", "b a", "b b"} and len(found) == 40
    for x in found:
        one, other = x.reference.split()
        assert x.extra["features"].tolist() == frames[one] + frames[other]
    again = speech.join_pairs(own, 40, frames=4)
    assert [x.reference for x in again] == [x.reference for x in found]
    with pytest.raises(UserError, match="no pair of clips fits in 1 frames"):
        speech.join_pairs(own, 40, frames=1)


def test_stack_features():
    rows = [
        Example("", "", {"features": np.arange(10, dtype=np.float32).reshape(5, 2)}),
        Example("", "", {"features": np.ones((2, 2))}),
    ]
    features, lengths = speech.stack_features(rows, 4, 2)
    assert lengths.tolist() == [3, 1] and features.dtype == np.float32
    # frames (0 1) (2 3) | (4 5) (6 7) | (8 9): means by column, and the last group has one frame
    assert features[0].tolist() == [[1, 2], [5, 6], [8, 9], [0, 0]]
    assert features[1].tolist() == [[1, 1], [0, 0], [0, 0], [0, 0]]
    features, lengths = speech.stack_features(rows, 5)
    assert lengths.tolist() == [5, 2]
    assert features[0].tolist() == rows[0].extra["features"].tolist()
    with pytest.raises(UserError, match="2 frames are not enough: the longest clip has 3"):
        speech.stack_features(rows, 2, 2)
    with pytest.raises(UserError, match="no clips"):
        speech.stack_features([], 2)


@pytest.fixture(scope="module")
def real():
    pytest.importorskip("ctranslate2", reason="features need the extra `speech`")
    try:
        return speech.load()
    except FetchError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_real_phrases(real):
    # 49 phrases are longer than 5 s, and 15 sounds have no words
    assert [len(part) for part in real] == [404, 50, 50]
    rows = [row for part in real for row in part]
    words = [{row.reference for row in part} for part in real]
    assert not words[0] & words[1] and not words[0] & words[2] and not words[1] & words[2]
    by_name = {row.extra["name"]: row.reference for row in rows}
    assert by_name["vm-next"] == "press six to play the next message"
    assert max(len(row.extra["features"]) for row in rows) <= 250
    assert {row.extra["features"].shape[1] for row in rows} == {512}
    assert all(np.isfinite(row.extra["features"]).all() for row in rows)
