"""The scales of the ablations: `--scale` of each script.

ladder    Learnable toy tasks (or small games of several turns) and a network of 13,000 parameters,
          new for every seed. Minutes on a core.
small     Words spelt backwards, by a transformer of .95 million parameters that is first trained
          until .45 are right (once, in a minute). Only the arms of claims: two minutes of a core
          for each run, five with four epochs.
smollm2   Reviews continued positively by SmolLM2-135M with adapters. The reward is a classifier
          (trained once), and VADER is the judge that is not trained against. Three arms, three
          seeds, one run after the other. Finished runs in runs/ablations-smollm2 are reused.
"""

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from jaxppo import algorithms, ppo, tasks, train
from jaxppo.ablation import games, sweep, toy_tasks
from jaxppo.ablation.question import AblationConfig, Arm, Question, Scale, arm_settings
from jaxppo.ablation.sweep import Run
from jaxppo.ablation.training import run_ablation, summarise
from jaxppo.config import NO_RESULTS
from jaxppo.data.examples import Examples
from jaxppo.errors import Diverged, UserError
from jaxppo.rewards import in_program, text
from jaxppo.run import files, load
from jaxppo.run.checkpoint import Checkpoints
from jaxppo.run.load import load_policy
from jaxppo.run.start import check_run
from jaxppo.tasks import judged, measure, rewards, sources, stages
from jaxppo.types import Params

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sentiment  # experiments/sentiment.py

LETTERS = 8  # of the words at scale small


def taught(scale: Scale, teacher: Params) -> Scale:
    """The scale with a teacher of the policy's kind, for the step and, as `base["teacher"]`, for
    models that sample from it.
    """
    model = scale.load(scale.config).model

    def load(config):
        policy = scale.load(config)
        frozen = {"teacher": teacher, "base": {**policy.frozen["base"], "teacher": teacher}}
        return replace(policy, frozen={**policy.frozen, **frozen})

    make_parts = lambda config, reward: scale.make_parts(config, reward)._replace(teacher=model)
    return scale._replace(load=load, make_parts=make_parts)


def ladder(tiny: bool, turns: bool = False, teacher: int = 0, **settings) -> Scale:
    """The learnable toy tasks, or `tasks`, or the games of several `turns`, with these settings.
    `teacher`: steps of PPO in which one is trained on the first task.
    """
    if turns:
        return Scale(
            "ladder",
            replace(games.GameConfig(), **settings),
            tuple(games.GAMES)[: 1 if tiny else None],  # each is a program to compile
            games.load,
            in_program.episode_score,
            lambda run: games.instances(run.task),
            games.make_parts,
            of_task={name: games.settings(name) for name in games.GAMES},
        )
    tasks = settings.pop("tasks", toy_tasks.LEARNABLE)
    scale = Scale(
        "ladder",
        replace(toy_tasks.ToyConfig(), **settings),
        tasks,
        toy_tasks.load,
        toy_tasks.reward,
        lambda run: toy_tasks.RandomPrompts(run.task),
        algorithms.make_parts,
        toy_tasks.judge,
        toy_tasks.JUDGE_METRICS,
    )
    if not teacher:
        return scale
    config = replace(scale.config, steps=2 if tiny else teacher, lr=toy_tasks.ToyConfig.lr)
    make_parts = lambda settings: scale.make_parts(settings, scale.reward)
    ppo_run = Run("teacher", 1000, {}, scale.tasks[0])
    (found,) = sweep.run(config, [ppo_run], scale.load, make_parts, scale.prompts)
    return taught(scale, without_value(found.state.params))


def without_value(params: Params) -> Params:
    return {name: x for name, x in params.items() if name != "value"}


def short_words(options: tasks.TaskConfig) -> Examples:
    """Words of up to LETTERS letters to spell backward. The bare word is prompt enough."""
    bare = lambda x: x._replace(prompt=x.prompt.removeprefix("Spell backward: "))
    found = sources.puzzles(options, max_word_len=LETTERS)
    return Examples(*([bare(x) for x in part] for part in found))


def small(
    tiny: bool,
    proxy: bool = False,
    longer: Mapping[str, int] = MappingProxyType({}),
    teacher: int = 0,
    **settings,
) -> Scale:
    """The task "spelling", from a supervised baseline that is trained once and kept in
    runs/ablations-<kind>-<width>. The judge has the test prompts.

    The reward is 1 for the right answer. `proxy` adds a reward for every letter e, which pays most
    if nothing else is written. `longer`: supervised steps of kinds of networks that learn slowly;
    `teacher`: those of one, if there is one.
    """
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
    if tiny:  # the arms divide the batch into minibatches, so its size stays
        options = replace(stages.tiny_options(options), batch_size=options.batch_size)
    options = replace(options, **settings)
    task, longer = tasks.get_task(options), {} if tiny else longer
    examples = short_words(options)

    def load(config, steps=0):
        steps = steps or longer.get(config.model_kind, options.sft_steps)
        number = f"-{steps}" * (steps != options.sft_steps)
        name = f"ablations-{config.model_kind}-{config.width}{number}{'-tiny' * tiny}"
        # one baseline for all seeds and arms, whatever else they change
        supervised = replace(
            options,
            model_kind=config.model_kind,
            width=config.width,
            runs=config.runs,
            sft_steps=steps,
        )
        model = stages.train_baseline(supervised, task, examples, Path(config.runs) / name)
        return load_policy(replace(config, model=str(model), tiny=False))[1]

    policy = load(options)
    options = replace(options, eos=policy.tokenizer.eos_id, pad=policy.tokenizer.pad_id)
    training, test = (
        measure.encode_examples(options, policy, task, part)[0]
        for part in (examples.train, examples.test)
    )
    right = rewards.make_reward(options, policy)
    (letter,) = policy.tokenizer.encode("e")

    def reward(params, rollout):
        score, valid = right.fn(params, rollout)
        hits = ((rollout.response == letter) * rollout.mask).sum(1)
        share = hits / jnp.maximum(rollout.mask.sum(1), 1)
        return score + 2 * share * proxy, valid

    def judge(rollout):
        gold, score = right.fn(right.params, rollout)[0], reward(right.params, rollout)[0]
        lengths = toy_tasks.length_by_outcome(rollout.mask.sum(1), gold > 0)
        best = toy_tasks.best_of_8(score, rollout)
        return {"score": score.mean(), "best_of_8": best, "gold": gold.mean(), **lengths}

    scale = Scale(
        "small",
        options,
        (options.task,),
        load,
        reward,
        lambda run: training,
        algorithms.make_parts,
        judge,
        toy_tasks.JUDGE_METRICS,
        at_once=8,
        unseen=lambda run: test,
    )
    if not teacher:
        return scale
    teacher = options.sft_steps if tiny else teacher
    return taught(scale, without_value(load(options, teacher).params))


def smollm2(tiny: bool, **settings) -> Scale:
    """A smaller main job: 30 steps of 32 continuations of 16 tokens."""
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
    unused = lambda *_: None  # only runs that share a program need these
    return Scale(
        "smollm2",
        replace(config, **settings),
        ("sentiment",),
        unused,
        unused,
        unused,
        algorithms.make_parts,
        seeds=3,
        judged=("gold", "nats", "distinct_2"),
        alone=lambda config, arm, run: train_on_reviews(replace(config, tiny=tiny), arm, run),
    )


def train_on_reviews(config: sentiment.Sentiment, arm: Arm, run: Run) -> dict:
    """Train one run on SmolLM2 and return its metrics and versions; resume it, or read the metrics
    from its folder if it is finished. The folder's name depends on the settings. A run that
    diverged counts with its last checkpoint.
    """
    check_run(config)
    root = Path(config.runs) / f"ablations-smollm2{'-tiny' * config.tiny}"
    config = replace(config, runs=str(root), seed=run.seed)
    config = replace(config, **arm_settings(config, arm))
    config = replace(config, name=folder_name(config, arm, run))
    folder = root / config.name
    if (folder / "numbers.json").exists():
        found = json.loads((folder / "numbers.json").read_text())
        return found | {"minutes": files.training_minutes(folder)}
    config, policy = load_policy(replace(config, resume=files.has_started(folder)))
    reviews, split, encode = sentiment.load_prompts(config, policy)
    # one reward for all arms and seeds
    reward, _ = sentiment.make_reward(replace(config, seed=0), policy, reviews, split, root)
    policy.frozen["reward"] = reward.params or {}
    parts = algorithms.make_parts(config, reward.fn)
    parts = arm.parts(parts) if arm.parts else parts
    files.run_folder(config.runs, config.name, resume=config.resume)
    try:
        state = train.fit(config, policy, parts, encode(split.train), folder=folder)
    except Diverged as error:
        print(error, flush=True)
        config, policy = load_policy(config)
        key = jax.random.key(config.seed)
        state = ppo.init_state(config, policy.params, policy.frozen, key)
        saved = Checkpoints(folder / "checkpoints", write=False)
        state = saved.restore(state) if saved.steps() else state
    judge = judged.make_judge(config, policy, text.vader(), rows=min(64, config.test_prompts))
    test = encode(split.test[: config.test_prompts])
    measured = judged.summarise(judge(state, test, sentiment.JUDGE_SEEDS[0]))
    rows = files.read_metrics(folder)
    names = ("reward", "kl", "entropy", "length", "skipped", "barren_steps", "first_ratio_off")
    found = summarise({name: np.array([row[name] for row in rows]) for name in names})
    found |= {"gold": measured["sentiment"], "nats": measured["kl"]}
    found |= {"distinct_2": measured["distinct_2"], "versions": files.versions()}
    files.write_atomically(folder / "numbers.json", json.dumps(found) + "\n")
    return found | {"minutes": files.training_minutes(folder)}


def folder_name(config: sentiment.Sentiment, arm: Arm, run: Run) -> str:
    """A name with a hash of the settings that change the result and differ from the defaults: a
    setting that a later version adds changes no name.
    """
    default, settings = files.portable_settings(type(config)()), files.portable_settings(config)
    settings = {
        name: x for name, x in settings.items() if x != default[name] and name not in NO_RESULTS
    }
    text = json.dumps(settings, sort_keys=True) + (arm.parts.__name__ if arm.parts else "")
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    words = f"{config.name} {run.arm} {run.seed} {digest}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower())


SCALES = {"ladder": ladder, "small": small, "smollm2": smollm2}


def run(question: Question, options: AblationConfig, **settings) -> dict:
    """Run an ablation at the scale of the options. `settings` has the question's own settings for
    some scales: a dict by the scale's name. Its `arms` names the arms to train; claims about others
    are left out. Its `rollouts` is `Scale.rollouts`.
    """
    if options.scale not in SCALES:
        raise UserError(f"--scale {options.scale!r}: choose one of {', '.join(SCALES)}")
    chosen = dict(settings.get(options.scale, {}))
    if options.scale == "small":
        claimed = {name for claim in question.claims for name in (claim.better, claim.worse)}
        chosen["arms"] = [name for name in question.arms if name in claimed]
    if names := chosen.pop("arms", None):
        arms = {name: question.arms[name] for name in names}
        claims = tuple(x for x in question.claims if {x.better, x.worse} <= set(arms))
        question = question._replace(arms=arms, claims=claims)
    elif options.scale == "smollm2":
        raise UserError(
            f"--scale smollm2: {question.name} has no arms for it; name some in the script's `main`"
        )
    load.use_compilation_cache()
    own = {"rollouts": chosen.pop("rollouts")} if "rollouts" in chosen else {}
    scale = SCALES[options.scale](options.tiny, **chosen)
    config = replace(scale.config, name=question.name, runs=options.runs)
    return run_ablation(question, scale._replace(config=config, **own), options)
