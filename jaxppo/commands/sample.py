"""`jaxppo sample`: sample responses of a run."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxppo import policy as policies
from jaxppo import sampling
from jaxppo.config import RunConfig
from jaxppo.data import jsonl
from jaxppo.data.prompts import encode, format_prompt, start_token, truncation_note
from jaxppo.errors import UserError
from jaxppo.models import lora
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.run import files, load, sampler
from jaxppo.run.load import Policy
from jaxppo.types import TrainState


@dataclass(frozen=True)
class SampleOptions:
    """Responses of a trained run to prompts, to a file of them, or in a conversation.

    $ jaxppo sample runs/sentiment "The film is" "I went to see"
    $ jaxppo sample runs/sentiment --file prompts.txt --temperature 0
    $ jaxppo sample runs/sentiment --max-tokens 12 < prompts.txt
    $ jaxppo sample runs/assistant --chat
    """

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """the run's folder, or that of a task's whole way; its best checkpoint is taken, as
    by export and eval
    """
    prompts: tyro.conf.Positional[
        Annotated[tuple[str, ...], tyro.conf.arg(metavar="PROMPT ...")]
    ] = ()
    """prompts, which are put as the run's own were (a task has a format), of at most
    its --prompt-length tokens (a longer one loses its beginning); without any, the
    lines of standard input, as they are typed when that is a terminal
    """
    file: Path | None = None
    """prompts from a file, one a line; of a .jsonl file, the "prompt" of each line, and
    what else the run's format names
    """
    chat: bool = False
    """prompts are turns in the checkpoint's own chat format; at a terminal they are one
    conversation
    """
    temperature: float | None = None
    """of sampling, 0 = always the likeliest token; without it the run's own"""
    max_tokens: int | None = None
    """most tokens of a response, not above the run's own; without it that"""
    seed: int = 0
    """of the noise; the same prompts get the same responses"""


def sample(options: SampleOptions) -> None:
    """Print one response to each prompt."""

    run = files.find_run(options.run)
    talking = not options.prompts and not options.file and sys.stdin.isatty()
    texts = [] if talking else prompts_of(options)

    load.use_compilation_cache()
    config, policy, state = load.restore(run)
    config = narrowed(config, temperature=options.temperature, max_tokens=options.max_tokens)
    greedy = options.temperature == 0
    if talking:
        print("a line is a prompt; the end of input (Ctrl-D) ends this", file=sys.stderr)
        stream = Stream(config, policy, state, greedy=greedy)
        converse(stream, typed(), show, seed=options.seed, chat=options.chat)
        return
    start = None if options.chat else start_token(config, policy.tokenizer)
    if options.chat:
        check_chat(policy.tokenizer, config.prompt_length)
    chat = lambda x: policy.tokenizer.apply_chat([{"role": "user", "content": x["prompt"]}])
    asked = [chat(x) if options.chat else format_prompt(config, x) for x in texts]
    if remark := truncation_note(
        asked, policy.tokenizer, config.prompt_length - (start is not None)
    ):
        print(f"note: {remark}", file=sys.stderr)
    prompts = encode(asked, policy.tokenizer, config.prompt_length, too_long="last", start=start)
    before, gap = iter([x["prompt"] for x in texts] if options.chat else asked), "\t" * options.chat
    draw = sampler.Sampler(config, policy, rows=min(8, len(texts)), greedy=greedy)
    for part in draw.batches(state, prompts, seed=options.seed):
        for done in part:
            print(files.printable(next(before)) + gap + files.printable(done.response), flush=True)


def prompts_of(options: SampleOptions) -> list[dict[str, str]]:
    """From the command line, a file or standard input, with what a file of JSON has
    beside each. Raises UserError when there are none.
    """
    if options.prompts and options.file:
        raise UserError("prompts on the command line and --file; give one of them")
    if options.file and options.file.suffix in (".jsonl", ".gz"):
        rows = [row for _, row in jsonl.read(options.file, strings=("prompt",))]
        return [{name: x for name, x in row.items() if isinstance(x, str)} for row in rows]
    try:
        lines = (
            options.file.read_text("utf-8").split("\n")
            if options.file
            else []
            if options.prompts
            else sys.stdin
        )
        texts = list(options.prompts) or [line.rstrip("\r\n") for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{options.file or 'standard input'} cannot be read as prompts ({error})"
        ) from error
    if not texts:
        raise UserError(
            "no prompts; give some on the command line, with --file or on standard input"
        )
    return [{"prompt": text} for text in texts]


def narrowed(config: RunConfig, *, temperature: float | None, max_tokens: int | None) -> RunConfig:
    """A run's settings with another temperature and shorter responses. Temperature 0
    leaves it, for a greedy sampler.

    Raises UserError for more tokens than the run's own responses have, where nothing
    was learned, and for a temperature below 0.
    """
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature must be 0 or a number above it, but is {temperature}")
    if max_tokens is not None and not 1 <= max_tokens <= config.response_length:
        most = config.response_length
        raise UserError(
            f"--max-tokens {max_tokens}: the run's responses have at most {most} tokens; give 1 to {most}"
        )
    length = config.response_length if max_tokens is None else max_tokens
    return dataclasses.replace(
        config, temperature=temperature or config.temperature, response_length=length
    )


class Stream:
    """A response token by token, of two compiled programs: one reads a prompt, one
    chooses a token and reads it in turn. They are compiled at the first prompt and
    never again. The same seed and number of prompt give what `Sampler` gives.
    """

    def __init__(
        self, config: RunConfig, policy: Policy, state: TrainState, *, greedy: bool = False
    ):
        self.config, self.tokenizer, model = config, policy.tokenizer, policy.model
        self.params = policies.cast(lora.merge(state.frozen["base"], state.params), model.dtype)

        def read(params, tokens, mask):
            hidden, cache = model.apply(
                params, tokens, mask, cache=model.init_cache(1, config.length, model.dtype)
            )
            return cache, hidden[:, -1]

        def choose(params, cache, hidden, uniform):
            logits = sampling.temper(model.logits(params, hidden), temperature=config.temperature)
            token = sampling.draw(sampling.process(logits, sample=config), uniform, greedy=greedy)
            after, cache = model.apply(params, token[:, None], jnp.ones((1, 1), bool), cache=cache)
            return cache, after[:, -1], token

        self.read, self.choose = jax.jit(read), jax.jit(choose, donate_argnums=(1, 2))

    def __call__(
        self, text: str, *, seed: int, index: int = 0, start: int | None = None
    ) -> Iterator[int]:
        """The ids of a response to the `index`-th prompt as they are chosen, up to and
        including the end of text. A prompt that is too long loses its beginning.
        """
        prompt = encode(
            [text], self.tokenizer, self.config.prompt_length, too_long="last", start=start
        )
        number = jnp.asarray([index], jnp.int32)
        noise = np.asarray(
            sampling.row_uniforms(jax.random.key(seed), number, self.config.response_length)
        )
        cache, hidden = self.read(self.params, prompt.tokens, prompt.mask)
        for t in range(self.config.response_length):
            cache, hidden, token = self.choose(self.params, cache, hidden, noise[:, t])
            yield int(token[0])
            if int(token[0]) == self.config.eos:
                return


def check_chat(tokenizer: Tokenizer, room: int) -> None:
    """Raises UserError where a turn of one word is longer than a prompt of so many
    tokens may be, and PretrainedError without a chat template.
    """
    least = len(tokenizer.encode(tokenizer.apply_chat([{"role": "user", "content": "?"}])))
    if least > room:
        raise UserError(
            f"--chat: a turn of one word has {least} tokens, but the run was trained on prompts of at most {room}; train with a "
            "larger --prompt-length"
        )


def pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come: together that of all of them. What may still
    change is held back, such as the first bytes of a character.
    """
    known, told = [], ""
    for token in ids:
        known.append(token)
        text = tokenizer.decode(known)
        if text.startswith(told) and len(text) > len(told) and not text.endswith("\ufffd"):
            yield text[len(told) :]
            told = text
    if rest := tokenizer.decode(known)[len(told) :]:
        yield rest


def converse(
    stream: Stream, lines: Iterable[str], write: Callable[[str], Any], *, seed: int, chat: bool
) -> None:
    """Answer each line by the pieces of a response, and the end of a line. Without
    `chat` each is a prompt of the run; with it, a turn of a conversation in the
    checkpoint's own format, of which the oldest turns go when it becomes longer than a
    prompt.

    Raises PretrainedError for `chat` without a chat template, UserError where a prompt
    has no room for a turn.
    """
    messages: list[dict[str, str]] = []
    start = None if chat else start_token(stream.config, stream.tokenizer)
    if chat:
        # before anybody has typed a line
        check_chat(stream.tokenizer, stream.config.prompt_length)
    for index, line in enumerate(filter(str.strip, lines)):
        messages.append({"role": "user", "content": line})
        room = stream.config.prompt_length
        text = (
            recent(messages, stream.tokenizer, room)
            if chat
            else format_prompt(stream.config, {"prompt": line})
        )
        if remark := truncation_note(
            [text], stream.tokenizer, stream.config.prompt_length - (start is not None)
        ):
            print(f"note: {remark}", file=sys.stderr)
        answer = ""
        try:
            for piece in pieces(
                stream.tokenizer, stream(text, seed=seed, index=index, start=start)
            ):
                answer += piece
                write(piece)
        except KeyboardInterrupt:  # enough of this one
            pass
        write("\n")
        messages.append({"role": "assistant", "content": answer.strip()})


def recent(messages: list[dict[str, str]], tokenizer: Tokenizer, room: int) -> str:
    """The conversation as text, without its oldest turns when it has more than `room`
    tokens; the last message always stays.
    """
    while len(messages) > 1 and len(tokenizer.encode(tokenizer.apply_chat(messages))) > room:
        del messages[:2]
    return tokenizer.apply_chat(messages)


def typed() -> Iterator[str]:
    """Lines from the terminal, until it ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and earlier lines)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def show(piece: str) -> None:
    """A part of a response at once; lines end where it says, other control characters
    are shown and not obeyed.
    """
    print("\n".join(files.printable(line) for line in piece.split("\n")), end="", flush=True)
