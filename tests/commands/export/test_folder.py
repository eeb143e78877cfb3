import dataclasses

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

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


def test_shapes_between_the_families():
    for change in (
        {"norm": "layer"},
        {"gated": False},
        {"qkv_bias": True, "mlp_bias": True},
        {"window": 4, "mlp_bias": True},
    ):
        with pytest.raises(PretrainedError, match="no class for a transformer of this shape"):
            settings.family_of(dataclasses.replace(LLAMA, **change))
    with pytest.raises(PretrainedError, match="no class"):
        settings.family_of(dataclasses.replace(LLAMA, context_width=8))


def test_a_folder_is_complete_or_absent(tmp_path):
    place = tmp_path / "deep" / "out"
    with (
        pytest.raises(PretrainedError, match="cannot be written .No space left on device.*"),
        folder.complete_folder(place) as path,
    ):
        (path / "half").touch()
        assert not place.exists()
        raise OSError(28, "No space left on device")
    with pytest.raises(ZeroDivisionError), folder.complete_folder(place) as path:
        (path / "half").touch()
        raise ZeroDivisionError
    assert list(place.parent.iterdir()) == []
    place.mkdir()  # an empty one may be there
    with folder.complete_folder(place) as path:
        (path / "whole").touch()
        assert list(place.iterdir()) == []
    assert [x.name for x in place.iterdir()] == ["whole"]
    assert (
        place.stat().st_mode & 0o777 == (tmp_path / "deep").stat().st_mode & 0o777
    )  # not for its owner alone
    with (
        pytest.raises(PretrainedError, match="cannot be written"),
        folder.complete_folder(place) as path,
    ):
        (path / "other").touch()  # somebody was faster
    assert [x.name for x in place.iterdir()] == ["whole"] and len(list(place.parent.iterdir())) == 1
