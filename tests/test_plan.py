import dataclasses
import importlib.util
import json

import jax
import pytest

from jaxppo import cli, config, plan, sharding
from jaxppo.config import RunConfig, UserError

TINY = config.llama(vocab_size=64, width=16, num_layers=2, num_heads=4, num_kv_heads=2, max_length=64)
SETTINGS = RunConfig(batch_size=32, minibatches=2, lora=0, prompt_length=4, response_length=8, dtype="float32")
REPORT = plan.Report(
    4, "mesh data=4", 9.0, 10 * plan.GIB, plan.GIB, plan.GIB, 8 * plan.GIB, {("all-gather", 2**21): 3},
    {"generate": (2e12, 1e9), "update": (1e12, 819e9)},
)  # fmt: skip


def test_weights_in_products():
    """Width 16, heads 4 x 4, kv 2 x 4: q and o 16 x 16, k and v 16 x 8, three of 16 x 48; two layers; the head 16 x 64."""
    assert plan.matrix_parameters(TINY) == (2 * (2 * 256 + 2 * 128 + 3 * 768), 1024)


def test_phases_by_hand():
    """One device, one row: 2 · 6144 weights · 12 tokens + 2 · 1024 · 8 + attention 4 · 2 · 16 · 12² / 2."""
    one = dataclasses.replace(SETTINGS, batch_size=1, minibatches=1)
    mesh = sharding.make_mesh("data=1", jax.devices()[:1])
    found = plan.phases(one, TINY, mesh)
    forward = 2 * 6144 * 12 + 2 * 1024 * 8 + 4 * 2 * 16 * 12 * 12 / 2
    assert found["generate"][0] == found["reference"][0] == forward
    assert found["update"][0] == 3 * forward
    # 8 tokens read 7168 weights of 4 bytes, and 2 · 2 layers · 2 heads · 4 · 4 bytes of each of 4 + 8 / 2 cached tokens
    assert found["generate"][1] == 8 * 7168 * 4 + 8 * 2 * 2 * 2 * 4 * 4 * 8
    assert found["update"][1] == 3 * 7168 * 4 + 7168 * 28  # and Adam's seven passes
    adapters = plan.phases(dataclasses.replace(one, lora=8), TINY, mesh)
    assert adapters["update"] == (2 * forward, 2 * 7168 * 4)


def test_eight_devices_share_the_work():
    alone = plan.phases(SETTINGS, TINY, sharding.make_mesh("data=1", jax.devices()[:1]))
    shared = plan.phases(SETTINGS, TINY, sharding.make_mesh("data=8"))
    for name in alone:
        assert shared[name][0] == alone[name][0] / 8
    assert shared["reference"][1] == alone["reference"][1]  # each reads all weights


def test_the_report_says_what_fits():
    chip = plan.CHIPS["v5e"]
    assert REPORT.peak == 18 * plan.GIB  # 10 + 1 − 1 + 8
    text = plan.text_of(SETTINGS, TINY, chip, REPORT)
    assert "DOES NOT FIT: 18.00 GiB of 16.00 GiB on a TPU v5e (112%), 2.00 GiB too much" in text
    assert text.index("--remat block") < text.index("--microbatches 2") < text.index("--lora 8")
    # 2e12 / 197e12 = .0102 s of compute against .0012 of memory; 819e9 bytes are 1 s
    assert "at least 0.010 s, bound by compute" in text and "at least 1.000 s, bound by memory" in text
    assert "3 x all-gather of 2.00 MiB" in text
    small = dataclasses.replace(REPORT, arguments=plan.GIB, temporaries=plan.GIB)
    assert "FITS: 2.00 GiB of 16.00 GiB" in plan.text_of(SETTINGS, TINY, chip, small)
    assert "what would lower it" not in plan.text_of(SETTINGS, TINY, chip, small)


def test_gathered_parameters_are_warned_about():
    """The largest matrix here is 64 x 16 of 4 bytes; with fsdp they are meant to be gathered."""
    found = dataclasses.replace(REPORT, collectives={("all-gather", 4096): 1, ("all-gather", 1024): 9, ("all-reduce", 2**20): 1})
    assert len(plan.remarks(SETTINGS, TINY, found)) == 1
    assert plan.remarks(dataclasses.replace(SETTINGS, mesh="fsdp=4"), TINY, found) == []


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8"])
def test_a_plan_for_the_devices_that_are_here(mesh):
    """Parameters and moments cut in eight take less than whole ones."""
    found = plan.compile_plan(dataclasses.replace(SETTINGS, mesh=mesh), TINY, jax.devices())
    assert found.devices == 8 and found.temporaries > 0
    assert any(kind == "all-reduce" for kind, _ in found.collectives)
    assert found.aliased > 0  # the state is donated


@pytest.mark.parametrize(
    ("text", "word"), [("v9:2x2", "one of v4, v5e, v5p, v6e"), ("v5e", "such as v5e:2x4"), ("v5e:2xx2", "such as v5e:2x4")]
)
def test_a_wrong_topology_is_refused(text, word):
    with pytest.raises(UserError, match=word):
        plan.topology(text)


def test_shapes(tmp_path):
    assert sum(plan.matrix_parameters(plan.shape_of("smollm2"))) == 134_479_872  # 134.5 M with norms
    settings = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2,
        "vocab_size": 100, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert plan.shape_of(str(tmp_path)).num_layers == 2
    with pytest.raises(UserError, match="choose one of smollm2, gpt2"):
        plan.shape_of("nonsense")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install 'jaxppo[tpu-plan]'")
def test_a_plan_for_chips_that_are_not_here(capfd, monkeypatch):
    """The whole PPO step for four chips of a v5e, on a machine without one; and nothing of the compiler's own complaints."""
    monkeypatch.setitem(plan.SHAPES, "toy", TINY)
    options = cli.PlanOptions(**{**dataclasses.asdict(SETTINGS), "model": "toy", "topology": "v5e:2x2", "dtype": "bfloat16"})
    cli.plan(options)
    shown = capfd.readouterr()
    assert shown.out.startswith("one program for 4 devices (mesh data=4)")
    assert "FITS: " in shown.out and "all-reduce" in shown.out
    assert shown.err == ""
