import dataclasses
import importlib
import json
import math
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxppo import ablation, algorithms, models
from jaxppo.ablation import AblationConfig, Arm, Claim, Question, Scale, toy_tasks
from jaxppo.config import validate_run
from jaxppo.errors import UserError
from jaxppo.models import lora
from jaxppo.models.shapes import network

SCRIPTS = Path(__file__).parents[2] / "experiments" / "ablations"
CONFIG = dataclasses.replace(toy_tasks.LadderConfig(), batch_size=32, minibatches=2, steps=30)
SCALE = Scale(
    "ladder",
    CONFIG,
    ("token", "prompt"),
    toy_tasks.load,
    toy_tasks.reward,
    lambda run: toy_tasks.Deal(run.task),
    algorithms.make_parts,
    toy_tasks.judge,
    toy_tasks.JUDGED,
)
ARMS = {
    "held": Arm({"kl_coef": 0.1}),
    "twin": Arm({"kl_coef": 0.1}, first_seed=100),
    "flipped": Arm({"kl_coef": -0.1}),
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


def rows(values: dict[str, list[float]], metric: str = "end") -> list[dict]:
    return [
        {"arm": arm, "task": "token", "seed": seed, "diverged": 0.0, metric: x}
        for arm, numbers in values.items()
        for seed, x in enumerate(numbers)
    ]


@pytest.mark.slow
@pytest.mark.learning
def test_a_planted_bad_arm_is_worse_and_a_twin_is_not(tmp_path):
    options = AblationConfig(results=str(tmp_path))
    record = ablation.ask(PLANTED, SCALE, options)
    assert [claim["verdict"] for claim in record["claims"]] == [
        "agrees",
        "disagrees",
        "not decided",
        "not decided",
    ]
    low, high = record["claims"][0]["difference"][1:]
    assert low > 0 and high > low
    assert record["arms"]["held"]["end"]["mean"][0] > 0.2  # 1/8 by chance: something was learned
    assert (
        len(record["runs"]) == 48 and record["arms"]["twin"]["runs"] == 16
    )  # 3 arms, 2 rungs, 8 seeds
    assert (
        json.loads((tmp_path / "planted-ladder.json").read_text())["claims"][0]["verdict"]
        == "agrees"
    )


@pytest.mark.ci
def test_the_same_seeds_give_the_same_record(tmp_path, capsys):
    """To the last digit; only when and by what it was made may differ."""
    question = PLANTED._replace(metrics=("end", "gold"))  # the judge's numbers, too
    records = []
    for name in ("one", "other"):
        ablation.ask(question, SCALE, AblationConfig(tiny=True, results=str(tmp_path / name)))
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
    assert "12 runs at once: flipped, held, twin" in capsys.readouterr().out  # one program


def test_verdicts():
    question = Question(
        "q",
        {"a": Arm(), "b": Arm()},
        (Claim("", "", "a", "b"), Claim("", "", "b", "a"), Claim("", "", "b", "a", "-end")),
        ("end",),
    )
    scale = SCALE._replace(tasks=("token",))
    sure = ablation.conclude(
        question, scale, rows({"a": [1.0, 1.1, 1.2, 1.3, 1.2, 1.1, 1.0, 1.4], "b": [0.5] * 8})
    )
    assert [claim["verdict"] for claim in sure["claims"]] == [
        "agrees",
        "disagrees",
        "agrees",
    ]  # less is better in the last
    value, low, high = sure["claims"][0]["difference"]
    assert value == pytest.approx(9.3 / 8 - 0.5) and low < value < high
    assert sure["claims"][0]["p"] == pytest.approx(2 / 2**8)  # eight differences of one sign
    unsure = ablation.conclude(question, scale, rows({"a": [1.0, 0.0] * 4, "b": [0.4, 0.6] * 4}))
    assert {claim["verdict"] for claim in unsure["claims"]} == {"not decided"}


def test_a_run_that_diverged_counts():
    found = rows({"a": [1.0] * 8, "b": [1.0] * 7 + [0.0]})
    found[-1]["diverged"] = 1.0
    question = Question("q", {"a": Arm(), "b": Arm()}, (Claim("", "", "a", "b"),), ("end",))
    record = ablation.conclude(question, SCALE._replace(tasks=("token",)), found)
    assert record["arms"]["b"]["diverged"] == 1 and record["arms"]["b"]["runs"] == 8
    assert record["arms"]["b"]["end"]["mean"][0] == 7 / 8


def test_a_run_that_diverged_is_no_success():
    """It has not moved, so it is near to its reference: still it counts as the farthest of all."""
    found = rows({"a": [2.0, 3.0, 2.0, 3.0, 2.0, 3.0, 2.0, 3.0], "b": [0.5] * 8}, "kl")
    for row in found:
        row["end"] = 0.0
    question = Question("q", {"a": Arm(), "b": Arm()}, (Claim("", "", "b", "a", "-kl"),), ("end",))
    scale = SCALE._replace(tasks=("token",))
    assert ablation.conclude(question, scale, found)["claims"][0]["verdict"] == "agrees"
    for row in found[8:]:
        row["diverged"] = 1.0
    (claim,) = ablation.conclude(question, scale, found)["claims"]
    assert (
        claim["difference"][0] == -0.5 and claim["verdict"] != "agrees"
    )  # 3 nats each, where the others have 2.5 in the mean
    found[8]["kl"] = None  # as a record has what was not finite
    assert ablation.conclude(question, scale, found)["claims"][0]["difference"][0] == -0.5


def test_settings_as_multiples_of_the_scales():
    arm = ablation.resolved(
        Arm({"epochs": 1}, times={"steps": 0.25, "lr": 1 / 3}), CONFIG.__class__(steps=80, lr=3e-3)
    )
    assert arm.settings == {"epochs": 1, "steps": 20, "lr": 1e-3} and not arm.times
    with pytest.raises(
        UserError,
        match="'x' takes 0.0625 times 40 steps, which is no whole number: choose another --steps",
    ):
        ablation.resolved(Arm(times={"steps": 1 / 16}), CONFIG.__class__(steps=40), "x")
    with pytest.raises(UserError, match="'a' sets steps; write them as a multiple"):
        ablation.ask(Question("q", {"a": Arm({"steps": 3})}, ()), SCALE, AblationConfig())


def test_a_judge_reads_equally_many_rollouts_of_every_arm():
    """Of 16 rows a batch and of 64: 256; and they are answers to the prompts that are for it."""
    seen = []

    class Dealt:
        def call(self, config, cursor):
            seen.append((config.rows, cursor))
            return toy_tasks.Deal("token").call(config, cursor)

    scale = SCALE._replace(
        judge=lambda rollout: {"n": jnp.float32(rollout.mask.shape[0])}, unseen=lambda run: Dealt()
    )
    for size in (16, 64):
        config = dataclasses.replace(CONFIG, batch_size=size)
        policy = toy_tasks.load(config)
        state = types.SimpleNamespace(params=policy.params, frozen=policy.frozen)
        run = ablation.sweep.Run("a", 0, {"batch_size": size})
        (found,) = ablation.judgements(scale, [run], [types.SimpleNamespace(run=run, state=state)])
        assert found == {"n": size}
    assert [rows for rows, _ in seen] == [16] * 16 + [64] * 4
    assert (
        len({cursor for _, cursor in seen[:16]}) == 16
        and min(cursor for _, cursor in seen) == 2**30
    )


def test_measures_are_of_the_last_tenth():
    names = ("reward", "kl", "entropy", "length", "skipped", "barren_steps", "first_ratio_off")
    metrics = {name: np.zeros(40) for name in names}
    metrics["reward"][36:] = [1, 2, 3, 4]
    metrics["skipped"][3] = 1  # once is enough
    metrics["first_ratio_off"][7] = 0.5
    metrics["entropy"][:] = 2.0
    metrics["entropy"][20:] = 0.0  # not measured: none of these steps had a finite update
    metrics["barren_steps"][20:] = np.arange(1, 21)
    found = ablation.measures(metrics)
    assert (
        found["end"] == 2.5
        and found["area"] == 0.25
        and found["diverged"] == 1.0
        and found["first_ratio_off"] == 0.5
    )
    assert found["mean_entropy"] == 2.0 and math.isnan(found["entropy"])


def test_arms_share_programs_where_they_can():
    other = lambda parts: parts
    arms = {
        "a": Arm({"lr": 1e-3}),
        "b": Arm({"lr": 2e-3}),
        "c": Arm({"loss": "gspo"}),
        "d": Arm({"lr": 1e-3}, parts=other),
        "plain": Arm(),
    }
    runs = [(name, arm, "token", seed) for name, arm in arms.items() for seed in (0, 1, 2)]
    found = ablation.programs(SCALE, runs, 100)
    assert [sorted({run.arm for run in group}) for _, _, group in found] == [
        ["a", "b", "plain"],
        ["c"],
        ["d"],
    ]
    assert {run.settings["lr"] for run in found[0][2]} == {1e-3, 2e-3, CONFIG.lr}
    # nine runs, four at once: three programs of three, so that one shape serves them
    assert [len(group) for _, _, group in ablation.programs(SCALE, runs, 4)] == [3, 3, 3, 3, 3]


def test_a_preset_as_an_arm():
    found = ablation.settings_of(CONFIG, Arm({"algorithm": "grpo", "group_size": 4}))
    assert (
        found["advantage"] == "group" and found["value_loss"] == "none" and found["group_size"] == 4
    )
    assert (
        "steps" not in found and "batch_size" not in found
    )  # what a preset does not name stays as the scale has it


def test_a_claim_about_an_arm_that_is_not_there():
    question = Question("q", {"a": Arm()}, (Claim("", "", "a", "b"),))
    with pytest.raises(UserError, match="a claim of q is about 'b': the arms are a"):
        ablation.ask(question, SCALE, AblationConfig())


@pytest.mark.parametrize("option", ["seeds", "steps", "at_once"])
def test_numbers_that_make_no_sense(option):
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} must be at least"):
        ablation.ask(Question("q", {"a": Arm()}, ()), SCALE, AblationConfig(**{option: -1}))


def test_a_number_that_nobody_measures_is_asked_for_before_anything_is_trained():
    question = Question("q", {"a": Arm()}, (), ("end", "gold"))
    with pytest.raises(UserError, match="q asks for gold, which is not measured at --scale plain"):
        ablation.ask(question, SCALE._replace(name="plain", judged=()), AblationConfig())


@pytest.mark.slow
def test_the_judge_reads_the_policy_and_not_the_arms_sampler():
    """An arm whose sampler says 3 whatever the policy is earns all there is while it trains; the
    policy is judged by itself.
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
    record = ablation.ask(question, SCALE._replace(tasks=("token",)), AblationConfig(tiny=True))
    arms = record["arms"]
    assert arms["threes"]["end"]["mean"][0] == 1.0 and arms["plain"]["end"]["mean"][0] < 0.3
    assert arms["threes"]["score"]["mean"] == arms["plain"]["score"]["mean"]


def scripts() -> list[str]:
    return sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem != "scales")


@pytest.fixture
def load(monkeypatch):
    """A script's module."""
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    return importlib.import_module


def test_there_are_sixteen_questions():
    assert len(scripts()) == 16
    records = {
        path.stem for path in (SCRIPTS.parent / "results" / "ablations").glob("*-ladder.json")
    }
    assert records == {f"{name}-ladder" for name in scripts()}  # each was asked


@pytest.mark.parametrize("name", scripts())
def test_a_question_can_be_asked(load, name):
    """Its claims are about its arms, and every arm's settings can run."""
    question = load(name).QUESTION
    assert question.name == name
    ablation.check(question, SCALE)
    assert all(claim.paper.startswith("http") for claim in question.claims if claim.paper)
    assert "https://" in load(name).__doc__
    for arm in question.arms.values():
        settings = dataclasses.replace(
            toy_tasks.LadderConfig(), **ablation.settings_of(toy_tasks.LadderConfig(), arm)
        )
        validate_run(settings)
        algorithms.check(settings)


@pytest.mark.parametrize(
    ("widths", "vocabulary", "layers", "first"),
    [("WIDTHS", toy_tasks.SYMBOLS + 1, 1, 12_673), ("SMALL", 257, 3, 964_001)],
)
def test_architectures_have_equally_many_parameters(load, widths, vocabulary, layers, first):
    sizes = []
    for kind, width in getattr(load("architectures"), widths).items():
        shape = network(kind, vocab_size=vocabulary, width=width, num_layers=layers, max_length=7)
        sizes.append(lora.count(jax.eval_shape(models.make(shape).init, jax.random.key(0))))
    assert sizes[0] == first and max(sizes) / min(sizes) < 1.03


RECORDS = sorted((SCRIPTS.parent / "results" / "ablations").glob("*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_answers_what_its_script_asks(load, path):
    """The same arms and claims, all of them (of those that the scale has), and the verdicts that
    its runs' numbers give today.
    """
    record = json.loads(path.read_text())
    question = load(record["question"]).QUESTION
    own = dataclasses.replace(
        toy_tasks.LadderConfig(), **{name: record["config"][name] for name in ("steps", "lr")}
    )
    arms = {
        name: ablation.described(ablation.resolved(question.arms[name], own))
        for name in record["arms"]
    }
    if record["scale"] == "ladder":
        assert list(arms) == list(question.arms)
        assert json.loads(json.dumps(arms)) == record["settings"]
    claims = [claim for claim in question.claims if {claim.better, claim.worse} <= set(arms)]
    scale = SCALE._replace(name=record["scale"], tasks=tuple(record["tasks"]))
    again = ablation.conclude(
        question._replace(arms={name: question.arms[name] for name in arms}, claims=claims),
        scale,
        record["runs"],
    )
    words = lambda claims: [
        {name: x for name, x in claim.items() if isinstance(x, str)} for claim in claims
    ]
    assert words(again["claims"]) == words(record["claims"])
    for one, other in zip(again["claims"], record["claims"], strict=True):
        assert one["difference"] == pytest.approx(other["difference"], nan_ok=True)
        assert one["p"] == pytest.approx(
            float("nan") if other["p"] is None else other["p"], nan_ok=True
        )


@pytest.mark.parametrize(
    "path", [path for path in RECORDS if path.stem.endswith("-ladder")], ids=lambda path: path.stem
)
def test_no_run_is_above_what_can_be_had(path):
    """The means of sampled rewards, whose deviation is .5 at most, by no more than four standard
    errors.
    """
    record = json.loads(path.read_text())
    for row in record["runs"]:
        own = record["config"] | record["settings"][row["arm"]]
        best, samples = toy_tasks.OPTIMA[row["task"]], own["batch_size"] * own["steps"]
        assert 0 <= row["area"] <= best + 4 * 0.5 / samples**0.5
        assert (
            row["end"] <= best + 4 * 0.5 / (own["batch_size"] * max(own["steps"] // 10, 1)) ** 0.5
        )
        assert row.get("score", 0.0) <= best + 4 * 0.5 / 256**0.5


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_there_was_something_to_learn(path):
    """The best arm ends above the policy that all begin with: 1/8 by chance on the ladder; .449
    right with the small model (the arm "untrained" of controller, 95 % +- .026); at the last scale
    the classifier's score goes from -1 to 1.
    """
    record = json.loads(path.read_text())
    least = {"ladder": 0.4, "small": 0.475, "smollm2": 0.2}[record["scale"]]
    assert max(arm["end"]["mean"][0] for arm in record["arms"].values()) > least


def test_staleness_has_equally_many_samples_and_updates(load):
    for arm in load("staleness").QUESTION.arms.values():
        s = ablation.resolved(arm, toy_tasks.LadderConfig()).settings
        assert s["batch_size"] * s["steps"] == 16 * 320 and s["minibatches"] * s["steps"] == 320
        assert s["batch_size"] / s["minibatches"] == 16


@pytest.mark.slow
def test_dropout_draws_other_masks_and_keeps_the_mean(load):
    policy = toy_tasks.load(toy_tasks.LadderConfig())
    noisy = load("dropout").dropping(0.5)(policy.model)
    tokens = jnp.arange(1, 8)[None].repeat(64, 0)
    attend = jnp.ones(tokens.shape, bool)
    plain, _ = policy.model.apply(policy.params, tokens, attend)
    one, _ = noisy.apply(policy.params, tokens, attend)
    changed = jax.tree.map(lambda x: x * 1.001, policy.params)
    other, _ = noisy.apply(changed, tokens, attend)
    assert np.mean(np.asarray(one) == 0) == pytest.approx(0.5, abs=0.02)
    assert np.mean((np.asarray(one) == 0) == (np.asarray(other) == 0)) == pytest.approx(
        0.5, abs=0.02
    )  # as often as by chance
    kept = np.asarray(one) != 0
    np.testing.assert_allclose(np.asarray(one)[kept], 2 * np.asarray(plain)[kept], rtol=1e-6)
    grads = jax.grad(lambda p: noisy.apply(p, tokens, attend)[0].sum())(policy.params)
    assert all(math.isfinite(float(x.sum())) for x in jax.tree.leaves(grads))


def test_a_hot_sampler_is_hot_while_it_decodes_alone(load):
    policy, module = toy_tasks.load(toy_tasks.LadderConfig()), load("mismatch")
    hot = module.HOT(policy.model)
    tokens, attend = jnp.array([[1, 2, 3]]), jnp.ones((1, 3), bool)
    plain, _ = policy.model.apply(policy.params, tokens, attend)
    scored, _ = hot.apply(policy.params, tokens, attend)
    decoded, _ = hot.apply(policy.params, tokens, attend, cache=hot.init_cache(1, 3, jnp.float32))
    np.testing.assert_array_equal(scored, plain)
    np.testing.assert_allclose(decoded, np.asarray(plain) / 1.5, rtol=1e-5)
