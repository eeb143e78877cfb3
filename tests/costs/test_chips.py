import importlib.util
import json
import os
import warnings

import jax
import pytest

from jaxppo.commands import plan
from jaxppo.costs import chips, phases
from jaxppo.errors import UserError

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler: pip install -e '.[tpu-plan]'",
)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("v9:2x2", "one of v4, v5e, v5p, v6e"),
        ("v5e", "such as v5e:2x4"),
        ("v5e:2xx2", "such as v5e:2x4"),
    ],
)
def test_a_wrong_topology_is_refused(text, word):
    with pytest.raises(UserError, match=word):
        chips.topology(text)


@needs_compiler
@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("v4:2x2x2", 8),
        ("v5e:1x1", 1),
        ("v5e:16x16", 256),
        ("v5p:4x4x4", 64),
        ("v6e:1x1", 1),
        ("v6e:2x4", 8),
    ],
)
def test_one_device_for_each_chip(text, devices):
    """Also of a v4, whose two cores are one device, as on a real one; and a slice of one chip."""
    chip, found = chips.topology(text)
    assert len(found) == devices and chip is chips.CHIPS[text.split(":")[0]]


@needs_compiler
def test_an_unknown_size_is_refused(capfd):
    """The compiler is installed: the message does not ask for it."""
    with pytest.raises(UserError, match="v5e:3x3.*not divisible") as caught:
        chips.topology("v5e:3x3")
    assert "pip install" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_without_the_compiler(monkeypatch):
    from jax.experimental import topologies

    def missing(**_):
        raise RuntimeError("no library")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        UserError,
        match="v5e:2x2: no library; it needs the TPU compiler: pip install -e '.\\[tpu-plan\\]'",
    ):
        chips.topology("v5e:2x2")


def test_quiet(capfd):
    """What a library writes past Python goes into the list; afterwards the terminal is as before,
    also after an error.
    """
    with chips.capture_stderr() as said:
        os.write(2, b"W12 complaint\n")
        warnings.warn("a compilation cache of no use", UserWarning, stacklevel=1)
    assert "".join(said) == "W12 complaint\n"
    with pytest.raises(ValueError), chips.capture_stderr() as said:
        os.write(2, b"last words")
        raise ValueError
    assert said == ["last words"]
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_local_devices():
    assert chips.local_devices() == jax.devices()


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("model name : x\nflags\t\t: fpu avx2 avx512f\n", True),
        ("flags\t\t: fpu avx512f avx512_bf16 amx_bf16\n", False),
        ("Features\t: fp asimd bf16\n", False),
        ("Features\t: fp asimd\n", True),
        ("processor : 0\n", False),  # it does not say
        (None, False),
    ],
)
def test_a_cpu_without_a_unit_for_bfloat16(tmp_path, text, without):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    assert chips.lacks_bfloat16(path) is without


def test_shapes(tmp_path):
    assert (
        sum(phases.matrix_parameters(plan.shape_of("smollm2"))) == 134_479_872
    )  # 134.5 M with norms
    assert sum(phases.matrix_parameters(plan.shape_of("qwen2-1.5b"))) == 1_543_569_408  # 1.54 B
    assert (
        sum(phases.matrix_parameters(plan.shape_of("llama-7b"))) == 6_607_077_376
    )  # and the input table: 6.74 B
    settings = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 100,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert plan.shape_of(str(tmp_path)).num_layers == 2
    with pytest.raises(UserError, match="choose one of smollm2, gpt2"):
        plan.shape_of("nonsense")
