import dataclasses
import json

import jax
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from jaxppo import models, pretrained
from jaxppo.commands.export import folder
from jaxppo.errors import PretrainedError
from jaxppo.models import shapes
from jaxppo.pretrained import settings, tokenizer
from jaxppo.pretrained.tiny import byte_tokenizer

LLAMA = shapes.llama(
    vocab_size=257, width=16, num_layers=2, num_heads=4, num_kv_heads=2, max_length=64
)


def test_the_tokenizer_adds_no_start_token(tmp_path):
    """As those of Llama do by their post-processor, which our own `encode` leaves out."""
    own = byte_tokenizer()
    adding = Backend.from_str(own._backend.to_str())
    adding.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", own.eos_id)]
    )
    assert adding.encode("Hi").ids[0] == own.eos_id
    folder.write_tokenizer(tmp_path, LLAMA, tokenizer.Tokenizer(adding, eos_id=own.eos_id))
    assert Backend.from_file(str(tmp_path / "tokenizer.json")).encode("Hi").ids == own.encode("Hi")


def test_what_began_prompts_in_training_begins_texts(tmp_path):
    """Where the tokenizer itself does it; what it puts behind a text is left out."""
    own = byte_tokenizer()
    adding = Backend.from_str(own._backend.to_str())
    adding.add_special_tokens(["<s>", "</s>"])
    adding.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 257), ("</s>", 258)]
    )
    found = tokenizer.Tokenizer(adding, eos_id=258)
    folder.write_tokenizer(tmp_path, LLAMA, found, start=(257,))
    written = Backend.from_file(str(tmp_path / "tokenizer.json"))
    assert written.encode("Hi").ids == [257, *own.encode("Hi")]
    for start in ((), (256,)):
        folder.write_tokenizer(tmp_path, LLAMA, found, start=start)
        written = Backend.from_file(str(tmp_path / "tokenizer.json"))
        assert written.encode("Hi").ids == own.encode("Hi")


def test_all_ends_of_text_are_written(tmp_path):
    """And what else the checkpoint said of its tokens."""
    own = byte_tokenizer()
    backend = Backend.from_str(own._backend.to_str())
    backend.add_special_tokens(["<turn>", "<pad>", "<unk>"])
    backend.add_tokens(["<think>"])
    found = tokenizer.Tokenizer(
        backend,
        eos_id=[256, 257],
        pad_id=258,
        chat_template={"default": "{{ unk_token }}", "rag": "r"},
        special_tokens={"eos_token": "<|endoftext|>", "unk_token": "<unk>"},
    )
    shape = dataclasses.replace(LLAMA, vocab_size=264)
    weights = jax.device_get(models.make(shape).init(jax.random.key(0)))
    weights.pop("value")
    folder.write_model(tmp_path, shape, weights, found, dtype="float32", sampling={})
    for name in ("config.json", "generation_config.json"):
        stored = json.loads((tmp_path / name).read_text())
        assert (stored["eos_token_id"], stored["pad_token_id"]) == ([256, 257], 258)
    again = pretrained.load(tmp_path).tokenizer
    known = {"pad_token": "<pad>", **found.special_tokens}
    assert again.settings() == {**found.settings(), "special_tokens": known}
    ids = found.encode("<think>a<turn>")
    assert again.encode("<think>a<turn>") == ids == [260, *own.encode("a"), 257]
    assert again.missing(264).tolist() == [261, 262, 263]


def test_shapes_between_the_families():
    for change in (
        {"norm": "layer"},
        {"gated": False},
        {"qkv_bias": True, "mlp_bias": True},
        {"window": 4, "mlp_bias": True},
        {"window": 4, "no_window": (0,)},
        {"no_rope": (0,), "qk_norm": True},
        {"post_norms": True},
        {"logit_cap": 2.0},
        {"window": 4, "window_theta": 10.0},
    ):
        with pytest.raises(PretrainedError, match="no class for a transformer of this shape"):
            settings.family_of(dataclasses.replace(LLAMA, **change))
    with pytest.raises(PretrainedError, match="no class"):
        settings.family_of(dataclasses.replace(LLAMA, context_width=8))
