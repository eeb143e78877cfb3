"""Where the ablations are asked: `--scale` of each script.

ladder    toy tasks that can be learned whole, a network of 13,000 parameters made anew for every seed; minutes on a core
small     words spelt backwards, a transformer of .95 million parameters that was taught until .45 were right (once, in a
          minute); the arms that claims are about, two minutes of a core for each, and five with
          four epochs
smollm2   reviews continued positively by SmolLM2-135M with adapters; the reward is a classifier (trained once), VADER the judge
          that was not trained against. Three arms, three seeds, run by run: what is in
          runs/ablations-smollm2 is not done again
"""

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from jaxppo import algorithms, ppo, tasks, train
from jaxppo.ablation import (
    AblationConfig,
    Arm,
    Question,
    Scale,
    ask,
    measures,
    settings_of,
    toy_tasks,
)
from jaxppo.config import FREE
from jaxppo.data.examples import Examples
from jaxppo.errors import Diverged, UserError
from jaxppo.run import files, load
from jaxppo.run.checkpoint import Checkpoints
from jaxppo.run.load import load_policy
from jaxppo.tasks import measure, rewards, sources, stages

EXPERIMENTS = Path(__file__).resolve().parents[1]


def ladder(tiny: bool, **settings) -> Scale:
    """The rungs that can be learned, or `tasks` of them, and other settings than theirs."""

    tasks = settings.pop("tasks", toy_tasks.CLIMB)
    config = replace(toy_tasks.LadderConfig(), **settings)
    deal = lambda run: toy_tasks.Deal(run.task)
    return Scale(
        "ladder",
        config,
        tasks,
        toy_tasks.load,
        toy_tasks.reward,
        deal,
        algorithms.make_parts,
        toy_tasks.judge,
        toy_tasks.JUDGED,
    )


def small(
    tiny: bool, proxy: bool = False, longer: Mapping[str, int] = MappingProxyType({}), **settings
) -> Scale:
    """One of the language tasks, from a supervised baseline that is made once and kept in
    runs/ablations-<kind>-<width>; the judge has held-out examples.

    The reward is the right answer; or a `proxy` that pays for every letter e besides, and most for
    nothing else. `longer`: kinds of networks that are taught for so many steps, where they learn
    more slowly.
    """
    import jax.numpy as jnp

    options = tasks.TaskConfig(
        task="spelling",
        tokens="bytes",
        width=160,
        prompt_length=10,
        response_length=12,
        sft_steps=120,
        sft_lr=2e-3,
        lora=0,
        batch_size=64,
        steps=40,
        lr=5e-5,
        kl_coef=0.0,
        kl_adaptive=False,
        eval_every=0,
        tiny=tiny,
    )
    options = (
        replace(stages.smaller(options), batch_size=options.batch_size) if tiny else options
    )  # arms cut it in minibatches
    options = replace(options, **settings)
    task, found = tasks.task_of(options), sources.load_examples(options)
    bare = lambda part: [
        x._replace(prompt=x.prompt.removeprefix("Spell backward: ")) for x in part
    ]  # all that it takes, whole
    examples = Examples(*map(bare, found))

    def load(config):
        steps = longer.get(config.model_kind, options.sft_steps) if not tiny else options.sft_steps
        number = f"-{steps}" * (steps != options.sft_steps)
        root = (
            Path(config.runs)
            / f"ablations-{config.model_kind}-{config.width}{number}{'-tiny' * tiny}"
        )
        # the same baseline for every seed and arm, whatever they change
        taught = replace(
            options,
            model_kind=config.model_kind,
            width=config.width,
            runs=config.runs,
            sft_steps=steps,
        )
        tuned = stages.baseline(taught, task, examples, root)
        return load_policy(replace(config, model=str(tuned), tiny=False))[1]

    policy = load(options)
    options = replace(options, eos=policy.tokenizer.eos_id, pad=policy.tokenizer.pad_id)
    prompts, unseen = (
        measure.prompt_set(options, policy, task, part)[0]
        for part in (examples.train, examples.test)
    )
    right = rewards.make_reward(options, policy)
    (letter,) = policy.tokenizer.encode("e")

    def reward(params, rollout):
        score, valid = right.fn(params, rollout)
        share = ((rollout.response == letter) * rollout.mask).sum(1) / jnp.maximum(
            rollout.mask.sum(1), 1
        )
        return score + 2 * share * proxy, valid

    def judge(rollout):
        gold, (score, _) = right.fn(right.params, rollout)[0], reward(right.params, rollout)
        return {
            "score": score.mean(),
            "gold": gold.mean(),
            **toy_tasks.by_outcome(rollout.mask.sum(1), gold > 0),
        }

    parts, deal = algorithms.make_parts, lambda run: prompts
    return Scale(
        "small",
        options,
        (options.task,),
        load,
        reward,
        deal,
        parts,
        judge,
        toy_tasks.JUDGED,
        at_once=8,
        unseen=lambda run: unseen,
    )


def smollm2(tiny: bool, **settings) -> Scale:
    """The main job, smaller: 30 steps of 32 continuations of 16 tokens."""
    sys.path.insert(0, str(EXPERIMENTS))
    import sentiment

    config = sentiment.Sentiment(
        dtype="float32",
        steps=30,
        batch_size=32,
        response_length=16,
        kl_coef=0.05,
        kl_adaptive=False,
        eval_every=0,
        save_every=10,
        test_prompts=128,
        tiny=tiny,
    )
    config = replace(config, response_length=6, test_prompts=8) if tiny else config
    nothing = lambda *_: None  # what only many runs in one program need
    return Scale(
        "smollm2",
        replace(config, **settings),
        ("sentiment",),
        nothing,
        nothing,
        nothing,
        algorithms.make_parts,
        seeds=3,
        judged=("gold", "nats", "distinct_2"),
        alone=lambda config, arm, run: one_review_run(replace(config, tiny=tiny), arm, run),
    )


def one_review_run(config, arm: Arm, run) -> dict:
    """The numbers of one run on SmolLM2, and with which versions they were made; from its folder if
    they are there, and what was begun is gone on with. A folder is one of these settings: others
    have another. A run that diverged counts, as what it left.
    """
    import jax
    import sentiment

    root = Path(config.runs) / f"ablations-smollm2{'-tiny' * config.tiny}"
    own = replace(config, runs=str(root), seed=run.seed)
    own = replace(own, **settings_of(own, arm))
    # what differs from the defaults and changes the numbers: a setting that later versions add
    # changes no folder
    plain, given = files.settings_of(type(own)()), files.settings_of(own)
    given = {
        name: x for name, x in given.items() if x != plain[name] and name not in FREE - {"steps"}
    }
    settings = json.dumps(given, sort_keys=True) + (arm.parts.__name__ if arm.parts else "")
    words = (
        f"{config.name} {run.arm} {run.seed} {hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    )
    own = replace(own, name=re.sub(r"[^a-z0-9]+", "-", words.lower()))
    place = root / own.name
    if (place / "numbers.json").exists():
        return json.loads((place / "numbers.json").read_text()) | {"minutes": files.minutes(place)}
    own, policy = load.load_policy(replace(own, resume=files.has_started(place)))
    reviews, parts, opening = sentiment.load_prompts(own, policy)
    # one reward for all arms and seeds
    reward, policy.frozen["reward"], _ = sentiment.make_reward(
        replace(own, seed=0), policy, reviews, parts, root
    )
    made = algorithms.make_parts(own, reward)
    files.run_folder(own.runs, own.name, resume=own.resume)
    try:
        state = train.fit(
            own, policy, arm.parts(made) if arm.parts else made, opening(parts.train), folder=place
        )
    except Diverged as error:
        print(error, flush=True)
        own, policy = load.load_policy(own)
        state = ppo.init_state(own, policy.params, policy.frozen, jax.random.key(own.seed))
        saved = Checkpoints(place / "checkpoints", write=False)
        state = saved.restore(state) if saved.steps() else state
    judge = sentiment.Judge(own, policy)
    judged = judge.numbers(
        judge.read(state, opening(parts.test[: own.test_prompts]), sentiment.JUDGE_SEEDS[0])
    )
    rows = files.read_lines(place / "metrics.jsonl")
    kept = ("reward", "kl", "entropy", "length", "skipped", "barren_steps", "first_ratio_off")
    numbers = measures({key: np.array([row[key] for row in rows]) for key in kept})
    numbers |= {
        "gold": judged["sentiment"],
        "nats": judged["kl"],
        "distinct_2": judged["distinct_2"],
    }
    numbers["versions"] = files.versions()
    files.write_whole(place / "numbers.json", json.dumps(numbers) + "\n")
    return numbers | {"minutes": files.minutes(place)}


SCALES = {"ladder": ladder, "small": small, "smollm2": smollm2}


def run(question: Question, options: AblationConfig, **settings) -> dict:
    """Ask it at the scale that the options name; `settings` are the question's own, for the scale
    of that name. Among them `arms` names those that are asked there; claims about others are left
    out.
    """

    if options.scale not in SCALES:
        raise UserError(f"--scale {options.scale!r}: choose one of {', '.join(SCALES)}")
    chosen = dict(settings.get(options.scale, {}))
    if options.scale == "small":
        named = {name for claim in question.claims for name in (claim.better, claim.worse)}
        chosen["arms"] = [name for name in question.arms if name in named]
    if arms := chosen.pop("arms", None):
        claims = tuple(
            claim for claim in question.claims if {claim.better, claim.worse} <= set(arms)
        )
        question = question._replace(
            arms={name: question.arms[name] for name in arms}, claims=claims
        )
    elif options.scale == "smollm2":
        raise UserError(
            f"--scale smollm2: {question.name} has no arms for it; see the script's last lines"
        )
    load.use_compilation_cache()
    scale = SCALES[options.scale](options.tiny, **chosen)
    return ask(question, scale._replace(config=replace(scale.config, name=question.name)), options)
