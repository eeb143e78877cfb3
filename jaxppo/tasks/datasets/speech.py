"""504 phrases of at most 5 s by one speaker, from the telephone exchange Asterisk
(CC-BY-SA-3.0, 18 MB).

Debian's asterisk-core-sounds-en-wav and asterisk-core-sounds-en 1.6.1-1 hold the voice
prompts (8 kHz, 16 bits) and their transcripts; apt-get downloads them, on Debian 12.
Features are log-mel powers (Davis & Mermelstein 1980,
https://doi.org/10.1109/TASSP.1980.1163420) on the mel scale of the HTK book.
"""

import gzip
import io
import re
import wave
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int32

from jaxppo.data.archives import read_member, read_members
from jaxppo.data.examples import Example, Examples, split_examples
from jaxppo.data.fetch import FetchError, fetch
from jaxppo.errors import UserError

FOLDER = "./usr/share/asterisk/sounds/en_US_f_Allison/"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPOKEN = {"*": "star", "#": "pound"} | {str(digit): word for digit, word in enumerate(DIGITS)}
FLOOR = 1e-10  # of powers: -100 dB of full scale


class Features(NamedTuple):
    """Features of several clips, padded to one length."""

    features: Float32[np.ndarray, "N F M"]  # 0 after a clip's end
    lengths: Int32[np.ndarray, "N"]  # frames of each clip


def load(*, seconds: float = 5.0, seed: int = 0) -> Examples:
    """Load empty prompts and references of words, split by the words. The features are
    `extra["features"]`, Float32 [F M] at 100 frames per second.

    Args:
        seconds: longer clips are left out.
        seed: of the split.
    """
    sounds = read_members(fetch("asterisk-sounds"), FOLDER + "*.wav")
    texts = gzip.decompress(read_member(fetch("asterisk-transcripts"), "*/core-sounds-en.txt.gz"))
    name_of = lambda path: path.removeprefix(FOLDER).removesuffix(".wav")
    by_name = {name_of(path): data for path, data in sounds.items()}
    found = make_examples(by_name, parse(texts), seconds=seconds)
    return split_examples(found, [example.reference for example in found], seed=seed)


def make_examples(
    sounds: Mapping[str, bytes], transcripts: Mapping[str, str], *, seconds: float = 5.0
) -> list[Example]:
    """Make examples of WAV files and transcripts, in the order of their names. Clips
    that are too long or have no words are left out. Raises FetchError for a sound
    without a transcript.
    """
    found = []
    for name in sorted(sounds):
        if name not in transcripts:
            raise FetchError(
                f"the sound {name} has no transcript; the two packages do not belong together"
            )
        samples, rate = read_wav(sounds[name], name)
        if transcripts[name] and len(samples) <= seconds * rate:
            extra = {"features": log_mel(samples, rate), "name": name}
            found.append(Example("", transcripts[name], extra))
    return found


def parse(data: bytes) -> dict[str, str]:
    """Read UTF-8 lines of `name: words`, with comments after a semicolon, and normalise
    the words.

    >>> parse(b"; Sounds\\n\\nvm-next: Press 6 #.\\nat: at [@]\\nbeep: [a tone]\\n")
    {'vm-next': 'press six pound', 'at': 'at', 'beep': ''}
    """
    found: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8-sig", errors="replace").splitlines(), 1):
        name, colon, text = line.partition(":")
        if not line.strip() or line.startswith(";"):
            continue
        if not colon or not name.strip():
            raise FetchError(f"line {number} of the transcripts is not 'name: words'")
        found[name.strip()] = normalise_transcript(text)
    return found


def normalise_transcript(text: str) -> str:
    """Keep words of a-z and digits with single spaces: no notes in brackets, single
    digits and keys as spoken.

    >>> normalise_transcript("Inter-Asterisk (IAX):  you're  3D at 600!")
    'inter asterisk youre three d at 600'
    """
    text = re.sub(r"\[[^\]]*\]|\([^)]*\)", " ", text).lower().replace("'", "")
    text = re.sub(r"(?<!\d)\d(?!\d)|[*#]", lambda key: f" {SPOKEN[key[0]]} ", text)
    return " ".join(re.sub(r"[^a-z0-9]", " ", text).split())


def read_wav(data: bytes, name: str = "the sound") -> tuple[Float32[np.ndarray, "S"], int]:
    """Return (samples in -1 to 1, rate in Hz) of a WAV file with one 16-bit channel."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            form = (file.getnchannels(), file.getsampwidth())
            rate, raw = file.getframerate(), file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise FetchError(f"{name} is not a WAV file ({error or 'it ends too early'})") from None
    if form != (1, 2) or len(raw) % 2:
        raise FetchError(f"{name} has {form[0]} channels of {8 * form[1]} bits, expected 1 of 16")
    return np.frombuffer(raw, "<i2").astype(np.float32) / 32768, rate


def log_mel(
    samples: Float[np.ndarray, "S"],
    rate: int,
    *,
    window: float = 0.025,
    hop: float = 0.010,
    bins: int = 40,
) -> Float32[np.ndarray, "F M"]:
    """Return log mel powers, with mean 0 and deviation 1 over the clip in each bin.

    Args:
        samples: -1 to 1.
        rate: samples per second.
        window, hop: of frames, in seconds; F = 1 + (S - window) // hop, at least 1.
        bins: M.
    """
    power = mel_power(samples, rate, window=window, hop=hop, bins=bins)
    logs = np.log(np.maximum(power, FLOOR)).astype(np.float64)
    spread = np.maximum(logs.std(0, keepdims=True), 1e-3)  # 0 for silence or one frame
    return ((logs - logs.mean(0, keepdims=True)) / spread).astype(np.float32)


def mel_power(
    samples: Float[np.ndarray, "S"], rate: int, *, window: float, hop: float, bins: int
) -> Float32[np.ndarray, "F M"]:
    """Return |FFT(w x)|² of each frame under a Hann window w, in triangular filters."""
    width, step = round(window * rate), round(hop * rate)
    # at least twice the width: the lowest filters are narrow
    size = 1 << (2 * width - 1).bit_length()
    padded = np.pad(samples, (0, max(0, width - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, width)[::step]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width)
    power = np.abs(np.fft.rfft(frames * hann[None], size)) ** 2
    return (power @ mel_filters(rate, size, bins).T).astype(np.float32)


def mel_filters(rate: int, size: int, bins: int) -> Float32[np.ndarray, "M K"]:
    """Return triangles of height 1 over K = size / 2 + 1 frequencies, evenly spaced in
    mel = 2595 log10(1 + Hz / 700).
    """
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bins + 2) / 2595) - 1)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    hertz = np.arange(size // 2 + 1)[None] * rate / size
    rising, falling = (hertz - low) / (centre - low), (high - hertz) / (high - centre)
    return np.clip(np.minimum(rising, falling), 0, None).astype(np.float32)


def stack_features(examples: Sequence[Example], frames: int, stride: int = 1) -> Features:
    """Stack the features of examples: means of `stride` frames each, padded to F =
    `frames`. Raises UserError for a clip that does not fit.
    """
    rows = [np.asarray(example.extra["features"]) for example in examples]
    lengths = np.asarray([-(-len(row) // stride) for row in rows], np.int32)
    if not rows or lengths.max() > frames:
        longest = f"the longest clip has {lengths.max()}" if rows else "there are no clips"
        raise UserError(
            f"{frames} frames are not enough: {longest}; raise the number or the stride, or leave"
            " long clips out"
        )
    features = np.zeros((len(rows), frames, rows[0].shape[1]), np.float32)
    for out, row, length in zip(features, rows, lengths, strict=True):
        starts = np.arange(length) * stride
        counts = np.minimum(stride, len(row) - starts).astype(np.float32)
        out[:length] = np.add.reduceat(row, starts, axis=0) / counts[:, None]
    return Features(features, lengths)
