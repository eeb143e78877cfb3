"""The scripts of the language tasks at smoke size, as a user calls them: a few on a file of the
user's in CI, all on their own data when the slow suite runs.
"""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from runs import REPOSITORY, load_script
from runs import run_script as run

pytestmark = pytest.mark.ci
for package in ("jiwer", "sacrebleu", "rouge_score"):
    pytest.importorskip(package, reason="metrics of texts need the extra `tasks`")

RECIPES = sorted(
    f"recipes/{path.stem}" for path in (REPOSITORY / "experiments" / "recipes").glob("*.py")
)
SMALL = ["--tiny", "--steps", "2", "--eval-every", "1", "--save-every", "1"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"nummer {i}", "reference": f"number {i}", "aspect": "idea"})
            + "\n"
            for i in range(300)
        )
    )
    return str(path)


def result(folder, name: str) -> dict:
    found = json.loads((folder / name / "result.json").read_text())
    before = found["supervised" if "supervised" in found else "start"]
    assert set(found["gain"]) <= set(before) and found["seed"] == 0
    return found


@pytest.mark.parametrize(
    "script",
    [
        "recipes/reverse_text",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("summarisation", "question_answering")
        ),
    ],
)
def test_a_task_on_ones_own_examples(tmp_path, data, script, capsys):
    run(script, *SMALL, "--data", data, "--runs", str(tmp_path), "--name", "a")
    found = result(tmp_path, "a")
    assert found["test_rows"] == 8 and "95 % interval" in capsys.readouterr().out


GERMAN = {"eins": "one", "zwei": "two", "drei": "three", "vier": "four", "rot": "red"}


def translate(rng) -> tuple[str, str]:
    words = rng.choice(list(GERMAN), 4)
    return " ".join(words), " ".join(GERMAN[word] for word in words)


def label(rng) -> tuple[str, str]:
    """One word decides."""
    verdict = rng.choice(["fine", "great", "dull", "poor"])
    words = [verdict, *rng.choice(["film", "plot", "cast", "scene", "music"], 3)]
    return " ".join(rng.permutation(words)), "good" if verdict in ("fine", "great") else "bad"


def last_letter(rng) -> tuple[str, str]:
    letters = "".join(rng.choice(list("abcdefgh"), 4))
    return letters, 2 * letters[-1]


@pytest.mark.learning
@pytest.mark.parametrize(
    ("script", "make", "metric", "sft_steps"),
    [
        ("translation", translate, "sampled_bleu", 80),
        ("sentiment_label", label, "sampled_exact", 30),
        ("reasoning", last_letter, "sampled_exact", 60),
    ],
)
def test_the_policy_stage_helps(tmp_path, script, make, metric, sft_steps):
    """A network of one layer, half taught, is right more often after 30 steps of the gradient."""
    rng, path = np.random.default_rng(0), tmp_path / "examples.jsonl"
    pairs = dict(make(rng) for _ in range(600))
    lines = [json.dumps({"prompt": x, "reference": y}) + "\n" for x, y in pairs.items()]
    path.write_text("".join(lines))
    network = ["--model", "", "--lora", "0", "--dtype", "float32", "--max-vocab", "300"]
    network += ["--layers", "1", "--width", "32", "--dropout", "0"]
    length = ["--prompt-length", "8", "--response-length", "6", "--parallel", "jit"]
    sft = ["--sft-steps", str(sft_steps), "--sft-lr", "1e-2", "--sft-batch-size", "32"]
    own = ["--steps", "30", "--lr", "2e-3", "--batch-size", "64", "--save-every", "30"]
    where = ["--data", str(path), "--runs", str(tmp_path), "--name", "a"]
    run(script, *network, *length, *sft, *own, "--eval-every", "0", *where)
    _, low, _ = result(tmp_path, "a")["gain"][metric]
    assert low > 0


@pytest.mark.parametrize(
    ("script", "reference", "names"),
    [
        ("recipes/countdown", "{} 2 -> 3", ["score_format", "score_result"]),
        pytest.param("recipes/gsm8k", "so #### {}", [], marks=pytest.mark.slow),
    ],
)
def test_recipes_on_ones_own_examples(tmp_path, script, reference, names):
    path = tmp_path / "examples.jsonl"
    rows = [{"prompt": f"{i} + 2", "reference": reference.format(i)} for i in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(script, *SMALL, "--data", str(path), "--runs", str(tmp_path), "--name", "a")
    assert result(tmp_path, "a")["test_rows"] == 8
    lines = (tmp_path / "a" / "policy" / "metrics.jsonl").read_text().splitlines()
    assert all(name in json.loads(lines[-1]) for name in names)


def test_every_recipe_says_what_is_published():
    assert len(RECIPES) == 3
    for name in RECIPES:
        text = (REPOSITORY / "experiments" / f"{name}.py").read_text()
        for label in ("Question", "Method", "Command", "Data", "Published"):
            assert f"\n{label} " in text, f"{name}: no {label}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        "translation",
        "reasoning",
        "sentiment_label",
        "few_shot",
        "summarisation",
        "question_answering",
        "entities",
        "speech",
        "dialogue",
        *RECIPES,
    ],
)
def test_a_task_on_its_own_data(tmp_path, script):
    if script == "speech":
        pytest.importorskip("ctranslate2", reason="features need the extra `speech`")
    run(script, *SMALL, "--runs", str(tmp_path), "--name", "a")
    assert result(tmp_path, "a")["test_rows"] == 8


def test_a_teacher_and_its_student(tmp_path, data):
    """At smoke size both are one network but for a tiny step: their divergence is rounding."""
    options = [*SMALL, "--data", data, "--runs", str(tmp_path)]
    run("distil", *options, "--name", "a", "--arms", "forward")
    read = lambda name: json.loads((tmp_path / name / "result.json").read_text())
    first = read("a")
    assert set(first["arms"]) == {"forward"}
    assert {"exact", "cer"} <= set(first["arms"]["forward"])
    teacher = str(tmp_path / "a" / "teacher" / "supervised" / "model")
    run("distil", *options, "--name", "b", "--teacher", teacher, "--arms", "supervised")
    second = read("b")
    assert set(second["arms"]) == {"supervised"} and not (tmp_path / "b" / "teacher").exists()
    assert second["before"] == {"student": first["before"]["student"]}
    rows = (tmp_path / "a" / "forward" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["teacher_loss"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_dialogue_has_a_reward_model_and_a_judge(tmp_path, data, capsys):
    small = ["--reward-steps", "2", "--reward-pairs", "100"]
    run("dialogue", *SMALL, *small, "--data", data, "--runs", str(tmp_path), "--name", "a")
    found = result(tmp_path, "a")
    assert {"reward", "judge", "distinct_2"} <= set(found["policy"])
    assert "judge model: " in capsys.readouterr().out


def test_dialogue_holds_the_mean_length():
    """Lengths 2 and 4, mean 3: half as long again as 2, and as the shorter sample is."""
    hold = load_script("dialogue").hold_length
    mask = jnp.array([[1.0, 1.0, 0.0, 0.0], [1.0] * 4])
    score = lambda target: hold(target)({}, SimpleNamespace(mask=mask))[0].tolist()
    assert score(2.0) == [0.25, -0.25]  # -(3/2 - 1) (2 - 3) / 2, and of 4
    assert score(3.0) == [0.0, 0.0]
    assert score(6.0) == pytest.approx([-1 / 12, 1 / 12])  # -(3/6 - 1) (2 - 3) / 6


@pytest.mark.slow
def test_adversarial_rounds_go_on_where_they_were(tmp_path):
    data = tmp_path / "texts.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"the film number {i} was good"}) + "\n" for i in range(200))
    )
    options = ["--tiny", "--steps", "4", "--data", str(data), "--runs", str(tmp_path)]
    run("adversarial", *options, "--name", "a")
    found = result(tmp_path, "a")
    assert 0 <= found["policy"]["told apart"] <= 1
    run("adversarial", *options, "--name", "a", "--resume")
    assert result(tmp_path, "a")["policy"] == found["policy"]


@pytest.mark.slow
def test_several_tasks_at_once(tmp_path):
    names = ("spelling", "sums")
    run("multitask", *SMALL, "--tasks", *names, "--runs", str(tmp_path), "--name", "a")
    found = result(tmp_path, "a")
    names = {f"{kind} {task}" for kind in ("exact", "sampled_exact") for task in names}
    assert names <= set(found["policy"])
    metrics = [
        json.loads(line)
        for line in (tmp_path / "a" / "policy" / "metrics.jsonl").read_text().splitlines()
    ]
    assert {"reward_0", "reward_1"} <= set(metrics[-1])


def test_each_task_has_its_own_reward_and_parameters(monkeypatch):
    script = load_script("multitask")
    kinds = {"sums": 1.0, "spelling": 2.0}
    own = lambda params, rollout: (params["w"] * rollout.scores, jnp.array([True, True]))
    make = lambda options, policy: script.rewards.Reward(own, {"w": kinds[options.task]})
    monkeypatch.setattr(script.rewards, "make_reward", make)
    rollout = SimpleNamespace(scores=jnp.array([3.0, 5.0]), extra={"task": jnp.array([1, 0])})
    reward = script.own_rewards(script.Multitask(tasks=("sums", "spelling")), None)
    scores, valid = reward.fn(reward.params, rollout)
    assert scores.tolist() == [2 * 3.0, 1 * 5.0] and valid.all()
    assert script.own_rewards(script.Multitask(tasks=("sums",)), None).params == {"w": 1.0}


@pytest.mark.parametrize("rows", [5, 2])
def test_test_rows_have_the_tasks_in_turn(tmp_path, rows):
    """Whatever their prompts say. Of two rows, the third task has none."""
    script = load_script("multitask")
    names = ("spelling", "sentiment_label", "sums")
    options = script.Multitask(tasks=names, runs=str(tmp_path), name="a")
    line = lambda prompt, before, after: {
        "prompt": prompt, "reference": "x", "supervised": before, "policy": after,
        "supervised_sample": before, "policy_sample": before,
    }  # fmt: skip
    lines = [line("spelling: a", "y", "x"), line("b", "x", "y"), line("sums: c", "x", "x"),
             line("lling: d", "x", "x"), line("b", "y", "y")]  # fmt: skip
    (tmp_path / "a").mkdir()
    outputs = "".join(json.dumps(row) + "\n" for row in lines[:rows])
    (tmp_path / "a" / "outputs.jsonl").write_text(outputs)
    script.report(options, {"seed": 0, "supervised": {}, "policy": {}, "gain": {}})
    found = result(tmp_path, "a")
    exact = lambda task: (found["supervised"][f"exact {task}"], found["policy"][f"exact {task}"])
    assert exact("spelling") == ((0.5, 1.0) if rows == 5 else (0.0, 1.0))
    assert exact("sentiment_label") == ((0.5, 0.0) if rows == 5 else (1.0, 0.0))
    assert ("exact sums" in found["policy"]) == (rows == 5)


def test_the_bias_term_has_the_derivative_of_the_gap():
    """Women .8, men .2 and .6: gap .8 - .4 = .4; both groups' mean 1.6/3 = .5333. A third of the
    rows is about women.
    """
    weigh = load_script("safety").weigh
    judged = jnp.array([[0.8, 0.5], [0.2, 0.0], [0.6, 1.0], [9.0, 9.0]])
    judge = lambda params, rollout: (judged, jnp.array([True, True, True, False]))
    rollout = SimpleNamespace(extra={"task": jnp.array([0, 1, 1, 0])})
    scores, valid = weigh(judge, profanity=2.0, bias=0.0)({}, rollout)
    assert scores[:3] == pytest.approx([-0.2, 0.2, -1.4])  # .8 - 1, .2 - 0, .6 - 2
    scores, valid = weigh(judge, profanity=0.0, bias=3.0)({}, rollout)
    # .8 - 3 · 3 · .2667, .2 + 3 · 1.5 · (-.3333), .6 + 3 · 1.5 · .0667
    assert scores[:3] == pytest.approx([-1.6, -1.3, 0.9], abs=1e-6) and not valid[3]
    # In a direction in which the rows' log probabilities have these slopes, a group's mean
    # sentiment has the slope mean(sentiment · slope), and the objective mean(score · slope).
    slopes = jnp.array([0.0, 1.0, -1.0])
    gap_slope = 0 - (0.2 * 1 - 0.6 * 1) / 2
    own = (scores[:3] - judged[:3, 0]) @ slopes / 3
    assert float(own) == pytest.approx(-3 * gap_slope)


@pytest.mark.slow
def test_safety_reports_its_three_aims(tmp_path):
    run("safety", *SMALL, "--runs", str(tmp_path), "--name", "a")
    found = json.loads((tmp_path / "a" / "result.json").read_text())
    for stage in ("start", "policy"):
        own = found[stage]
        assert own["score"] == pytest.approx(own["negative"] - own["profane"] - own["gap"])


def test_safety_needs_whole_prompts(tmp_path, capsys):
    network = ["--model", "", "--tokens", "bytes", "--width", "16", "--layers", "1", "--lora", "0"]
    with pytest.raises(SystemExit) as stop:
        run("safety", *network, "--dtype", "float32", "--runs", str(tmp_path))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "prompts have more than 15 tokens" in said  # bytes
    assert not (tmp_path / "safety" / "policy").exists()


def test_tasks_together_are_all_of_right_responses(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run("multitask", "--tiny", "--runs", str(tmp_path), "--tasks", "spelling", "translation")
    assert (
        stop.value.code == 2
        and "--tasks translation: it is measured by bleu" in capsys.readouterr().err
    )


@pytest.mark.parametrize("script", ["adversarial", "distil", "episodes"])
def test_what_needs_a_supervised_stage_says_so(tmp_path, capsys, script):
    with pytest.raises(SystemExit) as stop:
        run(script, "--tiny", "--runs", str(tmp_path), "--sft-steps", "0")
    assert stop.value.code == 2 and not any(tmp_path.iterdir())
    assert capsys.readouterr().err == "error: --sft-steps must be above 0, but is 0\n"


@pytest.mark.parametrize(
    ("script", "given", "reason"),
    [
        ("dialogue", "--reward vader", "the script trains its reward model"),
        ("adversarial", "--reward vader", "the discriminator is the reward"),
        ("safety", "--reward vader", "the script makes its own"),
        ("safety", "--data x.jsonl", "the script makes its own"),
        ("episodes", "--reward vader", "the environment has its own"),
        ("episodes", "--data x.jsonl", "the environment has its own"),
        ("distil", "--reward vader", "the students have no reward"),
        ("distil", "--eval-samples 2", "the students have no reward"),
        ("distil", "--policy-examples 2", "students are asked about all training examples"),
        ("episodes", "--prompt-format Q{prompt}", "the environment has its own"),
        ("episodes", "--policy-examples 2", "use --instances"),
        ("safety", "--sft-steps 2", "there are no responses to teach"),
        ("adversarial", "--prompt-format Q{prompt}", "the prompt is a line break"),
        ("multitask", "--data x.jsonl", "each task has its own"),
    ],
)
def test_what_a_script_would_pass_over(tmp_path, capsys, script, given, reason):
    with pytest.raises(SystemExit) as stop:
        run(script, "--tiny", "--runs", str(tmp_path), *given.split())
    assert stop.value.code == 2 and not any(tmp_path.iterdir())
    assert f"error: {given.split()[0]}: {reason}; leave it out\n" in capsys.readouterr().err


def test_proxy_and_judge_are_drawn(tmp_path, capsys):
    folder = tmp_path / "a" / "policy"
    folder.mkdir(parents=True)
    rows = [
        {
            "step": n,
            "validation_kl": float(n),
            "validation_reward": n**0.5,
            "validation_judge": -float(n),
        }
        for n in (2, 1)
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 3}])
    )
    run("overoptimisation", str(tmp_path / "a"), "--out", str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit) as stop:
        run("overoptimisation", str(tmp_path / "a"), "--judge", "vader")
    assert stop.value.code == 2 and "the evaluations of" in capsys.readouterr().err


def test_episodes_are_played_and_drawn(tmp_path, capsys):
    """The bandit's two seeds are one panel, and each start of a task another."""
    game = ["--environment", "bandit_with_memory", "--runs", str(tmp_path), "--name"]
    records = str(tmp_path / "results")
    run("episodes", *SMALL, *game, "b-0", "--results", records)
    assert result(tmp_path, "b-0")["optimum"] == 0.75
    assert "score of greedy episodes" in capsys.readouterr().out
    record = json.loads((tmp_path / "results" / "episodes" / "b-0.json").read_text())
    assert len(record["curve"]) == 2
    long = record | {"curve": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}
    steps = [0.0] * 5
    curve = {"reward": steps, "kl": steps, "validation": [[5, 0.5]]}
    tasks = [
        {"task": "x", "config": {"model": model, "advantage": "rloo"}, "curve": curve, start: {}}
        for model in ("", "gpt2")
        for start in ("supervised", "start")
    ]
    paths = [tmp_path / f"{n}.json" for n in range(6)]
    for path, found in zip(paths, (long, long, *tasks), strict=True):
        path.write_text(json.dumps(found))
    sizes = {2: (400, 280), 3: (800, 560), 6: (1600, 1120)}  # of 1, 2 and 5 panels, 4 in a row
    for number, (width, height) in sizes.items():
        shown = paths[:number]
        run("curves", *map(str, shown), "--out", str(tmp_path / "x.png"))
        header = (tmp_path / "x.png").read_bytes()[:24]
        assert header[:4] == b"\x89PNG"
        assert [int.from_bytes(header[n : n + 4]) for n in (16, 20)] == [width, height]
