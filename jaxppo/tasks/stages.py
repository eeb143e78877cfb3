"""Run a task's stages: data, model, supervised baseline, policy optimisation, test.

    runs/<name>/start        a new network and its vocabulary (without --model)
    runs/<name>/supervised   the supervised run; supervised/model is its best checkpoint
    runs/<name>/policy       the policy optimisation; policy/model likewise
    runs/<name>/examples.sha256  of the examples' texts, which --resume compares
    runs/<name>/result.json  both measured on test examples; outputs.jsonl has responses

With `--sft-steps 0` there is no supervised stage, and results say `start` instead.
`--resume` continues a killed run in the stage where it was.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxppo import models, parallel, pretrained, supervised, tasks, train
from jaxppo.data import prompts, rows, table
from jaxppo.data.examples import Example, Examples
from jaxppo.data.rows import Rows
from jaxppo.errors import UserError
from jaxppo.parallel import processes
from jaxppo.pretrained import vocabulary
from jaxppo.pretrained.tiny import byte_tokenizer
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.run import files, load, log, resume, start, validation
from jaxppo.run.policy import Policy
from jaxppo.tasks import Task, TaskConfig, metrics, rewards, sources
from jaxppo.tasks.measure import Evaluator, ExtraMetrics, encode_examples, format_examples
from jaxppo.tasks.optimisation import train_and_measure
from jaxppo.tasks.rewards import MakeReward

C = TypeVar("C", bound=TaskConfig)


def run(
    options: TaskConfig,
    *,
    task: Task | None = None,
    examples: Callable[[], Examples] | None = None,
    make_reward: MakeReward = rewards.make_reward,
    extra_metrics: ExtraMetrics | None = None,
    whole_batch: bool = False,
) -> dict[str, Any]:
    """Run both stages, measure them and return the contents of result.json. A finished
    stage is not run again.

    Args:
        options: settings. Wrong ones raise UserError before anything is written.
        task: instead of the one that the options name.
        examples: loads the examples, instead of the task's own.
        make_reward: makes the reward of the policy optimisation.
        extra_metrics: more metrics of samples; its "score" chooses the checkpoint.
        whole_batch: whether the reward compares rows of the whole batch. An error
            where a device sees only its own.
    """
    task, root = task or tasks.get_task(options), check(options)
    options = tiny_options(options) if options.tiny else options
    if make_reward is rewards.make_reward:
        rewards.reward_name(options)
    check_resumed(options, task, root)
    mesh = parallel.uses_mesh(options.parallel, options.mesh)
    devices = 1 if mesh else parallel.row_shards(options.parallel)
    if whole_batch and devices > 1:
        raise UserError(
            f"the reward compares rows of the whole batch, of which each of {devices} devices sees "
            f"its own under pmap; add --mesh data={devices}"
        )
    load.use_compilation_cache()
    loaded = examples() if examples else sources.load_examples(options)
    check_same_examples(options, loaded, root)
    references = format_examples(task, loaded.test[: options.test_rows]).references
    metrics.evaluate(task.metrics, references[:1], references[:1])  # finds missing packages
    train_baseline(options, task, loaded, root)
    result = optimise_policy(options, task, loaded, root, make_reward, extra_metrics)
    if processes.is_main():
        write_report(options, root, result)
    return result


def check(options: TaskConfig) -> Path:
    """Return the stages' folder. Raises UserError for settings with which a stage
    cannot begin, and for a folder that exists without --resume.
    """
    start.check_run(options)
    if options.lora and not (options.model or options.tiny):
        raise UserError(
            "without --model the network is new, and adapters would leave its weights random; "
            "add --lora 0"
        )
    if options.tiny:
        start.check_run(tiny_options(options))
    devices = parallel.row_shards(options.parallel, options.mesh)
    if odd := options.sft_batch_size % devices:
        raise UserError(
            f"--sft-batch-size {options.sft_batch_size} does not divide into {devices} devices; "
            f"use {options.sft_batch_size + devices - odd}"
        )
    return files.check_new(options.runs, options.name, resume=options.resume, mark="")


def check_resumed(options: TaskConfig, task: Task, root: Path) -> None:
    """Raise UserError if a setting has changed that must not, since either stage began.
    Call it before anything is loaded.
    """
    for stage in (supervised_config, policy_config):
        resume.check_early(stage(options, task, root), also=("prompt_format",))


def check_same_examples(options: TaskConfig, examples: Examples, root: Path) -> None:
    """Raise UserError if the examples are not those that the first stage began with,
    unless `data_changed` allows it: test examples might be in its training part.
    """
    texts = [[(x.prompt, x.reference) for x in part] for part in examples]
    found = table.hash_columns(dict(zip(Examples._fields, texts)))
    path = root / "examples.sha256"
    resume.check_data(options, path.read_text().strip() if path.exists() else "", found)
    if processes.is_main():
        root.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, found + "\n")


def tiny_options(options: C) -> C:
    """Return the settings of a smoke test: a new network of one layer over bytes."""
    return dataclasses.replace(
        options,
        model="",
        tokens="bytes",
        width=32,
        layers=1,
        sft_steps=min(options.sft_steps, 2),
        sft_batch_size=8,
        test_rows=8,
        batch_size=8,
        prompt_length=48,
        response_length=12,
        minibatches=1,
        lora=0,
    )


def initial_checkpoint(options: TaskConfig, task: Task, examples: Examples, root: Path) -> None:
    """Make a new network with a vocabulary of the training texts, unless the options
    name a model.
    """
    if not options.model and not (root / "start").exists() and processes.is_main():
        own = format_examples(task, examples.train)
        texts = [prompt + x for prompt, x in zip(own.prompts, own.responses)]
        make_tokenizer = {
            "bpe": vocabulary.train_bpe,
            "words": vocabulary.train_words,
            "bytes": lambda *_: byte_tokenizer(),
        }
        if options.tokens not in make_tokenizer:
            names = ", ".join(make_tokenizer)
            raise UserError(f"--tokens {options.tokens!r}: choose one of {names}")
        tokenizer = make_tokenizer[options.tokens](texts, options.max_vocab)
        context = {}
        if "context" in own.extra:
            _, context["context_length"], context["context_width"] = own.extra["context"].shape
        save_new_network(options, root, tokenizer, **context)
    processes.wait_for_all("start")


def first_model(options: TaskConfig, root: Path) -> str:
    """Return the model that the options name, or the new network's folder."""
    return options.model or str(root / "start")


def baseline(options: TaskConfig, root: Path) -> str:
    """Return the model that the policy stage starts from: the supervised one, or the
    first one without a supervised stage.
    """
    return str(root / "supervised" / "model") if options.sft_steps else first_model(options, root)


def save_new_network(options: TaskConfig, root: Path, tokenizer: Tokenizer, **context: int) -> None:
    """Save a new network with this vocabulary as the start of a task's stages."""
    shape = tasks.new_network(options, tokenizer.vocab_size, **context)
    params = models.make(shape).init(jax.random.key(options.seed))
    params = jax.device_get({name: x for name, x in params.items() if name != "value"})
    pretrained.save(root / "start", shape, params, tokenizer)


def train_baseline(options: TaskConfig, task: Task, examples: Examples, root: Path) -> Path:
    """Run the supervised stage, if there is one, and return the `baseline`."""
    if not (root / "supervised" / "model").exists():
        initial_checkpoint(options, task, examples, root)
    if not options.sft_steps:
        return Path(baseline(options, root))
    demonstrations = examples.train[: options.sft_examples or None]
    parts = (demonstrations, examples.validation[: options.test_rows])

    def make_rows(settings: TaskConfig, policy: Policy) -> tuple[Rows, ...]:
        check_policy_stage(settings, policy, task, examples)
        return tuple(_supervised_rows(settings, policy, task, part) for part in parts)

    return train_supervised(options, task, root, make_rows)


def check_policy_stage(
    settings: TaskConfig, policy: Policy, task: Task, examples: Examples
) -> None:
    """Raise UserError before the supervised stage for what would end the next one: no
    room for a prompt, or a reward model with another tokenizer.
    """
    start = prompts.start_token(settings, policy.tokenizer)
    first = tasks.format_prompt(task, examples.train[0])
    prompts.encode([first], policy.tokenizer, settings.prompt_length, too_long="last", start=start)
    if settings.reward == "model":
        load.load_reward_model(settings, policy.tokenizer)


def train_supervised(
    options: C, task: Task, root: Path, make_rows: Callable[[C, Policy], tuple[Rows, ...]]
) -> Path:
    """Train on rows, (training, validation), unless that is done. Returns the folder of
    the best checkpoint.
    """
    place = root / "supervised"
    if (place / "model").exists():
        return place / "model"
    settings, policy = load.load_policy(supervised_config(options, task, root))
    training, held_out = make_rows(settings, policy)
    objective = supervised.language_model(policy.model, settings, last=settings.response_length)
    evaluate = validation.make_validation(settings, policy, objective, held_out)
    files.run_folder(root, "supervised", resume=settings.resume)
    state = train.fit(settings, policy, objective, training, folder=place, evaluate=evaluate)
    return load.save_model(settings, policy, load.restore_best(place, state), place / "model")


def supervised_config(options: C, task: Task, root: Path) -> C:
    return dataclasses.replace(
        options,
        name="supervised",
        runs=str(root),
        model=first_model(options, root),
        tiny=False,
        batch_size=options.sft_batch_size,
        lr=options.sft_lr,
        value_loss="none",
        patience=3,
        **prompt_settings(options, task),
        **supervised_settings(root / "supervised", options.sft_steps, options.sft_eval_every),
    )


def supervised_settings(place: Path, steps: int, every: int = 0) -> dict[str, Any]:
    """Return what replaces the settings of the policy gradient in a supervised run.
    `every`: steps between validations.
    """
    tenth = every or max(steps // 10, 1)
    return {
        "steps": steps,
        "epochs": 1,
        "minibatches": 1,
        "microbatches": 1,
        "group_size": 1,
        "oversample": 1,
        "steps_per_call": 1,
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
    """Return the prompt format as settings, for whoever samples from the run later."""
    return {"prompt_start": options.prompt_start or task.start, "prompt_format": task.prompt}


def _supervised_rows(
    config: TaskConfig, policy: Policy, task: Task, examples: Sequence[Example]
) -> Rows:
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
    make_reward: MakeReward,
    extra_metrics: ExtraMetrics | None,
) -> dict[str, Any]:
    """Optimise the baseline, and measure both on the test examples."""
    place = root / "policy"
    settings, policy = load.load_policy(policy_config(options, task, root))
    reward = make_reward(settings, policy)
    encode = lambda part: encode_examples(settings, policy, task, part)
    training, _ = encode(examples.train[: options.policy_examples or None])
    held_out = encode(examples.validation[: options.test_rows])
    test = encode(examples.test[: options.test_rows])
    evaluator = Evaluator(settings, policy, task, extra_metrics)
    files.run_folder(root, "policy", resume=settings.resume)
    before, after, best = train_and_measure(
        settings,
        policy,
        reward,
        training,
        folder=place,
        measure=lambda state: evaluator.sample(state, *test),
        evaluate=lambda state: evaluator.compute(evaluator.sample(state, *held_out, greedy=False)),
        validation=held_out[0],
    )
    load.save_model(settings, policy, best, place / "model")
    found = evaluator.compare(before, after, start=start_name(options))
    return found | {"best_step": int(best.step), "curve": curve(place)}


def curve(folder: Path) -> dict[str, list]:
    """Return reward and KL of every step, and (step, score) of every validation."""
    rows = files.read_metrics(folder)
    name = "validation_score"
    return {
        "reward": [round(row["reward"], 4) for row in rows],
        "kl": [round(row["kl"], 4) for row in rows],
        "validation": [[row["step"], round(row[name], 4)] for row in rows if name in row],
    }


def start_name(options: TaskConfig) -> str:
    """Return what results call the policy before its optimisation."""
    return "supervised" if options.sft_steps else "start"


def policy_config(options: C, task: Task, root: Path) -> C:
    return dataclasses.replace(
        options,
        name="policy",
        runs=str(root),
        model=baseline(options, root),
        tiny=False,
        resume=files.has_started(root / "policy"),
        **prompt_settings(options, task),
    )


def write_report(options: TaskConfig, root: Path, result: dict[str, Any]) -> None:
    """Write outputs.jsonl and result.json, and print some responses and the gains."""
    outputs = result.pop("outputs")
    files.write_jsonl(root / "outputs.jsonl", outputs)
    result |= {"samples": outputs[:5]} | run_info(options, root)
    write_result(options, root, result)
    start = start_name(options)
    columns = ["prompt", start, "policy", "reference"]
    cells = [[row[name] for name in columns] for row in outputs[:6]]
    log.print_table("held-out examples", columns, cells)
    for name, (gain, low, high) in result["gain"].items():
        before, after = result[start][name], result["policy"][name]
        print(
            f"{name}: {before:.3f} -> {after:.3f} (gain {gain:+.3f}, 95 % interval {low:+.3f} to"
            f" {high:+.3f} over {result['test_rows']} test rows)"
        )
    for name in sorted(result["policy"].keys() & result[start].keys() - result["gain"].keys()):
        print(f"{name}: {result[start][name]:.3f} -> {result['policy'][name]:.3f}")
    print(f"written: {root / 'result.json'}, {root / 'outputs.jsonl'}")


def run_info(options: TaskConfig, root: Path) -> dict[str, Any]:
    """Return the settings, versions and minutes for a result: of all trainings, such as
    those of reward models.
    """
    trained = sorted(path.parent for path in root.glob("*/metrics.jsonl"))
    return {
        "task": options.task,
        "seed": options.seed,
        "config": files.portable_settings(options),
        "versions": files.versions(),
        "minutes": {folder.name: files.training_minutes(folder) for folder in trained},
    }


def write_result(options: TaskConfig, root: Path, result: dict[str, Any]) -> None:
    """Write result.json, and its copy in --results without samples, whose texts are the
    data's.
    """
    files.write_record(str(root), "result", result)
    copy = {name: x for name, x in result.items() if name != "samples"}
    files.write_record(options.results, f"{options.task}/{options.name}", copy)
