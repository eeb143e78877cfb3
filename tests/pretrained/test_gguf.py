"""GGUF: head order, quantisation, settings and tokenizer of a small file and of the real
SmolLM2.
"""

import struct

import numpy as np
import pytest

from jaxppo import pretrained
from jaxppo.data.archives import read_member
from jaxppo.data.fetch import FetchError, fetch
from jaxppo.errors import PretrainedError
from jaxppo.pretrained import mapping
from jaxppo.pretrained.gguf import BLOCK_NAMES, llama_name, make_tokenizer, read, unpermute

gguf = pytest.importorskip("gguf")

STRINGS = [
    "Hello, world!",
    "In 2024, 1234567 people paid $3.50.",
    "naïve café – Müller über 東京 🙂",
    "  two  spaces\n\n\tand a tab ",
    "don't we'll I'm",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
    "x" * 300,
]


def permute(weight, num_heads):
    """Permute q or k as the GGUF writer does: halves become neighbours."""
    return weight.reshape(num_heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def test_unpermute_tiny():
    # 2 heads of 4 rows. Stored pairs (0, 1), (2, 3) of each head are the halves' first and second
    # rows: 0 2 | 1 3.
    rows = np.arange(8.0)[:, None] * np.ones((1, 3))
    assert unpermute(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert (unpermute(permute(rows, 2), 2) == rows).all()


def test_names():
    assert llama_name("output.weight") == "lm_head.weight"
    assert llama_name("blk.12.ffn_down.weight") == "layers.12.mlp.down_proj.weight"
    with pytest.raises(PretrainedError, match="rope_freqs"):
        llama_name("rope_freqs.weight")


@pytest.fixture
def tensors():
    """Llama tensors [out, in]: vocabulary 20, width 64, 1 layer, 4 heads of 16, 2 of them for keys
    and values.
    """
    rng = np.random.default_rng(0)
    shapes = {
        "embed_tokens": (20, 64),
        "norm": (64,),
        "layers.0.input_layernorm": (64,),
        "layers.0.self_attn.q_proj": (64, 64),
        "layers.0.self_attn.k_proj": (32, 64),
        "layers.0.self_attn.v_proj": (32, 64),
        "layers.0.self_attn.o_proj": (64, 64),
        "layers.0.post_attention_layernorm": (64,),
        "layers.0.mlp.gate_proj": (96, 64),
        "layers.0.mlp.up_proj": (96, 64),
        "layers.0.mlp.down_proj": (64, 96),
    }
    return {
        f"{name}.weight": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write(path, tensors, architecture="llama", pre="smollm", **numbers):
    back = {llama_name(f"blk.0.{part}.weight"): f"blk.0.{part}.weight" for part in BLOCK_NAMES}
    back |= {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(5e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<|endoftext|>", "<|end|>", *"abcdefghij0123", "Ġ", "ab", "Ġab", "cd"])
    writer.add_token_types([3, 3, *[1] * 18])
    writer.add_token_merges(["a b", "Ġ ab", "c d"])
    writer.add_eos_token_id(1)
    for name, tensor in tensors.items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        stored = permute(tensor, heads) if heads else tensor
        quantised = (
            gguf.quants.quantize(stored, gguf.GGMLQuantizationType.Q8_0)
            if "mlp" in name
            else stored
        )
        writer.add_tensor(
            back[name],
            quantised,
            raw_dtype=gguf.GGMLQuantizationType.Q8_0 if "mlp" in name else None,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_small_file(tmp_path, tensors):
    model = pretrained.load(write(tmp_path / "model.gguf", tensors))
    config = model.config
    assert (
        config.vocab_size,
        config.width,
        config.num_layers,
        config.num_kv_heads,
        config.head_dim,
    ) == (20, 64, 1, 2, 16)
    assert (config.rope_theta, config.norm_eps, config.tied, config.max_length) == (
        5e4,
        1e-5,
        True,
        128,
    )
    expected = mapping.flatten(mapping.from_checkpoint("llama", config, tensors))
    for name, value in mapping.flatten(model.params).items():
        # Q8_0 keeps 127 steps on each side of zero for every 32 numbers: the error is at most half
        # a step, largest / 254 (and the scale itself is a float16, right to 1 in 2048)
        largest = np.abs(expected[name]).max()
        assert np.abs(value - expected[name]).max() <= (
            largest / 254 * (1 + 1 / 8) if "mlp/" in name else 0
        ), name


def test_small_tokenizer(tmp_path, tensors):
    _, _, tokenizer = read(write(tmp_path / "model.gguf", tensors))
    assert tokenizer.encode("ab ab12<|end|>") == [
        17,
        18,
        13,
        14,
        1,
    ]  # digits stay single, specials are found in text
    assert tokenizer.decode([17, 18, 13, 1]) == "ab ab1"
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.start_id) == (1, 1, 0)


def metadata(**own):
    """What a file says of its tokenizer: 3 is a special token, 4 never split, 5 unused."""
    tokens = ["<unk>", "<s>", "</s>", "<turn>", "<think>", *"ab", "[PAD7]", "ab"]
    about = {"model": "gpt2", "pre": "default", "tokens": tokens, "merges": ["a b"]}
    about |= {"token_type": [2, 3, 3, 3, 4, 1, 1, 5, 1], "eos_token_id": 2, **own}
    return {f"tokenizer.ggml.{name}": x for name, x in about.items()}


def test_all_that_the_metadata_say_of_tokens():
    named = {"bos_token_id": 1, "eot_token_id": 3, "eom_token_id": 2, "unknown_token_id": 0}
    found = make_tokenizer(metadata(**named, add_bos_token=True))
    assert found.eos_ids == (2, 3) and found.bos_id == 1 and found.start_ids == (1,)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert found.special_tokens == names
    assert found.encode("<think>ab</s>") == [4, 8, 2]
    assert found.decode([1, 4, 8, 2]) == "<think>ab"
    assert found.missing(10).tolist() == [7, 9]  # unused, and a row more
    assert make_tokenizer(metadata(**named)).start_ids == ()


@pytest.mark.parametrize("own", [{"eos_token_id": 9}, {"eot_token_id": 7}, {"bos_token_id": 99}])
def test_ids_that_no_token_has(own):
    with pytest.raises(PretrainedError, match=f"id {max(own.values())} is outside its vocabulary"):
        make_tokenizer(metadata(**own, add_bos_token=True))


def test_a_part_of_a_split_file_is_named(tmp_path):
    """The parts after the first have no settings but these."""
    writer = gguf.GGUFWriter(tmp_path / "m-00002-of-00003.gguf", "llama")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 3)
    writer.add_tensor("output_norm.weight", np.zeros(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(PretrainedError, match="is one of 3 parts of a model; join them"):
        read(tmp_path / "m-00002-of-00003.gguf")


def test_unsupported_and_damaged_files(tmp_path, tensors):
    with pytest.raises(PretrainedError, match="'gemma'"):
        read(write(tmp_path / "a.gguf", tensors, architecture="gemma"))
    with pytest.raises(PretrainedError, match="'qwen2'"):
        read(write(tmp_path / "b.gguf", tensors, pre="qwen2"))
    whole = (tmp_path / "a.gguf").read_bytes()
    for i, data in enumerate([b"", b"GGUF", whole[:200], b"not a gguf file at all, but some text"]):
        (tmp_path / f"{i}.gguf").write_bytes(data)
        with pytest.raises(PretrainedError, match="not a whole GGUF") as error:
            read(tmp_path / f"{i}.gguf")
        assert "\n" not in str(error.value)


@pytest.fixture(scope="session")
def smollm2():
    try:
        return pretrained.load("smollm2")
    except FetchError as error:
        pytest.skip(str(error))


@pytest.mark.ci
def test_smollm2(smollm2):
    config, params, tokenizer = smollm2.config, smollm2.params, smollm2.tokenizer
    assert (
        config.vocab_size,
        config.width,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
    ) == (49152, 576, 30, 9, 3)
    sizes = [leaf.size for leaf in mapping.flatten(params).values()]
    assert sum(sizes) == 134_515_008
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.start_id, tokenizer.vocab_size) == (
        2,
        2,
        0,
        49152,
    )
    assert all(
        tokenizer.decode(tokenizer.encode(text), skip_special=False) == text for text in STRINGS
    )


@pytest.mark.ci
def test_smollm2_tokenizer_equals_transformers(smollm2, tmp_path):
    pytest.importorskip("torch")  # transformers reads GGUF through it
    from transformers import AutoTokenizer

    path = tmp_path / "smollm2.gguf"
    path.write_bytes(read_member(fetch("smollm2"), "*/*.gguf"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in STRINGS:
        assert smollm2.tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False), text
    messages = [{"role": "user", "content": "What is the capital of Japan?"}]
    if theirs.chat_template:
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert smollm2.tokenizer.apply_chat(messages) == expected


# Files that lie about their sizes.


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def field(kind: int, value: bytes) -> bytes:
    return string(b"name") + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return field(9, struct.pack("<IQ", kind, count) + values)


def tensor_header(*shape: int, name: bytes = b"t", kind: int = 0, offset: int = 0) -> bytes:
    head = string(name) + struct.pack("<I", len(shape))
    return head + struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)


def gguf_bytes(*, fields=(), tensors=(), data=b"", counts=None, magic=b"GGUF", version=3) -> bytes:
    counts = (len(tensors), len(fields)) if counts is None else counts
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join([*fields, *tensors])
    return head + bytes(-len(head) % 32 if tensors else 0) + data


@pytest.mark.parametrize(
    "data",
    [
        gguf_bytes(),
        gguf_bytes(version=2, fields=[field(4, bytes(4))]),
        gguf_bytes(fields=[array(8, 2, string(b"a") + string(b""))]),
        gguf_bytes(tensors=[tensor_header(2, 3)], data=bytes(24)),
    ],
)
def test_whole_files_are_opened(tmp_path, data):
    """They are whole, and only lack a model."""
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(PretrainedError, match="holds a 'None' model"):
        read(tmp_path / "x")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        gguf_bytes(magic=b"GGML"),
        gguf_bytes()[:-1],
        gguf_bytes(version=1),
        gguf_bytes(counts=(0, 2**64 - 1)),
        gguf_bytes(counts=(1, 0)),
        gguf_bytes(fields=[string(b"name", 2**64 - 1)]),
        gguf_bytes(fields=[field(13, bytes(8))]),
        gguf_bytes(fields=[field(4, bytes(3))]),
        gguf_bytes(fields=[field(8, string(b"text", 5))]),
        gguf_bytes(fields=[array(0, 4, b"abc")]),
        gguf_bytes(fields=[array(0, 2**63)]),
        gguf_bytes(fields=[array(8, 2, string(b"a"))]),
        gguf_bytes(tensors=[tensor_header(16, 2, kind=8)], data=bytes(34)),
        gguf_bytes(tensors=[tensor_header(1, kind=99)], data=bytes(4)),
        gguf_bytes(tensors=[tensor_header(2, 3)], data=bytes(23)),
        gguf_bytes(tensors=[tensor_header(1, offset=32)], data=bytes(4)),
        gguf_bytes(tensors=[tensor_header(2**32, 2**32)], data=bytes(4)),
        gguf_bytes(  # all at the same place
            tensors=[tensor_header(64, name=b"%d" % i) for i in range(9)], data=bytes(256)
        ),
    ],
)
def test_files_that_lie_about_their_sizes(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(PretrainedError, match="is not a whole GGUF file"):
        read(tmp_path / "x")
