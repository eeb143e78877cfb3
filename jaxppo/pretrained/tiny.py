"""A small random model over bytes, for smoke tests and training from scratch."""

from typing import Any

import jax
import numpy as np
from tokenizers import models

from jaxppo.models import make
from jaxppo.models.shapes import ModelConfig, network
from jaxppo.pretrained.token_bytes import BYTE_OF
from jaxppo.pretrained.tokenizer import END, Tokenizer, byte_level

CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer(known: bytes = bytes(range(256))) -> Tokenizer:
    """Return a tokenizer with one id for each of these bytes, and the end of text."""
    letters = [letter for letter in sorted(BYTE_OF) if BYTE_OF[letter] in known]
    model = models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    backend = byte_level(model, special=[END], use_regex=False)
    end = backend.token_to_id(END)
    return Tokenizer(backend, eos_id=end, bos_id=end)


def tiny_model(
    seed: int, kind: str = "transformer"
) -> tuple[ModelConfig, dict[str, Any], Tokenizer]:
    """Return (config, random parameters without value head, tokenizer): two layers. The
    tokenizer has a plain chat template.
    """
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    config = network(kind, vocab_size=tokenizer.vocab_size)
    params = dict(make(config).init(jax.random.key(seed)))
    params.pop("value")
    return config, jax.tree.map(np.asarray, params), tokenizer
