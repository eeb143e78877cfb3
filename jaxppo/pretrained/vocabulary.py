"""Train a tokenizer on texts, and read word vectors for it."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Float32
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxppo.errors import UserError
from jaxppo.pretrained.tokenizer import END, Tokenizer, byte_level, special_tokens

UNKNOWN = "<|unknown|>"
MAX_LINE = 2**16  # characters of a line of word vectors


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """Train byte-level byte-pair encoding (https://arxiv.org/abs/1508.07909)."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    if size < len(letters) + 1:
        raise UserError(
            f"a vocabulary of {size} has no room for the {len(letters)} bytes and the end of text"
        )
    backend = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=letters,
        special_tokens=special_tokens([END]),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    end = backend.token_to_id(END)
    return Tokenizer(backend, eos_id=end, bos_id=end)


def train_words(texts: Iterable[str], max_vocab: int = 25000) -> Tokenizer:
    """Train a tokenizer of the most frequent words and signs, in lower case."""
    if max_vocab < 3:
        raise UserError(
            f"a vocabulary of {max_vocab} has no room for a word beside the end of text "
            "and the unknown word"
        )
    backend = tokenizers.Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    # words with spaces between, none before a full stop
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    trainer = trainers.WordLevelTrainer(
        vocab_size=max_vocab, special_tokens=special_tokens([END, UNKNOWN]), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    end = backend.token_to_id(END)
    return Tokenizer(backend, eos_id=end, bos_id=end)


def load_word_vectors(
    path: str | Path, tokenizer: Tokenizer, width: int, *, seed: int = 0
) -> tuple[Float32[np.ndarray, "V D"], int]:
    """Read GloVe's text format (https://nlp.stanford.edu/projects/glove/). Returns (an
    embedding, the number of tokens found). A token has the vector of its word, with or
    without a space before it, or else noise of the same size. Raises UserError with the
    line's number for a bad line, and when no word was found.
    """
    known: dict[str, list[int]] = {}
    for i in range(tokenizer.vocab_size):
        known.setdefault(tokenizer.token(i).strip("Ġ "), []).append(i)
    found = np.full((tokenizer.vocab_size, width), np.nan, np.float32)
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), ""), 1):
                try:
                    word, vector = _parse_vector(line, width)
                    if word in known:
                        found[known[word]] = np.asarray([float(x) for x in vector], np.float32)
                        if not np.isfinite(found[known[word]]).all():
                            raise ValueError("a number that is not finite")
                except ValueError as error:
                    raise UserError(f"{path}:{number}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as word vectors ({error})") from None
    there = ~np.isnan(found[:, 0])
    if not there.any():
        raise UserError(f"{path} has none of the vocabulary's {tokenizer.vocab_size} words")
    noise = np.random.default_rng(seed).standard_normal(found.shape).astype(np.float32)
    noise *= found[there].std()
    return np.where(there[:, None], found, noise), int(there.sum())


def _parse_vector(line: str, width: int) -> tuple[str, list[str]]:
    """Return (word, numbers) of a line. Raises ValueError for another width."""
    if len(line) > MAX_LINE:
        raise ValueError(f"a line of more than {MAX_LINE} characters")
    # Some words have blanks in them, but do not end with a number.
    word, *numbers = line.rstrip().rsplit(" ", width)
    if len(numbers) != width or (" " in word and _is_number(word.rpartition(" ")[2])):
        many = len(line.split()) - 1
        raise ValueError(f"{many} numbers, but the embedding has {width}")
    return word, numbers


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
