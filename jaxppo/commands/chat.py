"""Chat with a run at the terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from jaxppo.config import RunConfig
from jaxppo.data.prompts import as_ids, encode, format_prompt, start_token, truncation_note
from jaxppo.errors import UserError
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.run import files
from jaxppo.run.policy import Policy
from jaxppo.run.sampler import Sampler
from jaxppo.types import TrainState


def make_answer(
    config: RunConfig, policy: Policy, state: TrainState, *, greedy: bool = False
) -> Callable[..., str]:
    """Make `answer(text, seed=..., start=...)`, the response to a prompt; one that is
    too long loses its beginning.
    """
    draw = Sampler(config, policy, rows=1, greedy=greedy)
    options: dict[str, Any] = {"too_long": "last"}

    def answer(text: str, *, seed: int, start: int | Sequence[int] | None = None) -> str:
        prompt = encode([text], policy.tokenizer, config.prompt_length, start=start, **options)
        return draw(state, prompt, seed=seed)[0].response

    return answer


def check_chat(tokenizer: Tokenizer, room: int, *, system: str = "") -> None:
    """Raise UserError if a chat turn of one word has more than `room` tokens, and
    PretrainedError without a chat template.
    """
    turn = [*first_messages(system), {"role": "user", "content": "?"}]
    least = len(tokenizer.encode(tokenizer.apply_chat(turn)))
    if least > room:
        raise UserError(
            f"--chat: a turn of one word has {least} tokens, but the run was trained on prompts "
            f"of at most {room}; give a shorter --system, or train with a larger --prompt-length"
        )


def first_messages(system: str) -> list[dict[str, str]]:
    """What a conversation begins with: the system message, if there is one."""
    return [{"role": "system", "content": system}] if system else []


def run_chat(
    config: RunConfig,
    tokenizer: Tokenizer,
    answer: Callable[..., str],
    lines: Iterable[str],
    write: Callable[[str], Any],
    *,
    seed: int,
    chat: bool,
    system: str = "",
) -> None:
    """Answer each line (`make_answer`). A line is a prompt in the run's format or, with
    `chat`, a turn in the checkpoint's chat format; the oldest turns are dropped when
    the conversation is longer than a prompt.

    With `chat`, raises PretrainedError without a chat template, and UserError if a
    prompt has no room for a turn.
    """
    messages: list[dict[str, str]] = []
    room = config.prompt_length
    start = None if chat else start_token(config, tokenizer)
    if chat:
        check_chat(tokenizer, room, system=system)  # before anybody types
    for index, line in enumerate(filter(str.strip, lines)):
        messages.append({"role": "user", "content": line})
        text = format_prompt(config, {"prompt": line})
        if chat:
            text = recent(messages, tokenizer, room, system=system)
        if note := truncation_note([text], tokenizer, room - len(as_ids(start))):
            print(f"note: {note}", file=sys.stderr)
        response = ""
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends this answer only
            response = answer(text, seed=seed + index, start=start)
        write(f"{response}\n")
        messages.append({"role": "assistant", "content": response.strip()})


def recent(
    messages: list[dict[str, str]], tokenizer: Tokenizer, room: int, *, system: str = ""
) -> str:
    """The conversation as text of at most `room` tokens, without its oldest turns; the
    system message and the last message always stay.
    """
    whole = lambda: tokenizer.apply_chat(first_messages(system) + messages)
    while len(messages) > 1 and len(tokenizer.encode(whole())) > room:
        del messages[:2]
    return whole()


def typed_lines() -> Iterator[str]:
    """Yield the lines that are typed at the terminal."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def show(response: str) -> None:
    """Print a response; control characters except line ends are escaped."""
    print(files.printable_lines(response), end="", flush=True)
