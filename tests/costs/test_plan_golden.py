"""Golden plans of three real sizes: the same collectives, and bytes within 2 %.

They hold for the TPU compiler that `golden/plans.json` names; with another compiler only general
facts are checked. To write them again after an intended change:
REWRITE_PLANS=1 pytest -m "slow or not slow" tests/costs/test_plan_golden.py
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
from collections import defaultdict
from pathlib import Path

import pytest

from jaxppo.commands import plan
from jaxppo.config import RunConfig
from jaxppo.costs import chips, compiled
from jaxppo.costs.chips import GIB

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("needs the TPU compiler: pip install -e '.[tpu-plan]'", allow_module_level=True)

GOLDEN = Path(__file__).parents[1] / "golden" / "plans.json"
FULL = RunConfig(
    lora=0, dtype="bfloat16", scan_layers=True, batch_size=64, prompt_length=64, response_length=64
)
LONG = dataclasses.replace(
    FULL, batch_size=128, prompt_length=128, response_length=128, remat="block"
)
# name -> (slice, settings, the most GiB of temporaries)
PLANS = {
    "smollm2": ("v5e:2x2", FULL, 2.5),
    "qwen2-1.5b": ("v5e:4x4", dataclasses.replace(LONG, mesh="fsdp=16"), 2.2),
    "llama-7b": ("v5p:4x4x4", dataclasses.replace(LONG, mesh="fsdp=16,tensor=4"), 2.0),
}
BYTES = ("arguments", "outputs", "aliased", "temporaries")


def summary(report: compiled.Plan) -> dict:
    """The golden numbers of a plan: bytes on a device, and number and bytes of the collectives of
    each kind in each place.
    """
    kinds: dict = defaultdict(lambda: [0, 0])
    for x, number in report.collectives.items():
        loops = " x ".join(
            f"{loop.name} {'' if loop.exact else '<= '}{loop.times}" for loop in x.loops
        )
        one = kinds[f"{x.phase or 'between'}: {loops + ' ' if loops else ''}{x.kind}"]
        one[0] += number
        one[1] += number * x.size
    return {
        "bytes": {name: getattr(report, name) for name in BYTES},
        "inside": list(report.inside),
        "involuntary": len(report.involuntary),
        "collectives": {name: kinds[name] for name in sorted(kinds)},
    }


def check(name: str) -> compiled.Plan:
    """Compile a plan and compare it with its golden numbers."""
    slice_, settings, temporaries = PLANS[name]
    chip, devices = chips.topology(slice_)
    settings = dataclasses.replace(settings, model=name)
    report = compiled.compile_plan(settings, plan.shape_of(name), devices)
    found = summary(report)
    # with any compiler
    assert report.inside == ("generate", "reference", "update") and plan.fits(chip, report)
    assert report.involuntary == ()
    assert report.temporaries < temporaries * GIB
    decode = {loop for x in report.collectives for loop in x.loops if loop.name == "decode"}
    assert decode == {("decode", settings.response_length - 1, False)}
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"libtpu": "", "plans": {}}
    version = importlib.metadata.version("libtpu")
    if os.environ.get("REWRITE_PLANS"):
        plans = stored["plans"] if stored["libtpu"] == version else {}
        GOLDEN.write_text(
            json.dumps({"libtpu": version, "plans": {**plans, name: found}}, indent=1) + "\n"
        )
    elif stored["libtpu"] == version:
        expected = stored["plans"][name]
        for part in ("inside", "involuntary"):
            assert found[part] == expected[part]
        assert {key: number for key, (number, _) in found["collectives"].items()} == {
            key: number for key, (number, _) in expected["collectives"].items()
        }
        for key, (_, size) in found["collectives"].items():
            assert size == pytest.approx(expected["collectives"][key][1], rel=0.02), key
        assert found["bytes"] == pytest.approx(expected["bytes"], rel=0.02)
    return report


@pytest.mark.slow
def test_smollm2_on_four_chips_of_a_v5e():
    """Data-parallel: a token needs only the stop test; an update sums all gradients once (the tied
    head's perhaps apart from the embedding's).
    """
    report = check("smollm2")
    assert [(x.kind, x.size) for x in report.collectives if x.decoding] == [("all-reduce", 4)]
    assert plan.warning_lines(PLANS["smollm2"][1], report) == []
    sums = {
        x: number
        for x, number in report.collectives.items()
        if x.phase == "update" and x.kind == "all-reduce"
    }
    each = sum(x.size * x.times * number for x, number in sums.items()) / 4  # minibatches
    assert 134.48e6 * 4 < each < (134.48e6 + 49152 * 576) * 4 * 1.02


@pytest.mark.slow
def test_qwen2_on_sixteen_chips_of_a_v5e():
    """fsdp: parameters are gathered where they are needed, in the decode loop too."""
    report = check("qwen2-1.5b")
    assert any(x.decoding and plan.moves_parameters(x, report) for x in report.collectives)
    # 1.54 B weights, their moments and the reference in 16 parts: 16 bytes each
    assert report.arguments == pytest.approx(1.5436e9 * 16 / 16, rel=0.02)


@pytest.mark.slow
def test_llama_on_a_cube_of_v5p():
    """fsdp x tensor: no device ever has a whole layer's matrix."""
    report = check("llama-7b")
    whole = 4096 * 11008 * 2
    assert max(x.size for x in report.collectives if plan.moves_parameters(x, report)) < whole
