"""A byte-level tokenizer of a few hundred tokens, and small checkpoint folders."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEXT = ["the movie was good and the film was not bad", "hello world 123", "naïve café – über"]


@pytest.fixture(scope="session")
def backend() -> Tokenizer:
    """A backend of 256 bytes, some merges, and <|endoftext|> as the last id."""
    from tokenizers import AddedToken, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return tokenizer
