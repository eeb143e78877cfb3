"""A task's whole way: examples, a model, its supervised baseline, policy optimisation
from there, and both on held-out examples.

    runs/<name>/start        a new network with its vocabulary, as a checkpoint (unless --model names one)
    runs/<name>/supervised   the run of the first stage; supervised/model is its best checkpoint
    runs/<name>/policy       the run of the second; policy/model
    runs/<name>/result.json  both, measured on the test examples; outputs.jsonl has every response

Killed at any moment, `--resume` goes on in the stage where it was.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxppo import algorithms, models, policy, pretrained, supervised, tasks, train
from jaxppo.config import validate_run
from jaxppo.data import prompts, rows
from jaxppo.data.examples import Example, Examples
from jaxppo.data.rows import Rows
from jaxppo.errors import UserError
from jaxppo.models import lora
from jaxppo.parallel import processes, sharding
from jaxppo.pretrained import vocabulary
from jaxppo.pretrained.tiny import byte_tokenizer
from jaxppo.run import files, load, log, validation
from jaxppo.run.load import Policy
from jaxppo.run.sampler import Sample
from jaxppo.tasks import Task, TaskConfig, rewards, sources
from jaxppo.tasks.measure import Evaluator, ExtraMetrics, encode_examples, format_examples
from jaxppo.tasks.optimisation import train_and_measure
from jaxppo.tasks.rewards import Reward
from jaxppo.types import Model

MakeReward = Callable[[TaskConfig, Policy], Reward]


def run(
    options: TaskConfig,
    *,
    task: Task | None = None,
    examples: Examples | None = None,
    make_reward: MakeReward = rewards.make_reward,
    judge: ExtraMetrics | None = None,
) -> dict[str, Any]:
    """Both stages of a task and their measurement: what result.json holds. A stage that
    has ended is not run again.

    `task` and `examples` take the place of those that the options name. Raises
    UserError, for names and numbers in the options before anything is written.
    """
    validate_run(options)
    algorithms.check(
        options
        # the baseline has settings of its own, and would be trained before a wrong name is
        # met
    )
    if make_reward is rewards.make_reward:
        rewards.reward_name(options)
    load.use_compilation_cache()
    task, root = task or tasks.get_task(options), task_folder(options)
    options = tiny_options(options) if options.tiny else options
    examples = examples or sources.load_examples(options)
    tuned = train_baseline(options, task, examples, root)
    done = optimise_policy(options, task, examples, root, tuned, make_reward, judge)
    if processes.is_main():
        write_report(options, root, done)
    return done


def task_folder(options: TaskConfig) -> Path:
    """The folder of the whole way; there already only with --resume. Raises
    UserError.
    """
    files.check_name(options.name)
    root = Path(options.runs) / options.name
    if (
        processes.is_main() and root.exists() and not options.resume
    ):  # the first process may have made it just now
        raise UserError(f"{root} exists: choose another --name, or continue it with --resume")
    return root


def tiny_options(options: TaskConfig) -> TaskConfig:
    """The smoke-test size: a new network of one layer over bytes."""
    return dataclasses.replace(
        options,
        model="",
        tokens="bytes",
        width=32,
        layers=1,
        sft_steps=2,
        sft_batch_size=8,
        test_rows=8,
        batch_size=8,
        prompt_length=48,
        response_length=12,
        minibatches=1,
        lora=0,
    )


def initial_checkpoint(options: TaskConfig, task: Task, examples: Examples, root: Path) -> str:
    """The checkpoint to start from: the one that is named, or a new network with a
    vocabulary of the training texts.
    """
    if options.model:
        return options.model
    place = root / "start"
    if not place.exists() and processes.is_main():
        own = format_examples(task, examples.train)
        words = [prompt + response for prompt, response in zip(own.prompts, own.responses)]
        make = {
            "bpe": vocabulary.train_bpe,
            "words": vocabulary.train_words,
            "bytes": lambda *_: byte_tokenizer(),
        }
        if options.tokens not in make:
            raise UserError(f"--tokens {options.tokens!r}: choose one of {', '.join(make)}")
        tokenizer = make[options.tokens](words, options.max_vocab)
        context = {}
        if "context" in own.extra:
            _, context["context_length"], context["context_width"] = own.extra["context"].shape
        shape = tasks.new_network(options, tokenizer.vocab_size, **context)
        params = models.make(shape).init(jax.random.key(options.seed))
        pretrained.save(
            place,
            shape,
            jax.device_get({k: x for k, x in params.items() if k != "value"}),
            tokenizer,
        )
    processes.wait_for_all("start")
    return str(place)


def train_baseline(options: TaskConfig, task: Task, examples: Examples, root: Path) -> Path:
    """The supervised stage: its best checkpoint's folder."""
    place = root / "supervised"
    if (place / "model").exists():
        return place / "model"
    settings = dataclasses.replace(
        options,
        name="supervised",
        runs=str(root),
        model=initial_checkpoint(options, task, examples, root),
        tiny=False,
        batch_size=options.sft_batch_size,
        lr=options.sft_lr,
        value_loss="none",
        patience=3,
        **prompt_settings(options, task),
        **supervised_settings(place, options.sft_steps, options.sft_eval_every),
    )
    settings, policy = load.load_policy(settings)
    parts = (examples.train, examples.validation[: options.test_rows])
    training, held_out = (_replies(settings, policy, task, part) for part in parts)
    objective = supervised.language_model(policy.model, settings, last=settings.response_length)
    evaluate = validation.make_validation(settings, policy, objective, held_out)
    files.run_folder(root, "supervised", resume=settings.resume)
    state = train.fit(settings, policy, objective, training, folder=place, evaluate=evaluate)
    return load.save_model(settings, policy, load.restore_best(place, state), place / "model")


def supervised_settings(place: Path, steps: int, every: int = 0) -> dict[str, Any]:
    """What every supervised run of a task has in place of the policy gradient's
    settings; validated `every` so many steps.
    """
    tenth = every or max(steps // 10, 1)
    return {
        "steps": steps,
        "epochs": 1,
        "minibatches": 1,
        "microbatches": 1,
        "group_size": 1,
        "oversample": 1,
        "filter_groups": False,
        "advantage": "gae",
        "loss": "clip",
        "reward_norm": "none",
        "num_tasks": 1,
        "optimizer": "adamw",
        "lr_schedule": "cosine",
        "lr_warmup": min(50, tenth),
        "eval_every": tenth,
        "save_every": tenth,
        "resume": files.has_started(place),
    }


def prompt_settings(options: TaskConfig, task: Task) -> dict[str, Any]:
    """How a task puts its prompts, as settings: whoever samples from the run finds them
    there.
    """
    return {"prompt_start": options.prompt_start or task.start, "prompt_format": task.prompt}


def _replies(config: TaskConfig, policy: Policy, task: Task, examples: Sequence[Example]) -> Rows:
    own = format_examples(task, examples)
    pairs = list(zip(own.prompts, own.responses))
    encode, eos = policy.tokenizer.encode, policy.tokenizer.eos_id
    start = prompts.start_token(config, policy.tokenizer)
    found = rows.responses(
        pairs, encode, config.length, eos=eos, longest=config.response_length, start=start
    )
    return dataclasses.replace(found, extra={**found.extra, **own.extra})


def optimise_policy(
    options: TaskConfig,
    task: Task,
    examples: Examples,
    root: Path,
    tuned: Path,
    make_reward: MakeReward,
    judge: ExtraMetrics | None,
) -> dict[str, Any]:
    """Policy optimisation from the baseline, and what both do on the test examples."""
    place = root / "policy"
    settings = dataclasses.replace(
        options,
        name="policy",
        runs=str(root),
        model=str(tuned),
        tiny=False,
        resume=files.has_started(place),
        **prompt_settings(options, task),
    )
    settings, policy = load.load_policy(settings)
    reward = make_reward(settings, policy)
    prompts = lambda part: encode_examples(settings, policy, task, part)
    training, _ = prompts(examples.train)
    measure = Evaluator(settings, policy, task, judge)
    held_out, test = (
        prompts(examples.validation[: options.test_rows]),
        prompts(examples.test[: options.test_rows]),
    )
    files.run_folder(root, "policy", resume=settings.resume)
    before, after, best = train_and_measure(
        settings,
        policy,
        reward,
        training,
        folder=place,
        measure=lambda state: measure.outputs(state, *test),
        evaluate=lambda state: measure.numbers(measure.outputs(state, *held_out)),
    )
    load.save_model(settings, policy, best, place / "model")
    return measure.compare(before, after) | {"best_step": int(best.step)}


class RewardModel(NamedTuple):
    """A trained judge of (prompt, response)."""

    model: Model
    params: Any
    encode: rows.Encode
    eos: int
    length: int
    longest: int  # tokens of a response
    accuracy: float  # on pairs held out

    def scores(self, samples: Sequence[Sample]) -> np.ndarray:
        """[N] numbers of samples: the value at the last token."""
        pairs = [(sample.prompt, sample.response) for sample in samples]
        read = rows.responses(pairs, self.encode, self.length, eos=self.eos, longest=self.longest)
        with sharding.rows_on_mesh(self.params, (read.tokens, read.mask)) as (tokens, mask):
            return np.asarray(processes.to_host(_last_value(self.model)(self.params, tokens, mask)))


@functools.cache
def _last_value(model: Model) -> Callable:
    return jax.jit(functools.partial(policy.last_value, model))


def train_reward_model(
    options: TaskConfig, pairs: list[tuple[str, str, str]], *, name: str, seed: int, steps: int
) -> RewardModel:
    """Bradley-Terry on (prompt, better, worse) from the policy's own checkpoint, as the
    run <runs>/<name>; the best of it on the tenth of the pairs that is held out.
    Trained once: gone on with, or found again.
    """
    place = Path(options.runs) / name
    settings = dataclasses.replace(
        options,
        name=name,
        batch_size=32,
        lr=min(options.sft_lr, 5e-4),
        value_loss="mse",
        critic="shared",
        value_init="zero",
        patience=0,
        seed=seed,
        **supervised_settings(place, steps),
    )
    settings, policy = load.load_policy(settings)
    encode, eos = policy.tokenizer.encode, policy.tokenizer.eos_id
    longest = settings.response_length
    parts = rows.train_validation_split(
        [prompt or better + worse for prompt, better, worse in pairs], 0.1
    )
    training, other = (
        rows.preferences(
            [pairs[i] for i in part], encode, settings.length, eos=eos, longest=longest
        )
        for part in parts
    )
    objective = supervised.bradley_terry(policy.model, centring=0.01)
    evaluate = validation.make_validation(settings, policy, objective, other)
    files.run_folder(settings.runs, name, resume=settings.resume)
    state = train.fit(settings, policy, objective, training, folder=place, evaluate=evaluate)
    best = load.restore_best(place, state)
    params = lora.merge(policy.frozen["base"], best.params)
    return RewardModel(
        policy.model, params, encode, eos, settings.length, longest, evaluate(best)["accuracy"]
    )


def write_report(options: TaskConfig, root: Path, done: dict[str, Any]) -> None:
    """outputs.jsonl, result.json, a table of responses, and the numbers in a line."""
    outputs = done.pop("outputs")
    files.write_atomically(
        root / "outputs.jsonl",
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in outputs),
    )
    done |= {"samples": outputs[:5]} | run_info(options, root)
    write_result(options, root, done)
    cells = [[x["prompt"], x["supervised"], x["policy"], x["reference"]] for x in outputs[:6]]
    log.print_table("held-out examples", ["prompt", "supervised", "policy", "reference"], cells)
    for name, (gain, low, high) in done["gain"].items():
        values = f"{done['supervised'][name]:.3f} -> {done['policy'][name]:.3f}"
        print(
            f"{name}: {values} (gain {gain:+.3f}, 95 % interval {low:+.3f} to {high:+.3f} over {done['test_rows']} test rows)"
        )
    print(f"written: {root / 'result.json'}, {root / 'outputs.jsonl'}")


def run_info(options: TaskConfig, root: Path) -> dict[str, Any]:
    """What the record of a task's whole way says besides its numbers."""
    minutes = {name: files.training_minutes(root / name) for name in ("supervised", "policy")}
    found = {"task": options.task, "seed": options.seed, "config": files.portable_settings(options)}
    return found | {"versions": files.versions(), "minutes": minutes}


def write_result(options: TaskConfig, root: Path, done: dict[str, Any]) -> None:
    """result.json, and its copy among the records where one is asked for: without
    samples, whose texts are the data's.
    """
    files.write_record(str(root), "result", done)
    own = {k: x for k, x in done.items() if k != "samples"}
    files.write_record(options.results, f"{options.task}/{options.name}", own)
