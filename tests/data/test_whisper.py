"""Features of recordings: which frames are kept, and the cache. The encoder here is a small
fake; the real one runs where its package is.
"""

import importlib

import numpy as np
import pytest

from jaxppo.data import whisper
from jaxppo.data.whisper import Whisper
from jaxppo.errors import UserError

RATE = 8000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPPO_CACHE", str(tmp_path))
    return tmp_path


def tones(*seconds: float) -> list[np.ndarray]:
    """A tone of 440 Hz, of each of these lengths."""
    return [np.sin(880 * np.pi * np.arange(round(x * RATE)) / RATE) for x in seconds]


def encode(inputs: np.ndarray) -> np.ndarray:
    """[80 T] -> [T / 2, 80], as Whisper halves the frames."""
    assert inputs.shape[0] == 80
    return inputs.T.reshape(-1, 2, 80).mean(1)


FAKE = Whisper(encode, lambda features, words: range(0, 10 * len(words), 10))
TEXTS = ["one", "two words"]


def test_only_the_frames_of_a_clip_are_kept():
    """50 frames a second; the sound is loud to its end, though silence is behind it."""
    one, other = whisper.run(FAKE, tones(1.0, 0.3), TEXTS, RATE)
    assert one.features.shape == (50, 80) and other.features.shape == (15, 80)
    assert one.features.dtype == np.float16
    assert one.starts.tolist() == [0] and other.starts.tolist() == [0, 10]
    peak = one.features.max(1)
    assert peak[:49].min() > 0.9 * peak.max()
    # the resampled tone of 440 Hz is in one of the lowest of 80 bins up to 8 kHz
    assert set(one.features[5:45].argmax(1)) <= set(range(9, 13))


def test_the_input_is_as_long_as_the_longest_clip_and_some_silence():
    lengths = []
    model = FAKE._replace(encode=lambda x: lengths.append(x.shape[1]) or encode(x))
    whisper.run(model, tones(1.2, 0.5), TEXTS, RATE)
    assert lengths == [300, 300]  # 3 s of 10 ms
    with pytest.raises(UserError, match="31 s is too long"):
        whisper.run(model, [np.zeros(31 * RATE)], ["one"], RATE)


def test_features_are_computed_once(cache):
    """The second call reads them; other clips, texts or rates have their own."""
    made = []
    load = lambda: made.append(1) or FAKE
    one = whisper.listen(tones(1.0, 0.3), TEXTS, RATE, load=load)
    same = whisper.listen(tones(1.0, 0.3), TEXTS, RATE, load=load)
    assert len(made) == 1 and [len(x.features) for x in same] == [50, 15]
    assert [x.starts.tolist() for x in same] == [[0], [0, 10]]
    for x, y in zip(one, same, strict=True):
        np.testing.assert_array_equal(x.features, y.features)
    whisper.listen(tones(0.3, 1.0), TEXTS, RATE, load=load)
    whisper.listen(tones(1.0, 0.3), TEXTS[::-1], RATE, load=load)
    whisper.listen(tones(1.0, 0.3), TEXTS, 2 * RATE, load=load)
    assert len(made) == 4
    assert [path.suffix for path in cache.iterdir()] == 4 * [".npz"]  # nothing temporary


def test_without_the_package(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r'pip install -e "\.\[speech\]"'):
        whisper.load_model()
