import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.sharding import PartitionSpec

from jaxppo import models, ppo
from jaxppo.config import Config
from jaxppo.errors import UserError
from jaxppo.models import layout, shapes
from jaxppo.parallel import sharding


def specs(mesh, tree):
    found = jax.tree_util.tree_leaves_with_path(sharding.state_shardings(tree, mesh))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.spec for path, x in found}


def test_parameters_and_their_moments_lie_alike():
    model = models.make(
        shapes.llama(
            vocab_size=16, width=16, num_layers=1, num_heads=4, num_kv_heads=4, max_length=16
        )
    )
    params = jax.eval_shape(model.init, jax.random.key(0))
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    state = jax.eval_shape(
        lambda p: ppo.init_state(Config(), p, {"base": {}}, jax.random.key(0)), params
    )
    found = specs(mesh, state)
    want = {
        "embed/embedding": ("tensor", "fsdp"),
        "layers_0/attention/q/kernel": ("fsdp", "tensor"),
        "layers_0/attention/o/kernel": ("tensor", "fsdp"),
        "layers_0/mlp/down/kernel": ("tensor", "fsdp"),
    }
    for name, axes in want.items():
        alike = [spec for path, spec in found.items() if path.endswith(name)]
        assert len(alike) == 3  # the parameter and Adam's two moments
        assert set(alike) == {PartitionSpec(*axes)}
    assert found["key"] == PartitionSpec()


@pytest.mark.parametrize("scan", [False, True])
def test_adapters_lie_as_their_kernel(scan):
    """A [in, rank] as the kernel's rows, B [rank, out] as its columns; the rank is whole."""
    shape = shapes.llama(
        vocab_size=16, width=16, num_layers=4, num_heads=4, num_kv_heads=4, max_length=16
    )
    params = jax.eval_shape(
        models.make(shape, lora=2, lora_on="all", scan=scan).init, jax.random.key(0)
    )
    found = specs(sharding.make_mesh("fsdp=4,tensor=2"), params)
    checked = 0
    for name, spec in found.items():
        if name.endswith("/lora_a"):
            place, lead = name.removesuffix("lora_a"), [None] * scan
            *_, rows, columns = found[f"{place}kernel"]
            assert spec == PartitionSpec(*lead, rows, None) and rows
            assert found[f"{place}lora_b"] == PartitionSpec(*lead, None, columns) and columns
            checked += 1
    assert checked == (7 if scan else 4 * 7)


def test_scanned_layers_lie_as_each_would():
    """One array for all layers: its first dimension is never cut for a name's sake."""
    shape = shapes.llama(
        vocab_size=16, width=16, num_layers=4, num_heads=4, num_kv_heads=4, max_length=16
    )
    model = models.make(shape, scan=True)
    params = jax.eval_shape(model.init, jax.random.key(0))
    found = specs(sharding.make_mesh("fsdp=4,tensor=2"), params)
    assert params["layers"]["attention"]["q"]["kernel"].shape == (4, 16, 16)
    assert found["layers/attention/q/kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert found["layers/mlp/down/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert found["layers/mlp_norm/scale"] == PartitionSpec(None, None)


@pytest.mark.parametrize("mesh", ["fsdp=8", "tensor=8", "fsdp=2,tensor=4"])
def test_nothing_large_stays_whole(mesh):
    """Sizes that the rules' own axes do not divide: 49152 x 577 of an odd model, a long vector,
    adapters.
    """
    built = sharding.make_mesh(mesh)
    tree = {
        "embed": {"embedding": jnp.zeros((4096, 577))},
        "critic": {"embed": {"embedding": jnp.zeros((4095, 576))}},
        "head": {"kernel": jnp.zeros((577, 4096))},
        "other": {"bias": jnp.zeros((2**19,))},
        "q": {"lora_a": jnp.zeros((2**16, 8))},
    }
    for (path, x), where in zip(
        jax.tree_util.tree_leaves_with_path(tree),
        jax.tree.leaves(sharding.state_shardings(tree, built)),
        strict=True,
    ):
        assert where.shard_shape(x.shape) != x.shape, jax.tree_util.keystr(path)


def test_small_and_odd_arrays_stay_whole():
    built = sharding.make_mesh("fsdp=8")
    assert specs(built, {"norm": {"scale": jnp.zeros(7)}, "x": jnp.zeros((3, 5))}) == {
        "norm/scale": PartitionSpec(None),
        "x": PartitionSpec(None, None),
    }


def test_arrays_are_put_where_they_are_to_lie_and_stay_there():
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    tree = {
        "q": {"kernel": np.arange(64.0, dtype=np.float32).reshape(8, 8)},
        "norm": {"scale": jnp.ones(3)},
    }
    placed = sharding.place(tree, mesh)
    assert placed["q"]["kernel"].sharding.spec == PartitionSpec("fsdp", "tensor")
    assert placed["q"]["kernel"].addressable_shards[0].data.shape == (2, 4)
    np.testing.assert_array_equal(placed["q"]["kernel"], tree["q"]["kernel"])
    again = sharding.place(placed, mesh)
    assert (
        again["q"]["kernel"] is placed["q"]["kernel"]
        and again["norm"]["scale"] is placed["norm"]["scale"]
    )
    other = sharding.place(tree, mesh)
    places = lambda x: {shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards}
    for one, two in zip(jax.tree.leaves(placed), jax.tree.leaves(other), strict=True):
        assert len(places(one)) == 8 and not places(one) & places(
            two
        )  # a memory of its own each: one may be given away
    assert sharding.mesh_of(placed) == mesh
    assert sharding.mesh_of(tree) is None
    assert (
        sharding.mesh_of({"x": jnp.zeros(3), "of pmap": jax.pmap(lambda x: x)(jnp.zeros(8))})
        is None
    )


def test_rows_lie_beside_the_parameters():
    """Cut over the mesh where they divide, whole where they do not; and the model knows of the
    mesh. On one device nothing.
    """
    params = sharding.place(
        {"q": {"kernel": jnp.zeros((8, 8))}}, sharding.make_mesh("data=2,fsdp=2,tensor=2")
    )
    rows = {"eight": np.arange(16).reshape(8, 2), "three": np.arange(3), "number": np.zeros(())}
    with sharding.rows_on_mesh(params, rows) as found:
        assert found["eight"].addressable_shards[0].data.shape == (2, 2)  # over data and fsdp
        assert found["three"].is_fully_replicated and found["number"].is_fully_replicated
        assert layout.row_shards() == 4
    assert layout.row_shards() == 1
    with sharding.rows_on_mesh({"q": jnp.zeros(2)}, rows) as found:
        assert found is rows and layout.row_shards() == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data=3", ["data 3 x fsdp 1 x tensor 1 = 3 devices", "there are 8"]),
        ("rows=8", ["'rows=8'", "data, fsdp, tensor"]),
        ("data=0", ["'data=0'"]),
        ("data", ["'data'"]),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(text, words):
    with pytest.raises(UserError) as caught:
        sharding.make_mesh(text)
    for word in words:
        assert word in str(caught.value)


def test_the_batch_is_cut_over_data_and_fsdp():
    assert sharding.row_sharding(sharding.make_mesh("data=2,fsdp=4")).spec == PartitionSpec(
        ("data", "fsdp")
    )
    assert sharding.row_sharding(sharding.make_mesh("data=8"), leading=1).spec == PartitionSpec(
        None, ("data", "fsdp")
    )


def test_toys_fit_eight_devices():
    assert len(jax.devices()) == 8 and toys.SETTINGS.batch_size % 8 == 0
