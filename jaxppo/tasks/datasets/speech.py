"""504 phrases of at most 5 s by one speaker, from the telephone exchange Asterisk
(CC-BY-SA-3.0, 18 MB).

Debian's asterisk-core-sounds-en-wav and asterisk-core-sounds-en 1.6.1-1 hold the voice
prompts (8 kHz, 16 bits) and their transcripts; apt-get downloads them, on Debian 12.
Features are those of `jaxppo.data.whisper`.
"""

import gzip
import io
import re
import wave
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float32, Int32

from jaxppo.data import whisper
from jaxppo.data.archives import read_member, read_members
from jaxppo.data.examples import Example, Examples, split_examples
from jaxppo.data.fetch import FetchError, fetch
from jaxppo.errors import UserError

FOLDER = "./usr/share/asterisk/sounds/en_US_f_Allison/"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE = 8000  # samples a second
SPOKEN = {"*": "star", "#": "pound"} | {str(digit): word for digit, word in enumerate(DIGITS)}


def load() -> Examples:
    """Load empty prompts and references of words, split by the words. The features are
    `extra["features"]`, Float32 [F 512] at 50 frames per second.
    """
    sounds = read_members(fetch("asterisk-sounds"), FOLDER + "*.wav")
    texts = gzip.decompress(read_member(fetch("asterisk-transcripts"), "*/core-sounds-en.txt.gz"))
    name_of = lambda path: path.removeprefix(FOLDER).removesuffix(".wav")
    by_name = {name_of(path): data for path, data in sounds.items()}
    found = make_examples(by_name, parse(texts), whisper.features)
    keys = [example.reference for example in found]
    return standardise(split_examples(found, keys))


def make_examples(
    sounds: Mapping[str, bytes],
    transcripts: Mapping[str, str],
    encode: Callable[[list[np.ndarray], int], Sequence[np.ndarray]],
    *,
    seconds: float = 5.0,
) -> list[Example]:
    """Make examples of WAV files and transcripts, in the order of their names. Clips
    that are too long or have no words are left out. `encode(clips, rate)` makes their
    features. Raises FetchError for a sound without a transcript.
    """
    clips = {}
    for name in sorted(sounds):
        if name not in transcripts:
            raise FetchError(
                f"the sound {name} has no transcript; the two packages do not belong together"
            )
        samples = read_wav(sounds[name], name)
        if transcripts[name] and len(samples) <= seconds * RATE:
            clips[name] = samples
    found = zip(clips, encode(list(clips.values()), RATE), strict=True)
    return [Example("", transcripts[name], {"features": x, "name": name}) for name, x in found]


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


def read_wav(data: bytes, name: str = "the sound") -> Float32[np.ndarray, "S"]:
    """Return the samples, in -1 to 1, of a WAV file: 8 kHz, one channel of 16 bits."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            form = (file.getnchannels(), 8 * file.getsampwidth(), file.getframerate())
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise FetchError(f"{name} is not a WAV file ({error or 'it ends too early'})") from None
    if form != (1, 16, RATE) or len(raw) % 2:
        have = "{} channels of {} bits at {} Hz".format(*form)
        raise FetchError(f"{name} has {have}, expected 1 of 16 at {RATE}")
    return np.frombuffer(raw, "<i2").astype(np.float32) / 32768


def standardise(parts: Examples) -> Examples:
    """Give each feature mean 0 and deviation 1 over the training part."""
    frames = np.concatenate([x.extra["features"] for x in parts.train]).astype(np.float32)
    mean, spread = frames.mean(0), np.maximum(frames.std(0), 1e-3)
    scale = lambda x: ((x.astype(np.float32) - mean) / spread).astype(np.float32)
    change = lambda x: x._replace(extra={**x.extra, "features": scale(x.extra["features"])})
    return Examples(*([change(x) for x in part] for part in parts))


def join_pairs(examples: Sequence[Example], count: int, *, frames: int) -> list[Example]:
    """Join the features and the words of random pairs that have at most so many frames
    together: more orders of words than were recorded.
    """
    rng, found = np.random.default_rng(0), []
    lengths = [len(x.extra["features"]) for x in examples]
    if 2 * min(lengths) > frames:
        raise UserError(f"no pair of clips fits in {frames} frames; raise the number")
    while len(found) < count:
        one, other = rng.integers(len(examples), size=2)
        if lengths[one] + lengths[other] <= frames:
            pair = (examples[one], examples[other])
            joined = np.concatenate([x.extra["features"] for x in pair])
            words = " ".join(x.reference for x in pair)
            found.append(Example("", words, {"features": joined}))
    return found


def stack_features(
    examples: Sequence[Example], frames: int, stride: int = 1
) -> tuple[Float32[np.ndarray, "N F M"], Int32[np.ndarray, "N"]]:
    """(the features of examples, means of `stride` frames each, padded with 0 to F =
    `frames`; the number of frames of each). Raises UserError for a clip that does not
    fit.
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
    return features, lengths
