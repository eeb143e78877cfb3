"""Text to ids and back, whatever the tokenizer came from."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxppo.errors import PretrainedError
from jaxppo.pretrained.tokenizer import Tokenizer, from_file, from_transformers

CHATML = (
    "{% for m in messages %}\n<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}\n"
)


@pytest.fixture
def tokenizer(backend) -> Tokenizer:
    return Tokenizer(backend, eos_id=backend.token_to_id("<|endoftext|>"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=40))
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids, skip_special=False) == text


def test_ids(tokenizer):
    end = tokenizer.vocab_size - 1
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, tokenizer.start_id) == (
        end,
        None,
        end,
        end,
    )


def test_decode_takes_arrays_and_skips_specials(tokenizer):
    ids = [*tokenizer.encode("good film"), tokenizer.eos_id]
    assert tokenizer.decode(np.asarray(ids, np.int32)) == "good film"
    assert tokenizer.decode(ids, skip_special=False) == "good film<|endoftext|>"
    assert tokenizer.decode_batch(np.asarray([ids, ids])) == ["good film"] * 2


def test_encode_adds_nothing(backend):
    # a checkpoint whose tokenizer adds a start token by itself must not do so for a response
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    adding = Backend.from_str(backend.to_str())
    end = adding.token_to_id("<|endoftext|>")
    adding.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)]
    )
    assert adding.encode("good").ids[0] == end
    assert Tokenizer(adding, eos_id=end).encode("good") == backend.encode("good").ids


def test_bad_ids(backend):
    with pytest.raises(PretrainedError, match="no end-of-text"):
        Tokenizer(backend, eos_id=None)
    with pytest.raises(PretrainedError, match="pad id 9999 is outside"):
        Tokenizer(backend, eos_id=0, pad_id=9999)


def test_save(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = from_file(tmp_path, tokenizer.settings())
    assert again.encode("café 12") == tokenizer.encode("café 12")
    assert again.settings() == tokenizer.settings()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(PretrainedError, match="cannot be read"):
        from_file(tmp_path, tokenizer.settings())


def test_transformers_folder(backend, tmp_path):
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", chat_template=CHATML
    )
    fast.save_pretrained(tmp_path)
    ours = from_transformers(tmp_path)
    assert ours.eos_id == fast.eos_token_id and ours.vocab_size == len(fast)
    for text in ("hello world", " 123 – über", "<|endoftext|> x"):
        assert ours.encode(text) == fast.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text), skip_special=False) == fast.decode(fast.encode(text))
    assert ours.chat_template == CHATML


def test_transformers_folder_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(PretrainedError, match="tokenizer") as error:
        from_transformers(tmp_path)
    assert "\n" not in str(error.value)


def test_chat(backend):
    from transformers import PreTrainedTokenizerFast

    ours = Tokenizer(backend, eos_id=0, chat_template=CHATML)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", chat_template=CHATML
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>"}]
    expected = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat(messages) == expected
    with pytest.raises(PretrainedError, match="no chat template"):
        Tokenizer(backend, eos_id=0).apply_chat(messages)
    with pytest.raises(PretrainedError, match="does not take"):  # the sandbox refuses the way out
        Tokenizer(backend, eos_id=0, chat_template="{{ ''.__class__.__mro__ }}").apply_chat(
            messages
        )
