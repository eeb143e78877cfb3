"""Tokenizers made from the texts themselves, and word vectors for them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from jaxppo.errors import UserError
from jaxppo.pretrained.tokenizer import Tokenizer

END, UNKNOWN = "<|endoftext|>", "<|unknown|>"
MAX_LINE = 2**16  # characters of a line of word vectors


def bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """Byte-level byte-pair encoding of at most `size` tokens (Sennrich et al. 2016,
    https://arxiv.org/abs/1508.07909; bytes as GPT-2 has them): every text can be
    written, none is unknown.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    letters = pre_tokenizers.ByteLevel.alphabet()
    if size < len(letters) + 1:
        raise UserError(
            f"a vocabulary of {size} has no room for the {len(letters)} bytes and the end of text"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=letters,
        special_tokens=[AddedToken(END, special=True, normalized=False)],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    end = backend.token_to_id(END)
    return Tokenizer(backend, eos_id=end, bos_id=end)


def words(texts: Iterable[str], max_vocab: int = 25000) -> Tokenizer:
    """Words and signs in lower case, the most frequent of them; all others are one
    unknown word, and cannot be written back.
    """
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    if max_vocab < 3:
        raise UserError(
            f"a vocabulary of {max_vocab} has no room for a word beside the end of text and the unknown word"
        )
    backend = Backend(models.WordLevel(unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [AddedToken(name, special=True, normalized=False) for name in (END, UNKNOWN)]
    trainer = trainers.WordLevelTrainer(
        vocab_size=max_vocab, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.decoder = decoders.WordPiece(
        prefix="##", cleanup=True
    )  # words with spaces between, none before a full stop
    end = backend.token_to_id(END)
    return Tokenizer(backend, eos_id=end, bos_id=end)


def vectors(
    path: str | Path, tokenizer: Tokenizer, width: int, *, seed: int = 0
) -> tuple[Float32[np.ndarray, "V D"], int]:
    """(an embedding, how many tokens were found) from a file in GloVe's text format: a
    word and `width` numbers a line (Pennington et al. 2014,
    https://nlp.stanford.edu/projects/glove/). A token has the vector of its word with a
    space before it or without. Tokens that are not in the file get noise of the same
    size.

    Raises UserError with the line's number: another width, a number that is none or not
    finite, a line over 65536 characters; and when not one word was found.
    """
    known: dict[str, list[int]] = {}
    for i in range(tokenizer.vocab_size):
        known.setdefault(tokenizer.token(i).strip("Ġ "), []).append(i)
    found = np.full((tokenizer.vocab_size, width), np.nan, np.float32)
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), ""), 1):
                if len(line) > MAX_LINE:
                    raise UserError(f"{path}:{number}: a line of more than {MAX_LINE} characters")
                # some words have blanks in them
                word, *numbers = line.rstrip().rsplit(" ", width)
                if len(numbers) != width or (_is_number(word.rpartition(" ")[2]) and " " in word):
                    many = len(line.split()) - 1
                    raise UserError(
                        f"{path}:{number}: {many} numbers, but the embedding has {width}"
                    )
                if word in known:
                    found[known[word]] = _numbers(path, number, numbers)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as word vectors ({error})") from None
    there = ~np.isnan(found[:, 0])
    if not there.any():
        raise UserError(f"{path} has none of the vocabulary's {tokenizer.vocab_size} words")
    noise = (
        np.random.default_rng(seed).standard_normal(found.shape).astype(np.float32)
        * found[there].std()
    )
    return np.where(there[:, None], found, noise), int(there.sum())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers(path, line: int, numbers: list[str]) -> np.ndarray:
    try:
        out = np.asarray([float(x) for x in numbers], np.float32)
    except ValueError as error:
        raise UserError(f"{path}:{line}: {error}") from None
    if not np.isfinite(out).all():
        raise UserError(f"{path}:{line}: a number that is not finite")
    return out
