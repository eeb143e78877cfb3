"""Text to ids and back, whatever the tokenizer came from."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxppo.errors import PretrainedError
from jaxppo.pretrained.tokenizer import (
    USER,
    Tokenizer,
    from_file,
    from_transformers,
    to_transformers,
)

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


def special(backend, *names, plain=()):
    """A copy of the tokenizer with more tokens."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    made = Backend.from_str(backend.to_str())
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    made.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain])
    return made


def write(folder, backend, files=None, **config):
    """A checkpoint's tokenizer, and JSON files beside it."""
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    for name, stored in {"tokenizer_config.json": config, **(files or {})}.items():
        (folder / name).write_text(json.dumps(stored))
    return from_transformers(folder)


def test_a_folder_names_all_ends_of_its_texts(backend, tmp_path):
    made = special(backend, "<eot>", "<eom>")
    end, eot, eom = (made.token_to_id(x) for x in ("<|endoftext|>", "<eot>", "<eom>"))
    files = {"generation_config.json": {"eos_token_id": [eom, end, 2, 10**9]}}
    files["config.json"] = {"model_type": "llama", "eos_token_id": eot, "pad_token_id": eom}
    found = write(tmp_path, made, files, eos_token="<|endoftext|>")
    # the tokenizer's own first; 2 is an ordinary token: a default of transformers
    assert found.eos_ids == (end, eom, eot) and found.eos_id == end and found.pad_id == eom
    files["generation_config.json"] = {"eos_token_id": None}
    assert write(tmp_path, made, files).eos_ids == (eot,)
    files["config.json"] = {"model_type": "llama"}
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(PretrainedError, match="no end-of-text"):
        write(tmp_path, made, {"config.json": files["config.json"]})


def test_what_is_known_of_tokens_is_kept(backend, tmp_path):
    made = special(backend, "<eot>", "<unk>")
    ends = [made.token_to_id("<eot>"), made.token_to_id("<|endoftext|>")]
    templates = {"default": "{{ unk_token }}", "rag": "r"}
    own = Tokenizer(
        made, eos_id=ends, chat_template=templates, special_tokens={"unk_token": "<unk>"}
    )
    own.save(tmp_path)
    stored = json.loads(json.dumps(own.settings()))
    again = from_file(tmp_path, stored)
    assert again.settings() == own.settings() and again.eos_ids == tuple(ends)
    assert again.apply_chat([USER]) == "<unk>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(to_transformers(own, 8)))
    outside = from_transformers(tmp_path)
    assert outside.chat_template == templates and outside.apply_chat([USER]) == "<unk>"
    old = {name: stored[name] for name in ("bos_id", "pad_id")} | {"eos_id": ends[0]}
    assert from_file(tmp_path, {**old, "chat_template": None}).eos_ids == (ends[0],)


def test_ids_may_have_holes(backend, tmp_path):
    """The last token moves up by 5: 5 ids stay empty, and the vocabulary is so much larger."""
    stored, n = json.loads(backend.to_str()), backend.get_vocab_size()
    stored["added_tokens"][0]["id"] = n + 4  # <|endoftext|>, which was n - 1
    stored["model"]["vocab"]["<|endoftext|>"] = n + 4
    from tokenizers import Tokenizer as Backend

    found = write(tmp_path, Backend.from_str(json.dumps(stored)), eos_token="<|endoftext|>")
    assert (found.vocab_size, found.eos_id) == (n + 5, n + 4)
    assert found.missing(n + 7).tolist() == [*range(n - 1, n + 4), n + 5, n + 6]
    assert found.missing(n - 1).tolist() == [] and found.token(n) == ""
    assert found.decode([*found.encode("good"), n, n + 4], skip_special=False) == (
        "good<|endoftext|>"
    )
    with pytest.raises(PretrainedError, match=f"eos id {n} is outside"):
        Tokenizer(found._backend, eos_id=n)


@pytest.mark.parametrize(
    ("single", "expected"),
    [(None, []), ("<s> $A", ["<s>"]), ("<s> <b> $A </s>", ["<s>", "<b>"]), ("$A </s>", [])],
)
def test_what_the_post_processor_puts_before_a_text(backend, single, expected):
    from tokenizers import processors

    made = special(backend, "<s>", "</s>", "<b>")
    level = processors.ByteLevel(trim_offsets=False)
    if single is not None:
        tokens = [(x, made.token_to_id(x)) for x in ("<s>", "</s>", "<b>")]
        adding = processors.TemplateProcessing(single=single, special_tokens=tokens)
        made.post_processor = processors.Sequence([level, adding])
    found = Tokenizer(made, eos_id=made.token_to_id("</s>"))
    assert [found.token(i) for i in found.start_ids] == expected
    assert found.encode("good") == backend.encode("good").ids


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>"
    "{% endif %}"
)


def test_special_tokens_inside_an_answer_are_text(backend):
    """Those that the template has, but not around a user's message."""
    made = special(backend, "<|im_start|>", "<think>", "</think>", "<other>", "<|im_end|>")
    end = made.token_to_id("<|im_end|>")
    ids = made.encode("<|im_start|><think>a</think><other>good<|im_end|>").ids
    thinking = Tokenizer(made, eos_id=end, chat_template=THINKING)
    assert thinking.decode(ids) == "<think>a</think>good"
    assert thinking.decode_batch([ids, []]) == ["<think>a</think>good", ""]
    assert thinking.decode(ids, skip_special=False) == (
        "<|im_start|><think>a</think><other>good<|im_end|>"
    )
    refusing = "{{ raise_exception('<think>') }}"
    for template in (None, CHATML, refusing, {"other": THINKING}):
        assert Tokenizer(made, eos_id=end, chat_template=template).decode(ids) == "agood"


NAMES = ("<s>", "</s>", "<pad>", "<unk>", "<think>", "[X]", "<|a b|>", "<0x41>")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(data=st.data())
def test_any_folder_is_read_as_transformers_reads_it(backend, tmp_path_factory, data):
    """Special and ordinary added tokens, holes, post-processors, ends, templates."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors
    from transformers import AutoTokenizer

    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    plain = data.draw(st.sets(st.sampled_from(names[1:]))) if names[1:] else set()
    made = special(backend, *(x for x in names if x not in plain), plain=sorted(plain))
    before, behind = (data.draw(st.lists(st.sampled_from(names), max_size=2)) for _ in range(2))
    if before or behind:
        made.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *behind],
            special_tokens=[(x, made.token_to_id(x)) for x in {*before, *behind}],
        )
    hole = data.draw(st.integers(0, 9))
    stored = json.loads(made.to_str())
    first = min(token["id"] for token in stored["added_tokens"])
    for token in stored["added_tokens"]:
        token["id"] += hole
        stored["model"]["vocab"][token["content"]] = token["id"]
    for token in (stored["post_processor"] or {}).get("special_tokens", {}).values():
        token["ids"] = [i + hole if i >= first else i for i in token["ids"]]
    kinds = ("eos_token", "bos_token", "pad_token", "unk_token")
    config = {kind: data.draw(st.sampled_from(names)) for kind in kinds}
    for kind in kinds[1:]:
        if data.draw(st.booleans()):
            del config[kind]
    config["chat_template"] = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{% "
    config["chat_template"] += "for m in messages %}{{ m.content | tojson }}{% endfor %}"
    folder = tmp_path_factory.mktemp("any")
    ours = write(folder, Backend.from_str(json.dumps(stored)), **config)
    theirs = AutoTokenizer.from_pretrained(folder)

    pieces = st.one_of(st.sampled_from([*names, " ", "\n"]), st.text(max_size=5))
    text = "".join(data.draw(st.lists(pieces, max_size=6)))
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert [*ours.start_ids, *ids] == theirs.encode(text)[: len(ours.start_ids) + len(ids)]
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    for skip in (True, False):
        clean = {"clean_up_tokenization_spaces": False}
        assert ours.decode(ids, skip_special=skip) == theirs.decode(
            ids, skip_special_tokens=skip, **clean
        )
    messages = [{"role": "user", "content": text}]
    assert ours.apply_chat(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert (ours.eos_id, ours.bos_id) == (theirs.eos_token_id, theirs.bos_token_id)


def test_texts_are_whole_whatever_the_file_says_of_padding(backend, tmp_path):
    again = tokenizers.Tokenizer.from_str(backend.to_str())
    again.enable_truncation(2)
    again.enable_padding(length=9)
    again.save(str(tmp_path / "tokenizer.json"))
    found = from_file(tmp_path, {"eos_id": 3})
    assert found.encode("zyxwv") == backend.encode("zyxwv").ids
