"""Whole ablations on toy tasks."""

import json

import jax.numpy as jnp
import pytest
from toy_scale import SCALE

from jaxppo import kl
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question
from jaxppo.ablation.training import run_ablation
from jaxppo.config import check_numbers
from jaxppo.errors import UserError


def wrong_sign(parts):
    """The policy is rewarded for its distance from the reference."""
    return parts._replace(kl=lambda logprobs, reference: -kl.k1(logprobs, reference))


ARMS = {
    "held": Arm({"kl_coef": 0.1}),
    "twin": Arm({"kl_coef": 0.1}, first_seed=100),
    "flipped": Arm({"kl_coef": 0.1}, parts=wrong_sign),
}
PLANTED = Question(
    "planted",
    ARMS,
    (
        Claim("a KL of the right sign holds the policy", "", "held", "flipped", "-kl"),
        Claim("the wrong sign holds it", "", "flipped", "held", "-kl"),
        Claim("the same arm on other seeds is better", "", "twin", "held"),
        Claim("and nearer to the reference", "", "twin", "held", "-kl"),
    ),
)


@pytest.mark.slow
@pytest.mark.learning
def test_a_bad_arm_is_worse_and_a_twin_is_not(tmp_path):
    options = AblationConfig(results=str(tmp_path), runs=str(tmp_path))
    record = run_ablation(PLANTED, SCALE, options)
    assert [claim["verdict"] for claim in record["claims"]] == [
        "agrees",
        "disagrees",
        "not decided",
        "not decided",
    ]
    low, high = record["claims"][0]["difference"][1:]
    assert low > 0 and high > low
    assert record["arms"]["held"]["end"]["mean"][0] > 0.2  # 1/8 by chance
    assert (
        len(record["runs"]) == 48 and record["arms"]["twin"]["runs"] == 16
    )  # 3 arms, 2 tasks, 8 seeds
    assert (
        json.loads((tmp_path / "planted-ladder.json").read_text())["claims"][0]["verdict"]
        == "agrees"
    )


@pytest.mark.ci
def test_the_same_seeds_give_the_same_record(tmp_path, capsys):
    """To the last digit; only time and versions may differ."""
    question = PLANTED._replace(metrics=("end", "gold"))  # the judge's numbers, too
    records = []
    for name in ("one", "other"):
        place = str(tmp_path / name)
        scale = SCALE._replace(tasks=("token",))
        run_ablation(question, scale, AblationConfig(tiny=True, results=place, runs=place))
        text = (tmp_path / name / "planted-ladder-tiny.json").read_text()
        records.append({key: x for key, x in json.loads(text).items() if key != "about"})
    assert json.dumps(records[0]) == json.dumps(records[1])
    assert {
        "arm",
        "task",
        "seed",
        "end",
        "area",
        "kl",
        "entropy",
        "length",
        "diverged",
        "gold",
    } <= set(records[0]["runs"][0])
    assert str(tmp_path) not in json.dumps(records[0])
    # arms with the same functions share a program
    assert "4 runs at once: held, twin\n2 runs at once: flipped" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["seeds", "steps", "at_once"])
def test_negative_options_are_refused(option):
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} must be 0 or more"):
        check_numbers(AblationConfig(**{option: -1}))


@pytest.mark.slow
def test_the_judge_ignores_the_arms_change_of_the_model(tmp_path):
    """A changed model that always samples 3 gets the best reward in training; the judge samples
    from the policy alone.
    """

    def threes(model):
        def logits(params, hidden):
            found = model.logits(params, hidden)
            return found + 30.0 * jnp.broadcast_to(jnp.arange(8) == 3, found.shape)

        return model._replace(logits=logits)

    question = Question(
        "q",
        {"plain": Arm({"lr": 0.0}), "threes": Arm({"lr": 0.0}, model=threes)},
        (),
        ("end", "score"),
    )
    options = AblationConfig(tiny=True, runs=str(tmp_path))
    record = run_ablation(question, SCALE._replace(tasks=("token",)), options)
    arms = record["arms"]
    assert arms["threes"]["end"]["mean"][0] == 1.0 and arms["plain"]["end"]["mean"][0] < 0.3
    assert arms["threes"]["score"]["mean"] == arms["plain"]["score"]["mean"]
