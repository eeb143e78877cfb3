"""`jaxppo sample`: sample a run's responses to prompts, chat with it, or play episodes
of an environment.
"""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from jaxppo.commands import chat, episodes
from jaxppo.config import RunConfig
from jaxppo.data import table, textfile
from jaxppo.data.prompts import as_ids, encode, format_prompt, start_token, truncation_note
from jaxppo.data.table import Messages
from jaxppo.errors import UserError
from jaxppo.run import files, load, sampler
from jaxppo.run.sampler import Sample


@dataclass(frozen=True)
class SampleOptions:
    """Sample a trained run's responses to prompts, to a file of prompts, or in a chat;
    or play an environment.

    $ jaxppo sample runs/sentiment "The film is" "I went to see"
    $ jaxppo sample runs/sentiment --file prompts.txt --temperature 0
    $ jaxppo sample runs/sentiment --max-tokens 12 < prompts.txt
    $ jaxppo sample runs/sentiment --checkpoint newest --json "The film is"
    $ jaxppo sample runs/assistant --chat
    $ jaxppo sample runs/guess-1 --environment guess --game n=20
    $ jaxppo sample --environment guess
    """

    RANGES: ClassVar = {
        "temperature": "[0, inf)",
        **dict.fromkeys(("max_tokens", "episodes"), "(0, inf)"),
    }

    run: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="RUN")]] = None
    """folder of the run or task; without one you play --environment yourself"""
    prompts: tyro.conf.Positional[
        Annotated[tuple[str, ...], tyro.conf.arg(metavar="PROMPT ...")]
    ] = ()
    """prompts, in the run's format; one longer than --prompt-length tokens loses its
    beginning. Default: the lines of standard input, one by one at a terminal
    """
    file: Path | None = None
    """file of prompts, one in each line; in a .jsonl file each line is an object with
    "prompt" (a text, or a chat as a list of messages) and the other fields of the run's
    format
    """
    chat: bool = False
    """put prompts into the checkpoint's chat format; at a terminal, chat"""
    system: str = ""
    """with --chat: the system message; default: that of the checkpoint's format"""
    temperature: float | None = None
    """sampling temperature, 0 = greedy; default: the run's"""
    max_tokens: int | None = None
    """maximum tokens of a response, at most the run's; default: the run's"""
    seed: int = 0
    """random seed; the same seed and prompts give the same responses"""
    checkpoint: str = "best"
    """best (by validation score, else by training reward), newest, or a step"""
    raw: bool = False
    """of a run with --ema-decay: the weights of the step, not their average"""
    environment: str = ""
    """play episodes of this environment (`jaxppo.environments.ENVIRONMENTS`), and print
    them turn by turn; default: that of the run's task, if it has one
    """
    game: tuple[str, ...] = ()
    """options of the environment, such as n=20; default: the task's"""
    episodes: int = 4
    """with --environment: how many the run's policy plays"""
    json: bool = False
    """print a JSON object a line: prompt, response, kl (nats to the reference over the
    response; null if greedy), finished, tokens (their ids); of an episode: prompt,
    turns, replies, rewards, score, done
    """


def sample(options: SampleOptions) -> None:
    """Print one response to each prompt, or episodes."""
    run = None if options.run is None else files.find_run(options.run)
    if play_episodes(options, run):
        return
    if run is None:
        raise UserError("no run; give its folder, or --environment to play one yourself")
    if options.system and not options.chat:
        raise UserError("--system is the system message of --chat; give both")
    given = bool(options.prompts or options.file or options.json)
    talking = not given and sys.stdin.isatty()
    texts = [] if talking else read_prompts(options)
    load.use_compilation_cache()
    config, policy, state = load.restore(run, checkpoint=options.checkpoint, raw=options.raw)
    config = with_limits(config, temperature=options.temperature, max_tokens=options.max_tokens)
    greedy = options.temperature == 0
    if talking:
        print("each line is a prompt; Ctrl-D ends the session", file=sys.stderr)
        stream = chat.Stream(config, policy, state, greedy=greedy)
        own = {"seed": options.seed, "chat": options.chat, "system": options.system}
        chat.run_chat(stream, chat.typed_lines(), chat.show, **own)
        return
    started = [not options.chat and isinstance(x["prompt"], str) for x in texts]
    chats = not all(started)
    start = start_token(config, policy.tokenizer) if any(started) else None
    if options.chat:
        chat.check_chat(policy.tokenizer, config.prompt_length, system=options.system)

    def ask(row: dict[str, Any]) -> str:
        if not isinstance(row["prompt"], str):
            return policy.tokenizer.apply_chat(row["prompt"])
        turn = [*chat.first_messages(options.system), {"role": "user", "content": row["prompt"]}]
        return policy.tokenizer.apply_chat(turn) if options.chat else format_prompt(config, row)

    asked = [ask(row) for row in texts]
    if note := truncation_note(asked, policy.tokenizer, config.prompt_length - len(as_ids(start))):
        print(f"note: {note}", file=sys.stderr)
    options_of = {"too_long": "last", "start": start, "started": started}
    prompts = encode(asked, policy.tokenizer, config.prompt_length, **options_of)
    before, gap = iter([x["prompt"] for x in texts] if chats else asked), "\t" * chats
    draw = sampler.Sampler(config, policy, rows=min(8, len(texts)), greedy=greedy)
    for part in draw.batches(state, prompts, seed=options.seed):
        for done in part:
            prompt = next(before)
            shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            line = files.printable(shown) + gap + files.printable(done.response)
            print(as_json(prompt, done, greedy=greedy) if options.json else line, flush=True)


def play_episodes(options: SampleOptions, run: Path | None) -> bool:
    """Print episodes, if an environment is named or belongs to the run's task; whether
    there is one.
    """
    if run is None and not options.environment:
        return False
    game = episodes.find_game(run, options.environment, options.game)
    if game is None:
        if options.game:
            raise UserError("--game has options of an environment; name it with --environment")
        return False
    other = {"PROMPT": options.prompts, "--file": options.file, "--chat": options.chat}
    other |= {"--max-tokens": options.max_tokens}
    if given := [name for name, x in other.items() if x]:
        raise UserError(f"an environment has its own prompts and turns; leave out {given[0]}")
    if run is None:
        print("each line is a turn; Ctrl-D ends the session", file=sys.stderr)
        for played in episodes.play_person(game, chat.typed_lines(), print, seed=options.seed):
            print(episodes.as_json(played) if options.json else episodes.score(played, game))
        return True
    load.use_compilation_cache()
    own = {"number": options.episodes, "seed": options.seed, "temperature": options.temperature}
    which = {"checkpoint": options.checkpoint, "raw": options.raw}
    for number, played in enumerate(episodes.play_run(run, game, **own, **which), 1):
        shown = [f"episode {number}", *episodes.lines(played, game)]
        print(episodes.as_json(played) if options.json else "\n".join(shown), flush=True)
    return True


def as_json(prompt: str | Messages, done: Sample, *, greedy: bool) -> str:
    """A prompt and its response as a JSON object in one line."""
    # the log-ratio of a greedy response is no estimate of the KL
    kl = None if greedy or not math.isfinite(done.kl) else done.kl
    named = {"prompt": prompt, "response": done.response, "kl": kl}
    return json.dumps({**named, "finished": done.finished, "tokens": done.tokens})


def read_prompts(options: SampleOptions) -> list[dict[str, Any]]:
    """Read prompts from the command line, a file or standard input. JSON lines may have
    more fields. Raises UserError when there are none.
    """
    if options.prompts and options.file:
        raise UserError("prompts on the command line and --file; give one of them")
    if options.file and options.file.suffix in (".jsonl", ".gz"):
        text = lambda row: {name: x for name, x in row.items() if isinstance(x, str)}
        return [{**text(row), "prompt": row["prompt"]} for row in table.read_file(options.file)]
    texts = list(options.prompts)
    if not texts:
        text = textfile.read(options.file) if options.file else read_stdin()
        texts = [line for line in text.split("\n") if line.strip()]
    if not texts:
        raise UserError(
            "no prompts; give some on the command line, with --file or on standard input"
        )
    return [{"prompt": text} for text in texts]


def read_stdin() -> str:
    """Read standard input to its end, as a text file."""
    binary = getattr(sys.stdin, "buffer", None)
    raw = sys.stdin.read().encode() if binary is None else binary.read()
    return textfile.decode(raw, "standard input")


def with_limits(
    config: RunConfig, *, temperature: float | None, max_tokens: int | None
) -> RunConfig:
    """Replace a run's temperature and response length. Temperature 0 is left to the
    greedy sampler.

    Raises UserError for responses longer than in training.
    """
    most = config.response_length
    if max_tokens is not None and not 1 <= max_tokens <= most:
        raise UserError(
            f"--max-tokens {max_tokens}: the run's responses have at most {most} tokens; give 1 "
            f"to {most}"
        )
    return dataclasses.replace(
        config,
        temperature=temperature or config.temperature,
        response_length=most if max_tokens is None else max_tokens,
    )
