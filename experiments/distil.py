"""A large model teaches a small one: on the small one's own samples, or on the large one's.

Question   At equal numbers of samples, is more learned from a teacher that reads the student's
           samples (on-policy distillation) than from responses that the teacher writes?
Method     The teacher is SmolLM2 after a supervised stage. The student is new, with the teacher's
           vocabulary, and has seen some pairs itself. `supervised` trains it on the teacher's
           samples; `reward`, `reverse`, `forward` and `jsd` let the teacher read the student's.
           None of them has a reward, or reads a reference.
Command    python experiments/distil.py
           # --arms supervised reverse
           # --seed 1 --name distil-1 --teacher runs/distil/teacher/supervised/model
           # --data pairs.jsonl, a line each: {"prompt": ..., "reference": ...}
Data       Procedural words of up to eight letters to spell backwards, of reasoning-gym
           (Apache-2.0), as in reasoning.py, but with spaces: each letter is a token.
Found      Five seeds of the student, one teacher, 200 new words, share of right responses (95 %
           interval over seeds). The teacher .595 of samples and .830 greedy; the student before
           .007 and .391; after the teacher's samples .153 and .810; after its own .156 and .325.
           So the reverse KL on own samples adds +.003 (-.006 to +.012) to samples beside
           imitation, and takes .485 (.421 to .549) from greedy responses. The two also differ in
           AdamW with a cosine schedule and warm-up against Adam with a linear one.
Minutes    14 for the teacher, then 24 for two ways, on a core that other work shared.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import jax

from jaxppo import algorithms, cli, models, ppo, presets, pretrained, supervised, tasks, train
from jaxppo.data import prompts, rows
from jaxppo.data.examples import Examples
from jaxppo.errors import UserError
from jaxppo.models import shapes
from jaxppo.rewards import in_program
from jaxppo.run import files, load, resume
from jaxppo.run.policy import Policy
from jaxppo.run.sampler import Sampler
from jaxppo.tasks import Task, TaskConfig, sources, stages
from jaxppo.tasks.measure import Evaluator, encode_examples, format_examples
from jaxppo.types import TrainState

BASELINE = "supervised/model"  # of a task's supervised stage
ARMS = ("supervised", "reward", "reverse", "forward", "jsd")


@dataclass(frozen=True)
class Distil(TaskConfig):
    RANGES: ClassVar = dict.fromkeys(("sft_steps", "teacher_steps"), "(0, inf)")
    UNREAD: ClassVar = {
        **dict.fromkeys(("reward", "eval_samples"), "the students have no reward"),
        "policy_examples": "students are asked about all training examples",
    }

    task: str = "letters"
    name: str = "distil"
    model: str = "smollm2"
    prompt_length: int = 24
    response_length: int = 16
    width: int = 192
    layers: int = 6
    dropout: float = 0.0
    lora: int = 8
    dtype: str = "bfloat16"
    sft_steps: int = 150
    sft_batch_size: int = 32
    sft_lr: float = 1e-3
    steps: int = 150
    batch_size: int = 32
    minibatches: int = 1
    value_loss: str = "none"
    lr: float = 5e-4
    eval_every: int = 30
    save_every: int = 30
    test_rows: int = 200
    teacher_steps: int = 80
    """most steps of the teacher's supervised stage"""
    arms: tuple[str, ...] = ARMS
    """ways to learn from the teacher"""


def new_student(options: TaskConfig, teacher: Path, place: Path) -> Path:
    """Save a random network with the teacher's vocabulary."""
    if not place.exists():
        large = pretrained.load(teacher)
        sizes = {"width": options.width, "num_layers": options.layers}
        vocab_size = large.config.vocab_size
        shape = shapes.network("transformer", vocab_size=vocab_size, **sizes)
        params = dict(models.make(shape).init(jax.random.key(options.seed)))
        params.pop("value")
        pretrained.save(place, shape, jax.device_get(params), large.tokenizer)
    return place


def network(options: TaskConfig, model: str) -> TaskConfig:
    """The settings of a trained network as it is."""
    return replace(options, model=model, lora=0, teacher="")


def load_trained(options: TaskConfig, model: str) -> tuple[TaskConfig, Policy, TrainState]:
    """Load a trained network as it is: (settings, policy, state)."""
    own, policy = load.load_policy(network(options, model))
    return own, policy, ppo.init_state(own, policy.params, policy.frozen, jax.random.key(own.seed))


def teachers_samples(
    options: TaskConfig, task: Task, examples: Examples, number: int
) -> list[tuple[str, str]]:
    """So many (prompt, response) pairs, sampled from the teacher."""
    own, policy, state = load_trained(options, options.teacher)
    asked, _ = encode_examples(own, policy, task, examples.train[:number])
    texts = format_examples(task, examples.train[:number]).prompts
    pairs, sampler = [], Sampler(own, policy)
    for seed in range(-(-number // len(texts))):
        found = sampler(state, asked, seed=seed)
        pairs += [(text, x.response) for text, x in zip(texts, found, strict=True)]
    return pairs[:number]


def measure(options: TaskConfig, task: Task, examples: Examples, model: str) -> dict[str, float]:
    """The metrics of the teacher or of the student before it is taught, on test examples."""
    own, policy, state = load_trained(options, model)
    test = encode_examples(own, policy, task, examples.test[: options.test_rows])
    evaluator = Evaluator(own, policy, task, None)
    return evaluator.compute(evaluator.sample(state, *test))


def settings_of(options: TaskConfig, arm: str) -> TaskConfig:
    """The settings of one way to learn."""
    root = Path(options.runs)
    own = replace(network(options, str(root / "student" / BASELINE)), name=arm)
    if arm == "supervised":
        changes = stages.supervised_settings(root / arm, options.steps)
        return replace(own, **{**changes, "eval_every": options.eval_every})
    own = replace(own, teacher=options.teacher, resume=files.has_started(root / arm))
    return replace(presets.preset(own, "distil"), distil=arm)


def learn(options: TaskConfig, task: Task, examples: Examples, arm: str) -> dict[str, Any]:
    """Train the student in one way, and measure it on test examples."""
    place = Path(options.runs) / arm
    settings, policy = load.load_policy(settings_of(options, arm))
    encode = lambda part: encode_examples(settings, policy, task, part)
    held_out, test = (
        encode(part[: options.test_rows]) for part in (examples.validation, examples.test)
    )
    if arm == "supervised":
        number = options.steps * options.batch_size
        data = rows.responses(
            teachers_samples(options, task, examples, number),
            policy.tokenizer.encode,
            settings.length,
            eos=policy.tokenizer.eos_id,
            longest=settings.response_length,
            start=prompts.start_token(settings, policy.tokenizer),
        )
        last = settings.response_length
        parts = supervised.language_model(policy.model, settings, last=last)
    else:
        data, _ = encode(examples.train)
        parts = algorithms.make_parts(settings, in_program.no_reward)
    evaluator = Evaluator(settings, policy, task, None)
    evaluate = lambda state: evaluator.compute(evaluator.sample(state, *held_out, greedy=False))
    files.run_folder(options.runs, arm, resume=settings.resume)
    state = train.fit(settings, policy, parts, data, folder=place, evaluate=evaluate)
    best = load.restore_best(place, state)
    return evaluator.compute(evaluator.sample(best, *test)) | {"step": int(best.step)}


def main(options: Distil) -> None:
    if wrong := [arm for arm in options.arms if arm not in ARMS]:
        raise UserError(f"--arms {wrong[0]!r}: choose among {', '.join(ARMS)}")
    task, root = tasks.get_task(options), stages.check(options)
    own = stages.tiny_options(options) if options.tiny else options
    own = replace(own, tiny=False, teacher="", **stages.prompt_settings(options, task))
    arms = replace(own, runs=str(root), teacher=options.teacher or str(root / "teacher" / BASELINE))
    for arm in options.arms:
        resume.check_early(settings_of(arms, arm))
    load.use_compilation_cache()
    examples = sources.load_examples(options)
    if not options.teacher:
        large = own if options.tiny else replace(own, sft_steps=options.teacher_steps)
        stages.train_baseline(large, task, examples, root / "teacher")
    start = new_student(own, Path(arms.teacher), root / "new")
    small = replace(own, model=str(start), lora=0)
    stages.train_baseline(small, task, examples, root / "student")
    known = {} if options.teacher else {"teacher": arms.teacher}
    known["student"] = str(root / "student" / BASELINE)
    before = {who: measure(arms, task, examples, model) for who, model in known.items()}
    found = {arm: learn(arms, task, examples, arm) for arm in options.arms}
    record = {"seed": options.seed, "config": files.portable_settings(options)}
    record |= {"before": before, "arms": found}
    files.write_record(str(root), "result", record)
    files.write_record(options.results, f"distil/{options.name}", record)
    for arm, metrics in (before | found).items():
        print(arm + ": " + ", ".join(f"{name} {x:.3f}" for name, x in metrics.items()))


if __name__ == "__main__":
    cli.script(main, Distil)
