"""The command `jaxppo`, and the frame around every script: options, one-line errors, exit codes. No JAX before it is needed."""

import dataclasses
import difflib
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from jaxppo import doctor as checks
from jaxppo import export as exporting
from jaxppo.config import Config, ModelConfig, RunConfig, RunError, UserError, from_file
from jaxppo.options import parse
from jaxppo.presets import ALGORITHMS, preset


def script(
    main: Callable[[Any], None],
    config: type,
    *,
    args: list[str] | None = None,
    alone: bool = False,
    about: str = "",
    prog: str = "",
) -> None:
    """Run `main(options)` with the options of the dataclass `config` from the command line; `about` stands above them in
    --help, or else what the script says of itself, and `prog` is what is run.

    A RunError is one line on stderr and its exit code; a wrong option is one, too. A run joins its other processes first,
    if there are any, unless it is to be `alone`.
    """
    options = parse(config, args=args, description=about or sys.modules[main.__module__].__doc__ or "", prog=prog)
    # The compiler's remarks about the machine are no news to the user.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        if isinstance(options, RunConfig) and not alone:
            from jaxppo import processes, signals

            processes.connect(options.distributed, timeout=options.connect_timeout, heartbeat=options.heartbeat)
            signals.stop_before_training()
        main(options)
    except RunError as error:
        if getattr(options, "traceback", False):
            raise
        print(f"error: {error}", file=sys.stderr)
        leave(error.code)
    except KeyboardInterrupt:
        print("stopped; continue with --resume" if isinstance(options, RunConfig) and not alone else "stopped", file=sys.stderr)
        leave(130)
    except Exception:
        if not several_processes():
            raise
        traceback.print_exc()
        leave(1)


def several_processes() -> bool:
    """Whether this process has joined others."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def leave(code: int) -> NoReturn:
    """Exit. One process of several does not wait for the others, which may be waiting for it: they see its end, and end."""
    if several_processes():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code) from None


@dataclass(frozen=True)
class SampleOptions:
    """Responses of a trained run to prompts, to a file of them, or in a conversation.

    $ jaxppo sample runs/sentiment "The film is" "I went to see"
    $ jaxppo sample runs/sentiment --file prompts.txt --temperature 0
    $ jaxppo sample runs/sentiment --max-tokens 12 < prompts.txt
    $ jaxppo sample runs/assistant --chat
    """

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """the run's folder, or that of a task's whole way; its best checkpoint is taken, as by export and eval"""
    prompts: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="PROMPT ...")]] = ()
    """prompts, which are put as the run's own were (a task has a format), of at most its --prompt-length tokens (a longer one
    loses its beginning); without any, the lines of standard input, as they are typed when that is a terminal"""
    file: Path | None = None
    """prompts from a file, one a line; of a .jsonl file, the "prompt" of each line, and what else the run's format names"""
    chat: bool = False
    """prompts are turns in the checkpoint's own chat format; at a terminal they are one conversation"""
    temperature: float | None = None
    """of sampling, 0 = always the likeliest token; without it the run's own"""
    max_tokens: int | None = None
    """most tokens of a response, not above the run's own; without it that"""
    seed: int = 0
    """of the noise; the same prompts get the same responses"""


def sample(options: SampleOptions) -> None:
    """Print one response to each prompt."""
    from jaxppo import tracking

    run = tracking.place_of(options.run)
    talking = not options.prompts and not options.file and sys.stdin.isatty()
    texts = [] if talking else prompts_of(options)

    from jaxppo import sampler, train

    train.use_compilation_cache()
    config, policy, state = train.restore(run)
    config = sampler.narrowed(config, temperature=options.temperature, max_tokens=options.max_tokens)
    greedy = options.temperature == 0
    if talking:
        print("a line is a prompt; the end of input (Ctrl-D) ends this", file=sys.stderr)
        stream = sampler.Stream(config, policy, state, greedy=greedy)
        sampler.converse(stream, sampler.typed(), sampler.show, seed=options.seed, chat=options.chat)
        return
    start = None if options.chat else sampler.start_of(config, policy.tokenizer)
    if options.chat:
        sampler.check_chat(policy.tokenizer, config.prompt_length)
    chat = lambda x: policy.tokenizer.apply_chat([{"role": "user", "content": x["prompt"]}])
    asked = [chat(x) if options.chat else sampler.put(config, x) for x in texts]
    if remark := sampler.cut(asked, policy.tokenizer, config.prompt_length - (start is not None)):
        print(f"note: {remark}", file=sys.stderr)
    prompts = train.encode(asked, policy.tokenizer, config.prompt_length, too_long="last", start=start)
    before, gap = iter([x["prompt"] for x in texts] if options.chat else asked), "\t" * options.chat
    draw = train.Sampler(config, policy, rows=min(8, len(texts)), greedy=greedy)
    for part in draw.parts(state, prompts, seed=options.seed):
        for done in part:
            print(tracking.printable(next(before)) + gap + tracking.printable(done.response), flush=True)


def prompts_of(options: SampleOptions) -> list[dict[str, str]]:
    """From the command line, a file or standard input, with what a file of JSON has beside each. Raises UserError when there are
    none."""
    if options.prompts and options.file:
        raise UserError("prompts on the command line and --file; give one of them")
    if options.file and options.file.suffix in (".jsonl", ".gz"):
        from jaxppo.data import jsonl

        rows = [row for _, row in jsonl.read(options.file, strings=("prompt",))]
        return [{name: x for name, x in row.items() if isinstance(x, str)} for row in rows]
    try:
        lines = options.file.read_text("utf-8").split("\n") if options.file else [] if options.prompts else sys.stdin
        texts = list(options.prompts) or [line.rstrip("\r\n") for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{options.file or 'standard input'} cannot be read as prompts ({error})") from error
    if not texts:
        raise UserError("no prompts; give some on the command line, with --file or on standard input")
    return [{"prompt": text} for text in texts]


@dataclass(frozen=True)
class EvalOptions:
    """Metrics of a trained run on a task's held-out examples, with 95 % intervals; writes eval.json and eval.jsonl there.

    $ jaxppo eval runs/translation --task translation
    $ jaxppo eval runs/spelling --task spelling --samples 8
    """

    run: tyro.conf.Positional[Path]
    """the folder of a task's whole way, or of one run"""
    task: str
    """name of the task"""
    rows: int = 500
    """most test examples"""
    samples: int = 0
    """samples for each example, for pass@k; 0 = none"""
    data: str = ""
    """examples, all of which are measured: a file of {"prompt": ..., "reference": ...} a line, or a hub data set id; without it
    the test part of the run's, or else of the task's own"""


def evaluate(options: EvalOptions) -> None:
    """Print and write the metrics of a run."""
    import json

    from jaxppo import measure, tracking, train

    train.use_compilation_cache()
    done = measure.held_out(options.run, options.task, rows=options.rows, samples=options.samples, data=options.data)
    outputs = done.pop("outputs")
    tracking.write_whole(options.run / "eval.jsonl", "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in outputs))
    tracking.write_whole(options.run / "eval.json", json.dumps(done, indent=1) + "\n")
    for name, x in done.items():
        if isinstance(x, list):
            print(f"{name}: {x[0]:.3f} (95 % interval {x[1]:.3f} to {x[2]:.3f} over {done['test_rows']} examples)")
        elif name.startswith("pass@"):
            print(f"{name}: {x:.3f}")


@dataclass(frozen=True)
class AlgorithmsOptions:
    """The algorithms that --algorithm knows: parts, paper, one line each.

    $ jaxppo algorithms
    $ jaxppo algorithms --settings
    """

    settings: bool = False
    """print every setting of each, too"""


def algorithms(options: AlgorithmsOptions) -> None:
    """Print the table of presets."""
    defaults = Config()
    names = ("loss", "advantage", "aggregate", "kl", "value_loss")
    for name, chosen in ALGORITHMS.items():
        full = preset(defaults, name)
        kl = "none" if full.kl_coef == 0 else f"{full.kl} in {full.kl_place}"
        parts = [full.update] if full.update != "gradient" else [full.loss]
        critic = "no critic" if full.value_loss == "none" else f"critic {full.critic}"
        parts += [full.advantage, full.aggregate, f"KL {kl}", critic]
        print(f"{name:30}{' | '.join(parts)}\n{'':30}{chosen.about}\n{'':30}{chosen.paper}")
        if options.settings:
            rest = {key: x for key, x in chosen.settings.items() if key not in names}
            print(f"{'':30}{' '.join(f'--{key.replace(chr(95), chr(45))} {x}' for key, x in rest.items())}")


@dataclass(frozen=True)
class PlanOptions(RunConfig):
    """Whether the whole step fits a TPU slice, before it is launched: memory, a lower bound of seconds, collectives.

    $ jaxppo plan --topology v5e:2x4 --model smollm2 --batch-size 256
    $ jaxppo plan runs/sentiment/config.json --topology v6e:1x1
    $ jaxppo plan runs/translation/policy/config.json              # of a task: its second stage
    """

    config: tyro.conf.Positional[Path | None] = None
    """config.json of a run, of any script, whose settings to take as they are; --config takes settings that options override"""
    topology: str = ""
    """chip and size of the slice: v4, v5e, v5p or v6e, such as v5e:2x4; without it the devices that are here"""


def plan(options: PlanOptions) -> None:
    """Compile the step ahead of time and print what it needs."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu" if options.topology else "")
    if not os.environ["JAX_PLATFORMS"]:
        del os.environ["JAX_PLATFORMS"]
    chosen: RunConfig = options
    if options.config:
        if not options.config.exists():
            raise UserError(f"{options.config} is missing; give the config.json of a run")
        stored = from_file(RunConfig, options.config)
        chosen = dataclasses.replace(stored, mesh=options.mesh or stored.mesh)
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"  # the compiler's warnings are read, not shown
    from jaxppo import chips
    from jaxppo import plan as plans

    chip, devices = chips.topology(options.topology) if options.topology else (None, chips.here())
    shape = chips.shape_of(chosen.model) if chosen.model or not options.config else new_network(options.config)
    report = plans.compile_plan(chosen, shape, devices)
    print(plans.text_of(chosen, shape, chip, report))
    if report.refused or (chip and not plans.fits(chip, report)):
        raise SystemExit(2)


def new_network(path: Path) -> ModelConfig:
    """The shape of the network that a task's settings make anew. Raises UserError where its size hangs on the data."""
    from jaxppo import tasks

    if from_file(RunConfig, path).model_kind == "classifier":
        raise UserError("a text classifier is no policy: there is nothing to plan")
    settings = from_file(tasks.TaskConfig, path)
    if settings.task == "speech":
        raise UserError("a network that hears is as large as its recordings: plan the config.json of the run's policy folder")
    return tasks.new_network(settings)


@dataclass(frozen=True)
class ReportOptions:
    """What runs have come to, on one page: report.html, report.md, report.csv and report.svg.

    $ jaxppo report runs/sentiment
    $ jaxppo report runs/grpo-* runs/rloo-* --out comparison
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs, or of tasks' whole ways; those that differ in their seed alone are one group"""
    out: Path | None = None
    """folder for the report; without it the folder of a single run, or ./report for several"""


def report(options: ReportOptions) -> None:
    """Write the report on runs."""
    from jaxppo import report as reports

    print(f"written: {', '.join(str(path) for path in reports.write(options.runs, options.out))}")


VERBS = {
    "sample": (sample, SampleOptions),
    "eval": (evaluate, EvalOptions),
    "algorithms": (algorithms, AlgorithmsOptions),
    "plan": (plan, PlanOptions),
    "report": (report, ReportOptions),
    "export": (exporting.export, exporting.ExportOptions),
    "push": (exporting.push, exporting.PushOptions),
    "doctor": (checks.doctor, checks.DoctorOptions),
}


def main() -> None:
    """`jaxppo VERB ...`"""
    if len(sys.argv) < 2 or sys.argv[1] not in VERBS:
        asked_for_help = len(sys.argv) > 1 and sys.argv[1] in ("-h", "--help")
        lines = [f"  {verb:10} {(options.__doc__ or '').splitlines()[0]}" for verb, (_, options) in VERBS.items()]
        print("\n".join(["usage: jaxppo VERB ...   (jaxppo VERB --help tells more)", *lines]))
        if len(sys.argv) > 1 and not asked_for_help:
            near = difflib.get_close_matches(sys.argv[1], VERBS, n=1)
            print(f"error: {sys.argv[1]!r} is no verb{f'; perhaps {near[0]}' if near else ''}", file=sys.stderr)
        raise SystemExit(0 if asked_for_help else 2)
    run, options = VERBS[sys.argv[1]]
    about = inspect.cleandoc(options.__doc__ or "")
    script(run, options, args=sys.argv[2:], alone=True, about=about, prog=f"jaxppo {sys.argv[1]}")
