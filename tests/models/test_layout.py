import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxppo.models import layout
from jaxppo.parallel import sharding


def placed(mesh, shape, *names):
    def program(x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return layout.constrain(x, *names)

    whole = jax.device_put(jnp.zeros(shape), NamedSharding(mesh, PartitionSpec()))
    return jax.jit(program)(whole).sharding.spec


@pytest.mark.parametrize(
    ("shape", "names", "spec"),
    [
        ((8, 4, 2), ("rows", "heads", None), (("data", "fsdp"), "tensor")),
        # 3 heads over 2 devices: whole on both
        ((8, 3, 2), ("rows", "heads", None), (("data", "fsdp"),)),
        ((6, 2), ("rows", "mlp"), (None, "tensor")),
        ((3, 8), (None, "rows"), (None, ("data", "fsdp"))),
    ],
)
def test_constrain_shards_activations(shape, names, spec):
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    found = [*placed(mesh, shape, *names), *[None] * len(shape)][: len(shape)]
    assert PartitionSpec(*found) == PartitionSpec(*spec, *[None] * (len(shape) - len(spec)))


def test_row_shards():
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert layout.row_shards() == layout.row_shards(8) == 4
        assert layout.row_shards(6) == 1  # they stay whole
    assert layout.row_shards() == 1


@pytest.mark.parametrize(("mesh", "waits"), [("fsdp=8", True), ("data=4,tensor=2", False)])
def test_weights_wait_for_the_input_only_where_they_are_gathered(mesh, waits):
    def program(x, w):
        with jax.sharding.use_abstract_mesh(sharding.make_mesh(mesh).abstract_mesh):
            x, w = layout.gather_after(x, w)
            return x @ w

    text = str(jax.make_jaxpr(program)(jnp.zeros((8, 4)), jnp.zeros((4, 2))))
    assert ("optimization_barrier" in text) == waits


def test_without_a_mesh_constrain_does_nothing():
    x = jnp.zeros((3, 5))
    assert layout.constrain(x, "rows", "heads") is x
    inside = jax.pmap(lambda x: layout.constrain(x, "rows"), axis_name="devices")(jnp.zeros((8, 3)))
    assert inside.shape == (8, 3)
