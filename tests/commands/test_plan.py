import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from jaxppo import cli, parallel
from jaxppo.commands import plan
from jaxppo.config import RunConfig
from jaxppo.costs import chips, compiled
from jaxppo.costs.chips import GIB
from jaxppo.costs.hlo import Loop
from jaxppo.costs.program import Collective
from jaxppo.errors import UserError
from jaxppo.models import lora, shapes
from jaxppo.run.settings import to_dict
from jaxppo.tasks import TaskConfig

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler: pip install -e '.[tpu-plan]'",
)
TINY = shapes.llama(
    vocab_size=64, width=16, num_layers=2, num_heads=4, num_kv_heads=2, max_length=64
)
SETTINGS = RunConfig(
    batch_size=32, minibatches=2, lora=0, prompt_length=4, response_length=8, dtype="float32"
)
V5E = chips.CHIPS["v5e"]
DECODE, LAYERS = Loop("decode", 7, False), Loop("layers", 2, True)
MATRIX = (("bf16", (1, 1024, 2048)),)  # 4 MiB
GATHER = Collective("all-gather", MATRIX, 4, (DECODE, LAYERS), "generate")
SUM = Collective("all-reduce", MATRIX, 4, (Loop("minibatches", 4, True),), "update")
STOP = Collective("all-reduce", (("u32", ()),), 4, (DECODE,), "generate")
REPORT = compiled.Plan(
    4,
    "data=4",
    9.0,
    10 * GIB,
    GIB,
    GIB,
    7 * GIB,
    GIB,
    {SUM: 3, STOP: 1},
    {"generate": (2e12, 1e9), "update": (1e12, 819e9)},
    frozenset({(1024, 2048), (16, 1024, 2048), (4096, 512)}),
    inside=("generate", "update"),
)


def text_of(report: compiled.Plan, settings: RunConfig = SETTINGS) -> str:
    return plan.report_text(settings, TINY, V5E, report)


def test_the_report_says_what_fits():
    assert REPORT.peak == 18 * GIB  # 10 + 1 − 1 + 7 + 1
    text = text_of(REPORT)
    assert "DOES NOT FIT: 18.00 GiB of 15.75 GiB on a TPU v5e (114%), 2.25 GiB too much" in text
    assert (
        text.index("--remat block") < text.index("--tokens-per-microbatch") < text.index("--lora 8")
    )
    # 2e12 / 197e12 = .0102 s of compute against .0012 of memory; 819e9 bytes are 1 s
    assert (
        "at least 0.010 s, bound by compute" in text and "at least 1.000 s, bound by memory" in text
    )
    small = dataclasses.replace(REPORT, arguments=GIB, temporaries=GIB)
    assert "FITS: 3.00 GiB of 15.75 GiB" in text_of(small)
    assert "what would lower it" not in text_of(small)
    tight = dataclasses.replace(REPORT, temporaries=4 * GIB)  # 15 GiB are 95 %
    assert "FITS: 15.00 GiB" in text_of(tight) and "what would lower it" in text_of(tight)


def test_smaller_activations_do_not_help_if_the_arguments_are_too_large():
    text = text_of(dataclasses.replace(REPORT, arguments=16 * GIB))
    assert text.index("--lora 8") < text.index("--mesh fsdp=4") < text.index("--remat block")
    assert "microbatch" not in text


def test_the_parameters_of_adapters_are_counted():
    """Two layers of rank 2: q and o 64 each, k and v 48 each, three of the MLP 128 each, 1216 in
    all; as many for a separate critic.
    """
    adapted = dataclasses.replace(SETTINGS, lora=2, lora_on="all", value_loss="none")
    text = text_of(dataclasses.replace(REPORT, adapters=1216), adapted)
    assert "\n1,216 parameters of adapters of rank 2 on all are trained\n" in text
    assert "adapters" not in text_of(REPORT)
    for changes, count in ({}, 1), ({"critic": "separate", "value_loss": "mse"}, 2):
        config = dataclasses.replace(adapted, **changes)
        state = compiled.abstract_state(config, TINY)[1]
        assert lora.count_adapters(state.params) == count * 1216


def test_links_can_bind():
    """8 GiB sent in an update of 200e9 bytes a second: 4 · 3 · 1.5 · S with S = 4 GiB / 9 = .477e9
    bytes.
    """
    large = SUM._replace(arrays=(("f32", (2**30 // 9,)),))
    text = text_of(
        dataclasses.replace(REPORT, collectives={large: 3}, phases={"update": (1e9, 1e9)})
    )
    assert "at least 0.043 s, bound by links (compute 0.000, memory 0.001, links 0.043)" in text


def test_collectives_are_listed_with_their_loops():
    """A sum of 4 MiB sends 1.5 times that: 3 · 4 · 6 MiB = .07 GiB. The stop test is too small to
    be listed.
    """
    lines = plan.collective_lines(REPORT)
    assert lines == [
        "collectives: 4 in the program; each device sends 0.07 GiB a step",
        "  0.07 GiB: 12 x all-reduce of 4.00 MiB over 4 devices in update: minibatches 4",
        "the decode loop sends 0.00 MiB for each token of all rows, in 1 collectives",
    ]
    lines = plan.collective_lines(dataclasses.replace(REPORT, collectives={GATHER: 2}))
    # 2 · 7 · 2 gathers send 3 MiB each; a token's share is a seventh
    assert (
        lines[1] == "  0.08 GiB: at most 28 x all-gather of 4.00 MiB over 4 devices in generate: "
        "decode 7 x layers 2"
    )
    assert (
        lines[2] == "the decode loop sends 12.00 MiB for each token of all rows, in 1 collectives"
    )
    assert plan.collective_lines(dataclasses.replace(REPORT, collectives={})) == ["no collectives"]


@pytest.mark.parametrize(
    ("moved", "words"),
    [
        (GATHER, "all-gather of 4 MiB in the decode loop, for each token moves"),
        (GATHER._replace(loops=(), phase="update"), "all-gather of 4 MiB in update moves"),
        (GATHER._replace(loops=(), phase=""), "all-gather of 4 MiB once a step moves"),
        (
            GATHER._replace(arrays=(("bf16", (2, 512, 2048)),)),
            "decode loop",
        ),  # heads apart: the same array
        (
            SUM._replace(phase="reference"),
            "all-reduce of 4 MiB in reference",
        ),  # no gradients are summed up there
        (SUM, None),  # gradients
        (
            GATHER._replace(arrays=(("bf16", (32, 65536)),)),
            None,
        ),  # as many numbers, but other dimensions
        (GATHER._replace(arrays=(("bf16", (1023, 2048)),)), None),
        (STOP, None),
    ],
)
def test_moved_parameters_are_warned_about(moved, words):
    """Parameters here are 1024 x 2048 in each of 16 layers, and 4096 x 512."""
    found = plan.warning_lines(SETTINGS, dataclasses.replace(REPORT, collectives={moved: 1}))
    assert len(found) == (words is not None)
    assert words is None or (words in found[0] and found[0].startswith("warning: an "))


def test_small_parameters_are_not_worth_a_warning():
    found = dataclasses.replace(
        REPORT,
        matrix_shapes=frozenset({(8, 8)}),
        collectives={GATHER._replace(arrays=(("f32", (8, 8)),)): 1},
    )
    assert plan.warning_lines(SETTINGS, found) == []


def test_with_fsdp_gathers_are_no_warning():
    """7 · 2 gathers of a token and one more, of 3 MiB each."""
    report = dataclasses.replace(
        REPORT, collectives={GATHER: 1, GATHER._replace(loops=(), phase="update"): 1}
    )
    (line,) = plan.warning_lines(dataclasses.replace(SETTINGS, mesh="fsdp=4"), report)
    assert (
        "gathered for use: 0.04 GiB a step, 0.04 GiB of it in the decode loop" in line
        and "warning" not in line
    )


def test_rematerialisations_are_counted():
    text = text_of(
        dataclasses.replace(REPORT, involuntary=("jit(f)/sin", "jit(f)/sin", "jit(f)/cos"))
    )
    assert (
        "warning: 3 involuntary full rematerialisations" in text
        and "at jit(f)/sin, jit(f)/cos\n" in text
    )


def test_a_plan_of_a_new_network(tmp_path, monkeypatch):
    """A task's settings without a checkpoint: planned with the largest vocabulary that they
    allow.
    """
    planned = []
    monkeypatch.setattr(plan, "report_text", lambda *_: "")
    path = tmp_path / "config.json"
    report = dataclasses.replace(REPORT, refused="")
    monkeypatch.setattr(
        compiled,
        "compile_plan",
        lambda config, shape, devices, **_: planned.append((config, shape)) or report,
    )
    for settings in (
        TaskConfig(task="translation", width=96, layers=2, batch_size=32),
        TaskConfig(task="spelling", tokens="bytes"),
    ):
        path.write_text(json.dumps(to_dict(settings)))
        plan.plan(plan.PlanOptions(config=path))
    assert [(shape.width, shape.num_layers, shape.vocab_size) for _, shape in planned] == [
        (96, 2, 4000),
        (128, 3, 257),
    ]
    assert planned[0][0].batch_size == 32
    path.write_text(json.dumps(to_dict(TaskConfig(task="speech", model_kind="gru"))))
    with pytest.raises(UserError, match="depends on its recordings"):
        plan.plan(plan.PlanOptions(config=path))


def test_settings_of_any_script_and_some_of_the_command_line(tmp_path, monkeypatch):
    """--config, as the file alone: what only the script knows is ignored, and its new network is
    planned.
    """
    planned = []
    monkeypatch.setattr(plan, "report_text", lambda *_: "")
    report = dataclasses.replace(REPORT, refused="")
    monkeypatch.setattr(
        compiled,
        "compile_plan",
        lambda config, shape, devices, **_: planned.append((config, shape)) or report,
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(TaskConfig(task="spelling", width=96, lr=0.5))))
    args = ["--config", str(path), "--batch-size", "96"]
    plan.plan(cli.parse(plan.PlanOptions, args=args))
    path.write_text(json.dumps(to_dict(RunConfig(model="gpt2")) | {"of a script": 1}))
    plan.plan(cli.parse(plan.PlanOptions, args=args))
    (task, network), (other, shape) = planned
    assert (task.batch_size, task.lr, network.width) == (96, 0.5, 96)
    assert (other.batch_size, shape) == (96, plan.SHAPES["gpt2"])


def test_a_program_that_is_too_large(monkeypatch):
    """The compiler gives no account then: the arguments are counted from the shapes, and what it
    says is shown.
    """
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required (24.00G) exceeds "
        "available HBM (15.75G).\nmore"
    )

    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(parallel.MeshStep, "lower", lambda *_: Lowered())
    found = compiled.compile_plan(SETTINGS, TINY, jax.devices()[:1])
    assert found.peak == 24 * GIB and 0 < found.arguments < 2**20
    text = text_of(found)
    assert (
        text.startswith("the compiler gave up: RESOURCE_EXHAUSTED")
        and "more" not in text.splitlines()[0]
    )
    assert (
        "DOES NOT FIT: 24.00 GiB of 15.75 GiB on a TPU v5e (152%), 8.25 GiB too much" in text
        and "--remat block" in text
    )
    assert "generate" in text  # what is counted from the shapes is known all the same
    said = "RESOURCE_EXHAUSTED: no numbers"
    unsaid = compiled.compile_plan(SETTINGS, TINY, jax.devices()[:1])
    assert not plan.fits(V5E, unsaid)
    assert "DOES NOT FIT: the compiler does not say how much more than 15.75 GiB" in text_of(unsaid)
    said = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compiled.compile_plan(SETTINGS, TINY, jax.devices()[:1])


@pytest.mark.ci
@needs_compiler
def test_a_plan_for_a_tpu_slice(capfd, monkeypatch):
    """The whole PPO step for four chips of a v5e, on a machine without one; and nothing of the
    compiler's own complaints.
    """
    monkeypatch.setitem(plan.SHAPES, "toy", TINY)
    options = plan.PlanOptions(
        **{
            **dataclasses.asdict(SETTINGS),
            "model": "toy",
            "topology": "v5e:2x2",
            "dtype": "bfloat16",
            "scan_layers": True,
        }
    )
    plan.plan(options)
    shown = capfd.readouterr()
    assert shown.out.startswith(
        "one program, with generate, reference, update, for 4 devices (mesh data=4)"
    )
    assert "FITS: " in shown.out and "all-reduce" in shown.out and "warning" not in shown.out
    assert shown.err == ""


@pytest.mark.slow
@needs_compiler
def test_a_plan_too_large_for_a_chip(capfd, monkeypatch):
    """4 M rows on one chip: the compiler gives up within seconds, the plan does not, and exits with
    code 2.
    """
    monkeypatch.setitem(plan.SHAPES, "toy", TINY)
    settings = dataclasses.replace(SETTINGS, batch_size=2**22, minibatches=1, scan_layers=True)
    with pytest.raises(SystemExit) as stop:
        plan.plan(
            plan.PlanOptions(
                **{**dataclasses.asdict(settings), "model": "toy", "topology": "v5e:1x1"}
            )
        )
    shown = capfd.readouterr()
    assert stop.value.code == 2 and shown.err == ""
    assert "the compiler gave up: RESOURCE_EXHAUSTED" in shown.out and "DOES NOT FIT: " in shown.out


@needs_compiler
@pytest.mark.slow
def test_two_plans_at_once(tmp_path):
    """Neither waits for, or stumbles over, the other's lock; nothing but the report is shown."""
    shape = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    start = "from jaxppo.commands import main; main()"
    options = (
        "--topology v5e:2x2 --batch-size 32 --minibatches 2 --lora 0 --prompt-length 4 "
        "--response-length 8 --scan-layers"
    )
    argv = [sys.executable, "-c", start, "plan", "--model", str(tmp_path), *options.split()]
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "TPU_", "ALLOW_", "TF_"))
    }
    both = [
        subprocess.Popen(argv, env=plain, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        out, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (0, "") and out.startswith(
            "one program, with generate, reference, update"
        )
