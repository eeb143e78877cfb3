import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
import worlds

from jaxppo import parallel
from jaxppo.types import TrainState


def trivial(state: TrainState, prompts):
    """A step that compiles at once."""
    used = jax.tree.leaves(state.frozen)[0].sum() + prompts.tokens.sum()
    params = jax.tree.map(lambda x: x + 1, state.params)
    return state.replace(step=state.step + 1, params=params), {"used": used}


@pytest.fixture(
    scope="module",
    params=[
        "alone",
        *(pytest.param(x, marks=pytest.mark.ci) for x in ("in groups", "in episodes")),
    ],
)
def a_step(request, toy_step) -> toys.Step:
    """The step of rows alone; of groups whose packed rows are worked off in parts; of groups whose
    episodes have up to three turns. The number of parts or turns is known only when it runs.
    """
    if request.param == "alone":
        return toy_step
    grouped = {"group_size": 4, "advantage": "group"}
    if request.param == "in groups":
        return toys.Step(**grouped, tokens_per_microbatch=1)
    episodes = {"environment": worlds.counting(), "response_length": worlds.LENGTH}
    return toys.Step(**grouped, **episodes)


@pytest.mark.ci
def test_k_steps_are_k_executions_of_one_program(a_step):
    """Traced and compiled once, with nothing going to or coming from the host between. The old
    state is gone.
    """
    size = a_step.settings.group_size
    batches = [jax.device_put(toys.grouped(size, seed=k)) for k in range(4)]
    state, _ = a_step(a_step.state(), batches[0])
    rows, old = [], []
    with jax.transfer_guard("disallow"):
        for batch in batches[1:]:
            old += jax.tree.leaves(state.replace(frozen=None))
            state, metrics = a_step(state, batch)
            rows.append(metrics)
    assert a_step.compiled.traces == 1
    assert a_step.compiled.program._cache_size() == 1
    assert all(x.is_deleted() for x in old)
    assert int(state.step) == 4
    assert len({float(metrics["loss"]) for metrics in rows}) == 3


def test_the_guard_would_have_seen_a_transfer():
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="[Dd]isallowed"):
        jnp.ones(3) + 1.5 * jax.device_put([1.0, 2.0, 3.0])[0]


def test_the_old_state_is_gone_and_frozen_stays(toy_step):
    old = toy_step.state()
    new, _ = toy_step(old, toys.prompts())
    for path, x in jax.tree_util.tree_leaves_with_path(old.replace(frozen=None)):
        assert x.is_deleted(), jax.tree_util.keystr(path)
    assert not any(x.is_deleted() for x in jax.tree.leaves(old.frozen))
    assert new.frozen is old.frozen
    assert not any(x.is_deleted() for x in jax.tree.leaves(new))


def test_another_shape_is_traced_again(llama):
    step = parallel.compile_step(trivial)
    state, _ = step(toys.state(llama), toys.prompts(8))
    state, _ = step(state, toys.prompts(8, seed=1))
    assert step.traces == 1
    step(state, toys.prompts(16))
    assert step.traces == 2


def test_frozen_is_an_input_and_no_constant(llama):
    """Another reward model in the same program."""
    step = parallel.compile_step(trivial)
    results = []
    for value in (1.0, 2.0):
        frozen = {"reward": jnp.full((3,), value)}
        _, metrics = step(toys.state(llama).replace(frozen=frozen), toys.prompts())
        results.append(float(metrics["used"]))
    assert step.traces == 1
    assert results[1] - results[0] == 3


def test_lower_tells_the_cost(llama):
    step = parallel.compile_step(trivial)
    compiled = step.lower(toys.state(llama), toys.prompts()).compile()
    assert compiled.memory_analysis().argument_size_in_bytes > 0


def test_a_mesh_is_taken_where_one_is_given(monkeypatch):
    """auto with a mesh is the mesh, as out-of-memory advice has it; never pmap without a word."""
    made = []
    monkeypatch.setattr(
        parallel, "MeshStep", lambda step, mesh, leading: made.append(dict(mesh.shape))
    )
    parallel.compile_for_mode(
        lambda axis_name: axis_name, mode="auto", mesh="fsdp=2", devices=jax.devices()[:2]
    )
    assert made[0]["fsdp"] == 2 and parallel.row_shards("auto", "fsdp=2,tensor=2") == 2


def test_over_a_mesh_several_steps_are_cut_along_their_rows():
    """Prompts of a dispatch are [steps, rows ...]."""
    make = lambda axis_name: trivial
    one, several = (
        parallel.compile_for_mode(make, mode="mesh", mesh="data=8", leading=n) for n in (0, 1)
    )
    prompts = jax.tree.map(lambda x: np.stack([x, x]), toys.prompts())
    shapes = lambda x: {shard.data.shape for shard in x.addressable_shards}
    assert shapes(several.put(prompts).tokens) == {(2, 1, 4)}
    assert shapes(one.put(toys.prompts()).tokens) == {(1, 4)}


def test_under_pmap_what_stands_twice_is_placed_once(llama):
    """A critic's base is the policy's; and outside of the step the frozen arrays are those that
    were loaded.
    """
    step = parallel.PmapStep(trivial, devices=jax.devices()[:2])
    base = {"w": jnp.ones(3)}
    state = toys.state(llama).replace(frozen={"base": base, "critic": base})
    placed = step.place(state)
    assert placed.frozen["base"]["w"] is placed.frozen["critic"]["w"] and placed.frozen["base"][
        "w"
    ].shape == (2, 3)
    whole = step.unreplicate(placed)
    assert whole.frozen is state.frozen
    toys.assert_same(whole.params, state.params)
