import random
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toys

from jaxppo import ppo
from jaxppo.config import Config
from jaxppo.errors import RunError, UserError
from jaxppo.run import checkpoint, manifest
from jaxppo.run.checkpoint import Checkpoints, load_tree, save_tree

FROZEN = {"base": {"w": jnp.zeros((2, 2))}, "reference": None, "reward": {"w": jnp.ones(3)}}


def state(step=0, seed=0, shape=(3, 4), config=None):
    """A small state in which no two numbers are alike."""
    rng = np.random.default_rng([seed, step])
    params = {
        "a": {"kernel": jnp.asarray(rng.standard_normal(shape), jnp.float32)},
        "b": jnp.arange(5, dtype=jnp.int32),
    }
    out = ppo.init_state(
        config or Config(), params, FROZEN, jax.random.fold_in(jax.random.key(seed), step)
    )
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
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3, 4]  # the newest two, to fall back to, and the best
    toys.assert_same(checkpoints.restore(state(seed=9)).params, state(4).params)
    toys.assert_same(checkpoints.restore(state(seed=9), step=2).params, state(2).params)
    assert checkpoints.best_step() == 2
    checkpoints.scores = dict.fromkeys(checkpoints.scores)
    assert checkpoints.best_step() is None


def test_the_saved_state_may_be_given_away_at_once(checkpoints):
    """The next step overwrites its buffers while they are still being written."""
    given, same = (state(1, shape=(1000, 1000)) for _ in range(2))
    overwrite = jax.jit(lambda params: jax.tree.map(lambda x: x * 0, params), donate_argnums=0)
    checkpoints.save(given, score=0.0)
    jax.block_until_ready(overwrite(given.params))
    assert given.params["b"].is_deleted()
    checkpoints.wait()
    toys.assert_same(checkpoints.restore(state(seed=9, shape=(1000, 1000))), same)


def test_nothing_to_restore(checkpoints):
    with pytest.raises(UserError, match="no checkpoint in .*--resume"):
        checkpoints.restore(state())


def test_what_was_never_finished_is_removed(tmp_path):
    """Killed while Orbax wrote, between the data and the manifest, and between the manifest and its
    name.
    """
    folder = tmp_path / "checkpoints"
    first = Checkpoints(folder)
    first.save(state(5), score=0.0)
    first.close()
    for name in (
        "7.orbax-checkpoint-tmp",
        "8",
        "9/state.orbax-checkpoint-tmp",
        "10/state",
        "4.damaged",
        "notes",
    ):
        (folder / name).mkdir(parents=True)
    (folder / "10" / "manifest.json.tmp").touch()
    assert Checkpoints(folder, write=False).steps() == [5]
    assert (folder / "8").exists()  # a reader removes nothing
    checkpoints = Checkpoints(folder)
    assert checkpoints.steps() == [5]
    assert sorted(path.name for path in folder.iterdir()) == ["4.damaged", "5", "notes"]


@pytest.mark.parametrize(
    ("like", "words"),
    [
        (
            lambda: state(shape=(3, 5)),
            r"params.a.kernel is float32\[3, 4\] there and float32\[3, 5\] here",
        ),
        (
            lambda: state().replace(params={"a": {"kernel": jnp.zeros((3, 4))}}),
            r"params.b is int32\[5\] there and missing here",
        ),
        (
            lambda: state().replace(params=state().params | {"c": jnp.zeros(2)}),
            r"params.c is missing there and float32\[2\] here",
        ),
        # the constant rate keeps no count
        (
            lambda: state(config=Config(lr_schedule="constant")),
            r"opt_state.2.count is int32\[\] there and missing here",
        ),
        (
            lambda: state().replace(step=jnp.float32(0)),
            r"step is int32\[\] there and float32\[\] here",
        ),
    ],
    ids=["shape", "missing leaf", "new leaf", "optimizer", "dtype"],
)
def test_a_checkpoint_of_another_configuration(checkpoints, like, words):
    checkpoints.save(state(1), score=0.0)
    checkpoints.wait()
    with pytest.raises(
        UserError, match="the checkpoint of step 1 does not fit this configuration: .*" + words
    ):
        checkpoints.restore(like())
    assert checkpoints.steps() == [1]  # it may fit another


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def three(folder):
    """Checkpoints of steps 1, 2 and 3, all kept."""
    out = Checkpoints(folder, keep_every=1)
    for step in (1, 2, 3):
        out.save(state(step), score=0.0)
    out.close()
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return three(tmp_path_factory.mktemp("sound") / "checkpoints")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(b""), "has 0 bytes, not"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, not"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(bytes(len(path.read_bytes()))), "SHA-256 differs"),
    ],
    ids=["empty", "short", "missing", "zeros"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    sound, tmp_path, capsys, damage, words
):
    folder = shutil.copytree(sound, tmp_path / "c")
    damage(max(files(folder / "3" / "state"), key=lambda path: path.stat().st_size))
    checkpoints = Checkpoints(folder)
    toys.assert_same(checkpoints.restore(state(seed=9)).params, state(2).params)
    said = capsys.readouterr().err
    assert said.startswith("warning: the checkpoint of step 3 is damaged: state/") and words in said
    assert checkpoints.steps() == [1, 2]
    assert (folder / "3.damaged").exists()


def test_forty_flipped_bits_are_all_seen(sound, tmp_path, capsys):
    """Over all files of a checkpoint, the manifest among them; Orbax alone reads most of them
    without a word.
    """
    rng = random.Random(0)
    whole = files(sound / "3")
    chosen = whole * (40 // len(whole)) + rng.sample(whole, 40 % len(whole))
    assert len(chosen) == 40
    for path in chosen:
        good = path.read_bytes()
        bad = bytearray(good or b"x")
        place = rng.randrange(8 * len(bad))
        bad[place // 8] ^= 1 << place % 8
        path.write_bytes(bad)
        reader = Checkpoints(sound, write=False)
        toys.assert_same(reader.restore(state(seed=9)).params, state(2).params)
        assert "the checkpoint of step 3 is damaged" in capsys.readouterr().err
        path.write_bytes(good)
    toys.assert_same(Checkpoints(sound, write=False).restore(state(seed=9)).params, state(3).params)


def test_orbax_alone_reads_a_flipped_bit(tmp_path):
    """Why there is a manifest."""
    save_tree(tmp_path / "x", {"w": jnp.arange(1000.0)})
    path = max(files(tmp_path / "x" / "state"), key=lambda path: path.stat().st_size)
    silent = 0
    for place in range(0, path.stat().st_size, 97):
        good = path.read_bytes()
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        try:
            with checkpoint.checkpointer() as reader:
                target = ocp.args.StandardRestore({"w": np.empty(1000, np.float32)})
                silent += bool(
                    (
                        reader.restore(tmp_path / "x" / "state", args=target)["w"]
                        != np.arange(1000.0)
                    ).any()
                )
        except Exception:
            pass
        path.write_bytes(good)
    assert silent > 0
    with pytest.raises(UserError, match="is damaged"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        load_tree(tmp_path / "x", {"w": jnp.zeros(1000)})


def test_with_none_left_the_run_does_not_start_again(sound, tmp_path):
    folder = shutil.copytree(sound, tmp_path / "c")
    for step in (1, 2, 3):
        files(folder / str(step) / "state")[0].unlink()
    with pytest.raises(UserError, match="step 1 is damaged: .*no checkpoint of .* can be used"):
        Checkpoints(folder).restore(state())


def test_every_nth_stays(checkpoints):
    checkpoints.keep_every = 2
    for step in range(1, 8):
        checkpoints.save(state(step), score=None)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 6, 7]  # the newest two, and the even ones


@pytest.mark.parametrize("score", [float("nan"), float("inf"), None])
def test_a_score_that_is_no_number_is_never_the_best(checkpoints, score):
    for step, value in ((1, 0.1), (2, score), (3, 0.0), (4, 0.0)):
        checkpoints.save(state(step), score=value)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3, 4]
    assert Checkpoints(checkpoints.folder, write=False).scores == {1: 0.1, 3: 0.0, 4: 0.0}


def test_of_equal_scores_the_later_is_the_best(checkpoints):
    for step, score in ((1, 0.5), (2, 0.5), (3, 0.1)):
        checkpoints.save(state(step), score=score)
    checkpoints.wait()
    assert checkpoints.best_step() == 2
    checkpoints.set_score(3, float("nan"))  # of an evaluation that was made up
    assert checkpoints.best_step() == 2 and checkpoints.scores[3] is None


def test_a_save_that_fails_is_told_and_the_third_ends_the_run(checkpoints, monkeypatch):
    checkpoints.save(state(1), score=0.0)
    checkpoints.wait()
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    for step in (2, 3):
        checkpoints.save(state(step), score=0.0)
        checkpoints.wait()
        told = checkpoints.pop_error()
        assert told.startswith(
            f"the checkpoint of step {step} could not be written (0 MB are needed, 0 MB are free)"
        )
        assert checkpoints.pop_error() == ""  # once
    checkpoints.save(state(4), score=0.0)
    checkpoints.wait()
    with pytest.raises(
        RunError, match="3 times in a row now; step 1 is safe; free space in"
    ) as caught:
        checkpoints.pop_error()
    assert caught.value.code == 1
    assert checkpoints.steps() == [1] and [path.name for path in checkpoints.folder.iterdir()] == [
        "1"
    ]


def test_after_three_failed_saves_there_is_no_fourth(checkpoints, monkeypatch):
    """The third may fail after the loop asked for news, and before its next save."""
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    for step in (1, 2, 3, 4):
        checkpoints.save(state(step), score=0.0)
    checkpoints.wait()
    with pytest.raises(RunError, match="of step 3 could not be written .*, 3 times in a row now"):
        checkpoints.pop_error()


def test_a_folder_that_was_moved_is_not_made_anew(checkpoints):
    """Orbax would make it again, and the run would go on without the checkpoints that it had."""
    checkpoints.save(state(1), score=None)
    checkpoints.wait()
    checkpoints.folder.rename(checkpoints.folder.with_name("moved"))
    checkpoints.folder.mkdir()
    checkpoints.save(state(2), score=None)
    checkpoints.wait()
    assert "that of step 1 is gone" in checkpoints.pop_error()


def test_one_good_save_starts_the_count_again(checkpoints, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_FAILURES", 2)
    for step in (1, 2, 3, 4):
        with monkeypatch.context() as patch:
            if step % 2:
                patch.setattr(checkpoint.manifest, "seal", lambda *_: 1 / 0)
            checkpoints.save(state(step), score=0.0)
            checkpoints.wait()
        assert bool(checkpoints.pop_error()) == bool(step % 2)
    assert checkpoints.steps() == [2, 4]


def test_a_reader_writes_nothing(tmp_path):
    reader = Checkpoints(tmp_path / "none", write=False)
    reader.save(state(1), score=0.0)
    reader.close()
    assert not (tmp_path / "none").exists()


def test_the_manifest_says_what_it_is(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", about={"config": "abc", "versions": {"jax": "1"}})
    checkpoints.save(state(3), score=0.5)
    checkpoints.close()
    record = manifest.read(tmp_path / "c" / "3")
    assert (record["step"], record["score"], record["config"], record["versions"]) == (
        3,
        0.5,
        "abc",
        {"jax": "1"},
    )
    assert (
        record["leaves"]["params.a.kernel"] == "float32[3, 4]"
        and record["leaves"]["key"] == "uint32[2]"
    )


def test_save_and_load_a_tree(tmp_path):
    tree = {"net": {"w": jnp.arange(6.0).reshape(2, 3)}, "n": jnp.asarray(3, jnp.int32)}
    save_tree(tmp_path / "reward", tree)
    like = jax.tree.map(jnp.zeros_like, tree)
    toys.assert_same(load_tree(tmp_path / "reward", like), tree)
    with pytest.raises(UserError, match="missing"):
        load_tree(tmp_path / "nothing", tree)
    with pytest.raises(
        UserError, match=r"does not fit this configuration: n is int32\[\] there and missing here"
    ):
        load_tree(tmp_path / "reward", {"net": like["net"]})
    files(tmp_path / "reward" / "state")[0].write_bytes(b"other")
    with pytest.raises(
        UserError, match="reward is damaged: state/.*; remove it, and it is made again"
    ):
        load_tree(tmp_path / "reward", like)
