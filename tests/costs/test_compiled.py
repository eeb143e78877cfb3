import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest
import toys

from jaxppo import models
from jaxppo.commands import plan
from jaxppo.config import RunConfig
from jaxppo.costs import chips, compiled, phases, program
from jaxppo.costs.hlo import Loop
from jaxppo.models import shapes
from jaxppo.models.shapes import network
from jaxppo.parallel import sharding

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


def test_shapes_of_the_parameters_matrices():
    """Whole over fsdp, cut over tensor; of scanned layers, all of them and one; vectors do not
    count.
    """
    params = {
        "embed": {"embedding": jax.ShapeDtypeStruct((64, 16), jnp.float32)},
        "layers": {
            "up": {"kernel": jax.ShapeDtypeStruct((2, 16, 48), jnp.float32)},
            "mlp_norm": {"scale": jax.ShapeDtypeStruct((2, 16), jnp.float32)},
        },
        "final_norm": jax.ShapeDtypeStruct((16,), jnp.float32),
    }
    assert compiled.matrix_shapes(params, sharding.make_mesh("fsdp=8")) == {
        (64, 16),
        (2, 16, 48),
        (16, 48),
    }
    assert compiled.matrix_shapes(params, sharding.make_mesh("fsdp=4,tensor=2")) == {
        (32, 16),
        (2, 16, 24),
        (16, 24),
    }


def test_a_teacher_has_its_own_weights():
    """Those of `self` are the reference's."""
    teacher = shapes.llama(
        vocab_size=64, width=32, num_layers=1, num_heads=4, num_kv_heads=2, max_length=64
    )
    reads = models.make(teacher, dtype="bfloat16")
    _, state = compiled.abstract_state(SETTINGS, TINY, reads)
    embedding = state.frozen["teacher"]["embed"]["embedding"]
    assert (embedding.shape, embedding.dtype) == ((64, 32), jnp.bfloat16)
    assert "teacher" not in compiled.abstract_state(SETTINGS, TINY)[1].frozen


SMOLLM3 = dataclasses.replace(TINY, no_rope=(1,))
# heads wider than width / num_heads
GEMMA2, GEMMA3 = (
    dataclasses.replace(shape, num_kv_heads=1, head_dim=8) for shape in (toys.GEMMA2, toys.GEMMA3)
)


@pytest.mark.parametrize("shape", [SMOLLM3, GEMMA2, GEMMA3], ids=["smollm3", "gemma2", "gemma3"])
def test_a_plan_counts_the_parameters_that_the_model_has(shape):
    """The state is the parameters, Adam's two moments and the reference, and less than 1 KiB of
    counters. All matrices but the value head's are in products, the embedding as the output layer.
    """
    mesh = sharding.make_mesh("data=1", jax.devices()[:1])
    _, state = compiled.abstract_state(SETTINGS, shape)
    params = jax.jit(models.make(shape).init)(jax.random.key(0))
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    assert compiled.state_bytes(state.params, mesh) == size
    assert 0 < compiled.state_bytes(state, mesh) - 4 * size < 1024
    matrices = [x.size for x in jax.tree.leaves({**params, "value": {}}) if x.ndim == 2]
    assert sum(phases.matrix_parameters(shape)) == sum(matrices)


@pytest.mark.ci
@pytest.mark.parametrize("name", [pytest.param("self", marks=pytest.mark.slow), "other"])
def test_a_plan_with_a_teacher(name):
    settings = dataclasses.replace(SETTINGS, mesh="data=8", teacher=name, distil="forward")
    shape = None if name == "self" else TINY
    found = compiled.compile_plan(settings, TINY, jax.devices(), teacher=shape)
    plain = compiled.compile_plan(dataclasses.replace(SETTINGS, mesh="data=8"), TINY, jax.devices())
    params = compiled.abstract_state(SETTINGS, TINY)[1].params
    # all its weights; a value head, which nobody asks, is dropped
    more = sum(
        4 * x.size for name in params.keys() - {"value"} for x in jax.tree.leaves(params[name])
    )
    assert found.arguments - plain.arguments == (0 if name == "self" else more)


@pytest.mark.ci
@pytest.mark.parametrize(("mesh", "scan"), [("data=8", False), ("fsdp=8", True)])
def test_a_plan_for_local_devices(mesh, scan):
    """The whole step as one program; each minibatch's gradients are summed up, each token asks
    whether all rows have ended. Stop texts need no tokenizer.
    """
    settings = dataclasses.replace(SETTINGS, mesh=mesh, scan_layers=scan, stop=("Q:",))
    found = compiled.compile_plan(settings, TINY, jax.devices())
    assert found.devices == 8 and found.temporaries > 0 and found.refused == ""
    assert found.inside == ("generate", "reference", "update")
    assert found.aliased > 0  # the state is donated
    assert found.arguments >= compiled.state_bytes(
        compiled.abstract_state(settings, TINY)[1], sharding.make_mesh(mesh)
    )
    decode = [x for x in found.collectives if x.decoding]
    assert decode and all(
        x.loops[0] == Loop("decode", 7, False) for x in decode
    )  # the first of 8 tokens comes from the prompt
    if mesh == "data=8":
        assert all(x.size <= 4 for x in decode)
    sums = [
        x
        for x in found.collectives
        if x.kind == "all-reduce" and x.phase == "update" and x.size >= 64 * 16 * 4
    ]
    known = {"minibatches", "chunks", "layers", "Transformer.through"}
    assert sums and {loop.name for x in sums for loop in x.loops} <= known
    text = plan.report_text(settings, TINY, None, found)
    assert text.startswith(
        f"one program, with generate, reference, update, for 8 devices (mesh {mesh})"
    )
    assert "the decode loop sends" in text and "not known:" in text


@pytest.mark.ci
def test_a_plan_of_a_speech_network(monkeypatch):
    """Its step takes recordings of 6 frames of 5 numbers, and their lengths, as well."""

    def too_large(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: traced and lowered, that is enough")

    speech = network(
        "gru", vocab_size=64, width=16, num_layers=1, context_length=6, context_width=5
    )
    text = network("gru", vocab_size=64, width=16, num_layers=1)
    sizes = [
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(prompts))
        for prompts in (compiled.abstract_prompts(SETTINGS, shape) for shape in (speech, text))
    ]
    assert sizes[0] - sizes[1] == 32 * (6 * 5 + 1) * 4
    monkeypatch.setattr(jax.stages.Lowered, "compile", too_large)
    assert compiled.compile_plan(SETTINGS, speech, jax.devices()[:1]).refused


@needs_compiler
def test_warnings_of_the_compiler_are_read(monkeypatch):
    """It must gather a whole tensor where rows become columns of another mesh axis: said on stderr,
    and counted.
    """
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = sharding.make_mesh("data=2,fsdp=4", chips.topology("v5e:2x4")[1])
    put = lambda x, *axes: jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, PartitionSpec(*axes))
    )
    turn = lambda x: jnp.cos(
        put(put(jnp.sin(x), "data", None, "fsdp") * 2, None, ("fsdp", "data"), None)
    )
    with chips.capture_stderr() as said:
        jax.jit(turn).lower(jax.ShapeDtypeStruct((8, 16, 8), jnp.float32)).compile()
    assert len(program.rematerialisations("".join(said))) == 1


@needs_compiler
@pytest.mark.slow
def test_frozen_weights_stay_in_8_bits_on_a_tpu():
    """The plan's arguments have a byte less for each of the blocks' weights, 2 · (4 · 512² + 3 ·
    512 · 1536), but for 4 bytes a scale; and no converted copy is among the temporaries.
    """
    shape = shapes.llama(
        vocab_size=64, width=512, num_layers=2, num_heads=4, num_kv_heads=4, max_length=64
    )
    settings = dataclasses.replace(
        SETTINGS, lora=2, dtype="bfloat16", scan_layers=True, value_loss="none", minibatches=1
    )
    _, devices = chips.topology("v5e:1x1")
    same, small = (
        compiled.compile_plan(dataclasses.replace(settings, base_dtype=x), shape, devices)
        for x in ("same", "int8")
    )
    saved = 2 * (4 * 512**2 + 3 * 512 * 1536) - 4 * 2 * (5 * 512 + 2 * 1536)
    assert same.arguments - small.arguments == pytest.approx(saved, rel=0.02)
    assert small.temporaries <= same.temporaries
