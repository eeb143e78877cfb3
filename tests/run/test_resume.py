import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import pytest
import toys
from runs import RUN

from jaxppo.errors import UserError
from jaxppo.run import manifest, resume
from jaxppo.run.checkpoint import Checkpoints
from jaxppo.run.settings import to_dict


@pytest.mark.parametrize(("schedule", "told"), [("linear", True), ("constant", False)])
def test_a_schedule_that_ends_elsewhere_is_told(tmp_path, capsys, schedule, told):
    config = replace(RUN, lr_schedule=schedule)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    kept: Any = SimpleNamespace(restore=lambda state: state, read_manifest=lambda: {})
    state: Any = SimpleNamespace(params={}, opt_state=())
    resume.restore_newest(replace(config, steps=8), kept, state, tmp_path)
    shown = capsys.readouterr().out
    assert "--steps 4 -> 8" in shown and ("the linear schedule now ends at step 8" in shown) == told


def test_settings_are_checked_once_something_is_saved(tmp_path):
    """Not those that the model decides, such as the end of text."""
    config = replace(RUN, runs=str(tmp_path), name="a", resume=True)
    resume.check_early(config)  # nothing is there yet
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text('{"seed": 7, "eos": 3}')
    resume.check_early(config)  # nothing is saved yet
    (tmp_path / "a" / "checkpoints" / "0").mkdir(parents=True)
    with pytest.raises(UserError, match="make it another run: --seed 7 -> 0; start one"):
        resume.check_early(config)
    resume.check_early(config, but=("seed",))
    resume.check_early(replace(config, resume=False))


def test_a_preset_that_has_changed_is_told(tmp_path):
    """VAPO got its likelihood term later: a run made before is continued without it, or not."""
    config = replace(RUN, runs=str(tmp_path), name="a", resume=True)
    (tmp_path / "a" / "checkpoints" / "0").mkdir(parents=True)
    (tmp_path / "a" / "config.json").write_text('{"steps": 4}')
    resume.check_early(config)
    with pytest.raises(UserError, match=r"--likelihood-coef 0.0 -> 0.1; start one"):
        resume.check_early(replace(config, likelihood_coef=0.1))


def test_what_was_loaded_is_given_up_for_what_is_restored(tmp_path):
    """Parameters and moments; what is frozen is the same array, in use."""
    (tmp_path / "config.json").write_text(json.dumps(to_dict(RUN)))
    toy = toys.llama()
    state = toys.state(toy)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state, score=None)
    checkpoints.wait()
    found = resume.restore_newest(RUN, checkpoints, state, tmp_path)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves((found, state.frozen)))


def test_weights_that_a_run_stands_on_may_not_change(tmp_path):
    """A checkpoint that was trained on meanwhile: adapters on another base are another policy."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"old")
    config = replace(RUN, tiny=False, model=str(base))
    checkpoints = Checkpoints(
        tmp_path / "checkpoints", about={"weights": resume.weight_hashes(config)}
    )
    (checkpoints.folder / "2").mkdir()
    manifest.seal(checkpoints.folder / "2", {**checkpoints.about, "step": 2})
    resume.check_weights(config, checkpoints)
    (base / "model.safetensors").write_bytes(b"new")
    with pytest.raises(
        UserError, match=f"--model {base} holds other weights than when this run began"
    ):
        resume.check_weights(config, checkpoints)
    resume.check_weights(config, checkpoints, ["teacher"])
    none = {"model": "", "reward_model": "", "teacher": ""}
    assert resume.weight_hashes(RUN) == none  # a tiny one is made anew
    assert resume.weight_hashes(replace(RUN, teacher="self")) == none
    other = resume.weight_hashes(replace(RUN, teacher=str(base)))
    assert other["teacher"] == resume.weight_hashes(config)["model"] != ""
    judge = tmp_path / "judge" / "checkpoints" / "3"
    judge.mkdir(parents=True)
    manifest.seal(judge, {"step": 3, "score": 0.5})
    first = resume.weight_hashes(replace(config, reward_model=str(tmp_path / "judge")))[
        "reward_model"
    ]
    teacher = resume.weight_hashes(replace(config, teacher=str(tmp_path / "judge")))["teacher"]
    assert teacher == first  # a run is known by its best checkpoint
    manifest.seal(judge, {"step": 3, "score": 0.6})
    assert (
        len(first) == 16
        and first
        != resume.weight_hashes(replace(config, reward_model=str(tmp_path / "judge")))[
            "reward_model"
        ]
    )


def test_data_may_change_only_by_permission(capsys):
    for stored, data in (
        ("", "bb"),  # nothing is saved yet, or a run of before data had a hash
        ("aa", "aa"),
        ("aa", ""),  # data of a user's own class
    ):
        resume.check_data(RUN, stored, data)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="the data are not those .*--data-changed ok"):
        resume.check_data(RUN, "aa", "bb")
    resume.check_data(replace(RUN, data_changed="ok"), "aa", "bb")
    assert "the data are not those that this run began with" in capsys.readouterr().out
