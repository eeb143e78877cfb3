"""504 spoken phrases of at most 5 s with their words, by one speaker, from the
telephone exchange Asterisk (CC-BY-SA-3.0, 18 MB).

Debian's packages asterisk-core-sounds-en-wav and asterisk-core-sounds-en 1.6.1-1 hold
the voice prompts (8 kHz, 16 bits) and their transcripts. Debian's own client downloads
them: apt-get, on Debian 12. Features are the logarithms of mel filters: Davis &
Mermelstein 1980, Comparison of Parametric Representations for Monosyllabic Word
Recognition, https://doi.org/10.1109/TASSP.1980.1163420, on the mel scale of the HTK
book.
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
FLOOR = 1e-10  # of power: -100 dB of full scale


class Clips(NamedTuple):
    """What was said, and what was left out."""

    examples: list[Example]
    too_long: int
    wordless: int  # tones and silence


class Features(NamedTuple):
    """Features of one width."""

    features: Float32[np.ndarray, "N F M"]  # zeros behind a clip's end
    lengths: Int32[np.ndarray, "N"]  # frames of each clip


def load(*, seconds: float = 5.0, seed: int = 0) -> Examples:
    """References of words and empty prompts, `extra["features"]` Float32 [F M] at 100
    frames a second; split by the words.

    Args:
        seconds: longer clips are left out; `clips` tells how many.
        seed: of the split.

    Raises:
        FetchError: when a download fails or a file is not what it should be.
    """
    sounds = read_members(fetch("asterisk-sounds"), FOLDER + "*.wav")
    texts = gzip.decompress(read_member(fetch("asterisk-transcripts"), "*/core-sounds-en.txt.gz"))
    by_name = {
        name.removeprefix(FOLDER).removesuffix(".wav"): data for name, data in sounds.items()
    }
    found = make_examples(by_name, parse(texts), seconds=seconds).examples
    return split_examples(found, [example.reference for example in found], seed=seed)


def make_examples(
    sounds: Mapping[str, bytes], transcripts: Mapping[str, str], *, seconds: float = 5.0
) -> Clips:
    """The examples of WAV files and transcripts by name, in the order of names; a sound
    without a transcript is an error.
    """
    found: list[Example] = []
    too_long = wordless = 0
    for name in sorted(sounds):
        if name not in transcripts:
            raise FetchError(
                f"the sound {name} has no transcript; the two packages do not belong together"
            )
        samples, rate = read_wav(sounds[name], name)
        if not transcripts[name]:
            wordless += 1
        elif len(samples) > seconds * rate:
            too_long += 1
        else:
            found.append(
                Example("", transcripts[name], {"features": log_mel(samples, rate), "name": name})
            )
    return Clips(found, too_long, wordless)


def parse(data: bytes) -> dict[str, str]:
    """Read lines of `name: words` in UTF-8, with comments after a semicolon; the words
    are `normalised`.

    >>> parse(
    ...     b"; Sounds\\n\\nvm-next: Press 6, then #.\\nletters/at: at [@]\\nbeep: [a tone]\\n"
    ... )
    {'vm-next': 'press six then pound', 'letters/at': 'at', 'beep': ''}
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
    """Words in the letters a-z and digits, one space between; without notes in
    brackets, and single digits and keys as spoken.

    >>> normalised("Inter-Asterisk (IAX):  you're  3D at 600!")
    'inter asterisk youre three d at 600'
    """
    text = re.sub(r"\[[^\]]*\]|\([^)]*\)", " ", text).lower().replace("'", "")
    text = re.sub(r"(?<!\d)\d(?!\d)|[*#]", lambda key: f" {SPOKEN[key[0]]} ", text)
    return " ".join(re.sub(r"[^a-z0-9]", " ", text).split())


def read_wav(data: bytes, name: str = "the sound") -> tuple[Float32[np.ndarray, "S"], int]:
    """The samples, -1 to 1, and their rate in Hz, of a WAV file with one channel of 16
    bits.
    """
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
    """Logarithms of mel powers, less their mean over the clip and divided by their
    standard deviation, bin by bin.

    Args:
        samples: -1 to 1. rate: samples in a second, Hz. window, hop: of a frame,
        seconds; F = 1 + (S - window) // hop, and one frame of a clip that is shorter.
        bins: M.
    """
    logs = np.log(
        np.maximum(mel_power(samples, rate, window=window, hop=hop, bins=bins), FLOOR)
    ).astype(np.float64)
    # of silence, or of one frame, it is 0
    spread = np.maximum(logs.std(0, keepdims=True), 1e-3)
    return ((logs - logs.mean(0, keepdims=True)) / spread).astype(np.float32)


def mel_power(
    samples: Float[np.ndarray, "S"], rate: int, *, window: float, hop: float, bins: int
) -> Float32[np.ndarray, "F M"]:
    """The power |FFT(w x)|² of each frame under a Hann window w, in triangular
    filters.
    """
    width, step = round(window * rate), round(hop * rate)
    size = (
        1 << (2 * width - 1).bit_length()
    )  # at least twice the width: the lowest filters are narrow
    padded = np.pad(samples, (0, max(0, width - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, width)[::step]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width)
    power = np.abs(np.fft.rfft(frames * hann[None], size)) ** 2
    return (power @ mel_filters(rate, size, bins).T).astype(np.float32)


def mel_filters(rate: int, size: int, bins: int) -> Float32[np.ndarray, "M K"]:
    """Triangles of height 1 over the K = size / 2 + 1 frequencies, evenly spaced in mel
    = 2595 log10(1 + Hz / 700).
    """
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bins + 2) / 2595) - 1)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    hertz = np.arange(size // 2 + 1)[None] * rate / size
    return np.clip(
        np.minimum((hertz - low) / (centre - low), (high - hertz) / (high - centre)), 0, None
    ).astype(np.float32)


def stack_features(examples: Sequence[Example], frames: int, stride: int = 1) -> Features:
    """The features of all examples in one array: the means of `stride` frames each,
    padded to `frames` = F of these.

    Raises:
        UserError: for a clip that does not fit; nothing is cut off.
    """
    rows = [np.asarray(example.extra["features"]) for example in examples]
    lengths = np.asarray([-(-len(row) // stride) for row in rows], np.int32)
    if not rows or lengths.max() > frames:
        most = f"the longest clip has {lengths.max()}" if rows else "there are no clips"
        raise UserError(
            f"{frames} frames are not enough: {most}; raise the number or the stride, or leave long clips out"
        )
    features = np.zeros((len(rows), frames, rows[0].shape[1]), np.float32)
    for out, row, length in zip(features, rows, lengths, strict=True):
        starts = np.arange(length) * stride
        counts = np.minimum(stride, len(row) - starts).astype(np.float32)
        out[:length] = np.add.reduceat(row, starts, axis=0) / counts[:, None]
    return Features(features, lengths)
