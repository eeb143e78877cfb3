import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from runs import SMALL, rows_without_times
from tokenizers import Tokenizer as Backend

from jaxppo import models, pretrained, train
from jaxppo.errors import UserError
from jaxppo.pretrained.tiny import tiny_model
from jaxppo.pretrained.tokenizer import Tokenizer


def short(prompt, response):
    return -float(len(response))


HINTED = [{"prompt": f"{i} + {i} =", "hint": f"It is {2 * i}. "} for i in range(8, 12)]
TAUGHT = {**SMALL, "algorithm": "distil", "group_size": 1, "minibatches": 1, "dtype": "float32"}
TAUGHT |= {"lr_schedule": "constant", "save_every": 1}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run that teaches itself, without a reward."""
    return train.policy(HINTED, teacher="self", runs=str(tmp_path_factory.mktemp("t")), **TAUGHT)


@pytest.mark.ci
def test_a_run_that_teaches_itself(taught, capsys):
    """Stopped after step 1 and resumed, it is the same."""
    metrics = taught.metrics
    assert (np.abs(metrics["teacher_kl"]) > 1e-4).all() and (metrics["reward"] == 0).all()
    found = []
    for changes in ({"steps": 1}, {"resume": True}):
        settings = {**TAUGHT, "name": "two", "runs": str(taught.folder.parent), **changes}
        found.append(train.policy(HINTED, teacher="self", **settings))
    assert rows_without_times(found[1].folder) == rows_without_times(taught.folder)
    said = capsys.readouterr().out
    assert "no reward: the policy learns from --teacher self alone" in said
    assert "there is nothing to learn from" not in said
    with pytest.raises(UserError, match="^resume=True with other settings .* teacher self -> "):
        train.policy(HINTED, short, **{**settings, "resume": True, "algorithm": "ppo"})


def long_answers(prompt, response):
    return len(response)


@pytest.mark.ci
def test_a_run_is_a_teacher(taught, tmp_path):
    """Beside a reward, of a policy that starts where it did: two steps away. Once it has trained
    further, a run that it teaches cannot go on.
    """
    teacher = tmp_path / "teacher"
    shutil.copytree(taught.folder, teacher)
    settings = {**TAUGHT, "distil": "reverse", "teacher": str(teacher), "runs": str(tmp_path)}
    unhinted = [{**row, "hint": None} for row in HINTED]
    run = train.policy(unhinted, long_answers, **settings)
    assert (run.metrics["reward"] > 0).all() and run.metrics["teacher_loss"][0] > 1e-5
    shutil.rmtree(teacher / "checkpoints" / "2")
    settings |= {"resume": True, "steps": 3}
    with pytest.raises(UserError, match="teacher .* holds other weights than when this run began"):
        train.policy(unhinted, long_answers, **settings)


@pytest.mark.ci
def test_teachers_that_cannot_teach(tmp_path, taught):
    shape, weights, tokenizer = tiny_model(0)
    backend = Backend.from_str(tokenizer._backend.to_str())
    backend.add_special_tokens(["<more>"])
    larger = replace(shape, vocab_size=shape.vocab_size + 1)
    params = jax.device_get(jax.jit(models.make(larger).init)(jax.random.key(0)))
    params.pop("value")
    pretrained.save(tmp_path / "other", larger, params, Tokenizer(backend, eos_id=tokenizer.eos_id))
    settings = {**TAUGHT, "runs": str(tmp_path / "runs")}
    long = [{**row, "hint": "x" * shape.max_length} for row in HINTED]
    for hinted, teacher, words in (
        (HINTED, tmp_path / "other", "has another tokenizer than the policy"),
        (HINTED, tmp_path / "none", "there is no folder"),
        (long, "self", f"self.* takes {shape.max_length} tokens, but prompts with hints"),
    ):
        with pytest.raises(UserError, match=words):
            train.policy(hinted, teacher=str(teacher), **settings)
