import dataclasses

import pytest
from toy_scale import CONFIG, SCALE

from jaxppo.ablation.question import Arm, Claim, Question, arm_settings, check_question, resolve_arm
from jaxppo.errors import UserError


def test_multiples_of_the_scales_settings():
    arm = Arm({"epochs": 1}, times={"steps": 0.25, "lr": 1 / 3})
    arm = resolve_arm(arm, dataclasses.replace(CONFIG, steps=80, lr=3e-3))
    assert arm.settings == {"epochs": 1, "steps": 20, "lr": 1e-3} and not arm.times
    message = "'x' takes 0.0625 times 40 steps, which is no whole number: choose another --steps"
    with pytest.raises(UserError, match=message):
        resolve_arm(Arm(times={"steps": 1 / 16}), dataclasses.replace(CONFIG, steps=40), "x")


def test_a_preset_as_an_arm():
    found = arm_settings(CONFIG, Arm({"algorithm": "grpo", "group_size": 4}))
    assert found["advantage"] == "group" and found["value_loss"] == "none"
    assert found["group_size"] == 4
    # what a preset does not name stays as the scale has it
    assert "steps" not in found and "batch_size" not in found


@pytest.mark.parametrize(
    ("arms", "claims", "metrics", "message"),
    [
        ({"a": Arm({"steps": 3})}, (), (), "'a' sets steps; write them as a multiple"),
        ({"a": Arm()}, (Claim("", "", "a", "b"),), (), "a claim of q is about 'b': the arms are a"),
        (
            {"a": Arm()},
            (),
            ("end", "gold"),
            "q asks for gold, which is not measured at --scale plain",
        ),
    ],
)
def test_a_bad_question_is_refused(arms, claims, metrics, message):
    scale = SCALE._replace(name="plain", judged=())
    with pytest.raises(UserError, match=message):
        check_question(Question("q", arms, claims, metrics), scale)


def test_an_arm_that_changes_the_model_cannot_run_alone():
    question = Question("q", {"a": Arm(model=lambda model: model)}, ())
    scale = SCALE._replace(alone=lambda *_: {})
    with pytest.raises(UserError, match="'a' changes the model, which --scale ladder cannot"):
        check_question(question, scale)
