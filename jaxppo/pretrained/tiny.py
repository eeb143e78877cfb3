"""A small random model over bytes: for smoke tests, and for training from nothing."""

import jax
import numpy as np

from jaxppo.models import make
from jaxppo.models.shapes import network
from jaxppo.pretrained.tokenizer import Tokenizer

END = "<|endoftext|>"


def byte_tokenizer() -> Tokenizer:
    """One id for each byte (256) and the end of text.

    >>> byte_tokenizer().decode(byte_tokenizer().encode("Hi 5€"))
    'Hi 5€'
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return Tokenizer(backend, eos_id=backend.token_to_id(END), bos_id=backend.token_to_id(END))


def tiny(seed: int, kind: str = "transformer"):
    """(config, parameters without value head, tokenizer) of two layers with random
    weights: a Llama, or another kind of net.
    """
    tokenizer = byte_tokenizer()
    config = network(kind, vocab_size=tokenizer.vocab_size)
    params = dict(make(config).init(jax.random.key(seed)))
    params.pop("value")
    return config, jax.tree.map(np.asarray, params), tokenizer
