"""Transcripts as they are spoken, WAV files, and the features against another implementation."""

import io
import wave

import numpy as np
import pytest
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from jaxppo.data.examples import Example
from jaxppo.data.fetch import FetchError
from jaxppo.errors import UserError
from jaxppo.tasks.datasets import speech

RATE = 8000


def wav(samples: np.ndarray, *, channels: int = 1, width: int = 2) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(RATE)
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
    samples, rate = speech.read_wav(wav(np.array([0, 16384, -32768])))
    assert rate == RATE and samples.dtype == np.float32 and samples.tolist() == [0, 0.5, -1]
    with pytest.raises(FetchError, match="x has 2 channels of 16 bits"):
        speech.read_wav(wav(np.zeros(4), channels=2), "x")
    with pytest.raises(FetchError, match="x has 1 channels of 8 bits"):
        speech.read_wav(wav(np.zeros(4), width=1), "x")
    for damaged in (
        b"",
        b"RIFF",
        b"not a sound at all, but long enough to be one",
        wav(np.zeros(4))[:20],
    ):
        with pytest.raises(FetchError, match="x is not a WAV file"):
            speech.read_wav(damaged, "x")


def test_filters_are_those_of_transformers():
    theirs = mel_filter_bank(
        257,
        40,
        min_frequency=0,
        max_frequency=RATE / 2,
        sampling_rate=RATE,
        norm=None,
        mel_scale="htk",
    )
    np.testing.assert_allclose(speech.mel_filters(RATE, 512, 40), theirs.T, atol=1e-5)
    assert (
        speech.mel_filters(RATE, 512, 40).max(1) > 0.3
    ).all()  # no filter falls between two frequencies


def test_powers_are_those_of_transformers():
    samples = noise(0.3)
    theirs = spectrogram(
        samples,
        window_function(200, "hann", periodic=True),
        200,
        80,
        fft_length=512,
        power=2.0,
        center=False,
        mel_filters=speech.mel_filters(RATE, 512, 40).T,
        mel_floor=0.0,
    )
    ours = speech.mel_power(samples, RATE, window=0.025, hop=0.010, bins=40)
    assert ours.shape == (28, 40)  # 1 + (2400 - 200) // 80
    np.testing.assert_allclose(ours, theirs.T, rtol=1e-4, atol=1e-6)


def test_a_tone_is_in_its_bin():
    # 1000 Hz is 2595 log10(1 + 1000/700) = 1000 mel; the top, 4000 Hz, is 2146 mel, and 41 steps to
    # there are 52.3 each: 1000 / 52.3 = 19.1, so the peak is in filter 19, number 18 from 0
    tone = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE).astype(np.float32)
    power = speech.mel_power(tone, RATE, window=0.025, hop=0.010, bins=40)
    assert set(power.argmax(1)) == {18}


def test_log_mel_is_normalised():
    features = speech.log_mel(noise(1) * np.linspace(0, 1, RATE, dtype=np.float32), RATE)
    assert features.shape == (98, 40) and features.dtype == np.float32  # 1 + (8000 - 200) // 80
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(features.std(0), 1, atol=1e-3)
    assert features[:10].mean() < -1 < 0.5 < features[-10:].mean()  # it gets louder
    np.testing.assert_allclose(
        speech.log_mel(np.zeros(RATE, np.float32), RATE), np.zeros((98, 40)), atol=1e-6
    )  # silence
    assert speech.log_mel(noise(0.01), RATE).shape == (1, 40)
    assert speech.log_mel(noise(0.025), RATE, hop=0.02, bins=8).shape == (1, 8)
    # the loudness of a recording does not matter
    np.testing.assert_allclose(
        speech.log_mel(noise(1), RATE), speech.log_mel(noise(1) / 8, RATE), atol=2e-3
    )


def test_make_examples():
    """beep has no words, and long is too long."""
    second = (noise(1) * 9000).astype(np.int16)
    sounds = {
        "b": wav(second),
        "a": wav(second[:400]),
        "beep": wav(second),
        "long": wav(np.tile(second, 2)),
    }
    found = speech.make_examples(
        sounds, {"a": "one", "b": "two", "beep": "", "long": "three", "other": "x"}, seconds=1
    )
    assert [(row.prompt, row.reference, row.extra["name"]) for row in found] == [
        ("", "one", "a"),
        ("", "two", "b"),
    ]
    assert [row.extra["features"].shape for row in found] == [(3, 40), (98, 40)]
    with pytest.raises(FetchError, match="the sound b has no transcript"):
        speech.make_examples(sounds, {"a": "one"})


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
    whole = speech.stack_features(rows, 5)
    assert (
        whole.lengths.tolist() == [5, 2]
        and whole.features[0].tolist() == rows[0].extra["features"].tolist()
    )
    with pytest.raises(UserError, match="2 frames are not enough: the longest clip has 3"):
        speech.stack_features(rows, 2, 2)
    with pytest.raises(UserError, match="no clips"):
        speech.stack_features([], 2)


@pytest.fixture(scope="module")
def real():
    try:
        return speech.load()
    except FetchError as error:
        pytest.skip(str(error))


@pytest.mark.ci
def test_real_phrases(real):
    assert [len(part) for part in real] == [
        404,
        50,
        50,
    ]  # 49 phrases are longer than 5 s, and 15 sounds have no words
    rows = [row for part in real for row in part]
    words = [{row.reference for row in part} for part in real]
    assert not words[0] & words[1] and not words[0] & words[2] and not words[1] & words[2]
    assert {row.extra["name"]: row.reference for row in rows}[
        "vm-next"
    ] == "press six to play the next message"
    assert max(len(row.extra["features"]) for row in rows) <= 498  # 1 + (40000 - 200) // 80
    assert all(np.isfinite(row.extra["features"]).all() for row in rows)
