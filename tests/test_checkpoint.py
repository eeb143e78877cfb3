import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo import ppo
from jaxppo.checkpoint import Checkpoints, load_once, save_once
from jaxppo.config import Config, UserError

FROZEN = {"base": {"w": jnp.zeros((2, 2))}, "reference": None, "reward": {"w": jnp.ones(3)}}


def state(step=0, seed=0, shape=(3, 4), config=None):
    """A small state in which no two numbers are alike."""
    rng = np.random.default_rng([seed, step])
    params = {"a": {"kernel": jnp.asarray(rng.standard_normal(shape), jnp.float32)}, "b": jnp.arange(5, dtype=jnp.int32)}
    out = ppo.init_state(config or Config(), params, FROZEN, jax.random.fold_in(jax.random.key(seed), step))
    return out.replace(step=jnp.asarray(step, jnp.int32), cursor=jnp.asarray(8 * step, jnp.int32))


@pytest.fixture
def checkpoints(tmp_path):
    out = Checkpoints(tmp_path / "checkpoints")
    yield out
    out.close()


def test_the_whole_state_comes_back_bit_for_bit(tmp_path, checkpoints):
    saved = state(3)
    checkpoints.save(saved, score=0.5)
    checkpoints.close()
    again = Checkpoints(tmp_path / "checkpoints")
    like = state(seed=9)
    restored = again.restore(like)
    again.close()
    toys.assert_same(restored, saved)
    assert restored.key.dtype == saved.key.dtype  # still a typed key
    assert jax.random.uniform(restored.key) == jax.random.uniform(saved.key)
    assert restored.frozen is like.frozen  # not in the checkpoint of a step


def test_the_newest_and_the_best_are_kept(checkpoints):
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.2), (4, 0.3)):
        checkpoints.save(state(step), score=score)
    checkpoints.manager.wait_until_finished()
    assert checkpoints.steps() == [2, 4]
    toys.assert_same(checkpoints.restore(state(seed=9)).params, state(4).params)
    toys.assert_same(checkpoints.restore(state(seed=9), step=2).params, state(2).params)


def test_the_saved_state_may_be_given_away_at_once(checkpoints):
    """The next step overwrites its buffers while they are still being written."""
    given, same = (state(1, shape=(1000, 1000)) for _ in range(2))
    overwrite = jax.jit(lambda params: jax.tree.map(lambda x: x * 0, params), donate_argnums=0)
    checkpoints.save(given, score=0.0)
    jax.block_until_ready(overwrite(given.params))
    assert given.params["b"].is_deleted()
    checkpoints.manager.wait_until_finished()
    toys.assert_same(checkpoints.restore(state(seed=9, shape=(1000, 1000))), same)


def test_nothing_to_restore(checkpoints):
    with pytest.raises(UserError, match="no checkpoint in .*--resume"):
        checkpoints.restore(state())


def test_a_checkpoint_that_was_never_finished_is_none(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    checkpoints = Checkpoints(folder)
    assert checkpoints.steps() == []
    checkpoints.close()


@pytest.mark.parametrize(
    ("like", "words"),
    [
        (lambda: state(shape=(3, 5)), r"params.a.kernel is float32\[3, 4\] there and float32\[3, 5\] here"),
        (lambda: state().replace(params={"a": {"kernel": jnp.zeros((3, 4))}}), r"params.b is int32\[5\] there and missing here"),
        (
            lambda: state().replace(params=state().params | {"c": jnp.zeros(2)}),
            r"params.c is missing there and float32\[2\] here",
        ),
        # the constant rate keeps no count
        (lambda: state(config=Config(lr_schedule="constant")), r"opt_state.2.count is int32\[\] there and missing here"),
        (lambda: state().replace(step=jnp.float32(0)), r"step is int32\[\] there and float32\[\] here"),
    ],
    ids=["shape", "missing leaf", "new leaf", "optimizer", "dtype"],
)
def test_a_checkpoint_of_another_configuration(checkpoints, like, words):
    checkpoints.save(state(1), score=0.0)
    checkpoints.manager.wait_until_finished()
    with pytest.raises(UserError, match="the checkpoint of step 1 does not fit this configuration: .*" + words):
        checkpoints.restore(like())


def test_a_damaged_checkpoint(tmp_path, checkpoints):
    checkpoints.save(state(1), score=0.0)
    checkpoints.close()
    for path in (tmp_path / "checkpoints" / "1" / "default").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    again = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="the checkpoint of step 1 cannot be read"):
        again.restore(state())
    again.close()


def test_save_once(tmp_path):
    tree = {"net": {"w": jnp.arange(6.0).reshape(2, 3)}, "n": jnp.asarray(3, jnp.int32)}
    save_once(tmp_path / "reward", tree)
    toys.assert_same(load_once(tmp_path / "reward", jax.tree.map(jnp.zeros_like, tree)), tree)
    with pytest.raises(UserError, match="missing"):
        load_once(tmp_path / "nothing", tree)
