"""Features of recordings: which frames are kept, and the cache. The encoder here is a small
fake; the real one runs where its package is.
"""

import importlib

import numpy as np
import pytest

from jaxppo.data import whisper
from jaxppo.errors import UserError

RATE = 8000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPPO_CACHE", str(tmp_path))
    return tmp_path


def tones(*seconds: float) -> list[np.ndarray]:
    """A tone of 440 Hz, of each of these lengths."""
    return [np.sin(880 * np.pi * np.arange(round(x * RATE)) / RATE) for x in seconds]


def pairs_of_frames(inputs: np.ndarray) -> np.ndarray:
    """[80 T] -> [T / 2, 80], as Whisper halves the frames."""
    assert inputs.shape[0] == 80
    return inputs.T.reshape(-1, 2, 80).mean(1)


def test_only_the_frames_of_a_clip_are_kept():
    """50 frames a second; the sound is loud to its end, though silence is behind it."""
    one, other = whisper.encode(tones(1.0, 0.3), RATE, pairs_of_frames)
    assert one.shape == (50, 80) and other.shape == (15, 80) and one.dtype == np.float16
    peak = one.max(1)
    assert peak[:49].min() > 0.9 * peak.max()
    # the resampled tone of 440 Hz is in one of the lowest of 80 bins up to 8 kHz
    assert set(one[5:45].argmax(1)) <= set(range(9, 13))


def test_the_input_is_as_long_as_the_longest_clip_and_some_silence():
    lengths = []
    encoder = lambda x: lengths.append(x.shape[1]) or pairs_of_frames(x)
    whisper.encode(tones(1.2, 0.5), RATE, encoder)
    assert lengths == [300, 300]  # 3 s of 10 ms
    with pytest.raises(UserError, match="31 s is too long"):
        whisper.encode([np.zeros(31 * RATE)], RATE, encoder)


def test_features_are_computed_once(cache):
    """The second call reads them; other clips, or another rate, have their own."""
    made = []
    load = lambda: made.append(1) or pairs_of_frames
    one = whisper.features(tones(1.0, 0.3), RATE, load=load)
    same = whisper.features(tones(1.0, 0.3), RATE, load=load)
    assert len(made) == 1 and [len(x) for x in same] == [50, 15]
    for x, y in zip(one, same, strict=True):
        np.testing.assert_array_equal(x, y)
    whisper.features(tones(0.3, 1.0), RATE, load=load)
    whisper.features(tones(1.0, 0.3), 2 * RATE, load=load)
    assert len(made) == 3
    assert [path.suffix for path in cache.iterdir()] == 3 * [".npz"]  # nothing temporary


def test_without_the_package(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r'pip install -e "\.\[speech\]"'):
        whisper.load_encoder()
