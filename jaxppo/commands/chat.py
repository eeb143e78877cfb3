"""Chat with a run at the terminal: each response is shown as it is sampled."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxppo import policy as policies
from jaxppo import sampling
from jaxppo.config import RunConfig
from jaxppo.data.prompts import as_ids, encode, format_prompt, start_token, truncation_note
from jaxppo.decoding.loop import Decoder, prefill
from jaxppo.errors import UserError
from jaxppo.models import lora
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.run import files
from jaxppo.run.policy import Policy
from jaxppo.types import TrainState


class Stream:
    """Samples a response token by token, with two programs: one reads a prompt, one
    chooses a token and reads it. For the same seed and prompt index the response is
    that of `Sampler`.
    """

    def __init__(
        self, config: RunConfig, policy: Policy, state: TrainState, *, greedy: bool = False
    ):
        self.config, self.tokenizer, model = config, policy.tokenizer, policy.model
        self.params = policies.cast(lora.merge(state.frozen["base"], state.params), model.dtype)
        self.stops = state.frozen["stop"] if config.stop else None

        def decoder(params, stops):
            ids, options = (config.eos, config.pad), (False, greedy, stops, None)
            return Decoder(model, params, config, config.response_length, *ids, *options)

        def read(params, stops, prompt, noise):
            return prefill(decoder(params, stops), prompt, noise, group_size=None)

        def choose(params, stops, done, hidden):
            own = decoder(params, stops)
            return own.read(own.choose(done, hidden))

        self.read, self.choose = jax.jit(read), jax.jit(choose, donate_argnums=(2, 3))

    def __call__(
        self, text: str, *, seed: int, index: int = 0, start: int | Sequence[int] | None = None
    ) -> Iterator[int]:
        """Yield the ids of a response to the `index`-th prompt, including the one that
        ends it. A prompt that is too long loses its beginning.
        """
        prompt = encode(
            [text], self.tokenizer, self.config.prompt_length, too_long="last", start=start
        )
        number = jnp.asarray([index], jnp.int32)
        noise = sampling.row_uniforms(jax.random.key(seed), number, self.config.response_length)
        prompt = next(prompt.in_order(1))
        done, hidden = self.read(self.params, self.stops, prompt, noise)
        for t in range(self.config.response_length):
            done, hidden = self.choose(self.params, self.stops, done, hidden)
            yield int(done.tokens[0, t])
            if done.finished[0]:
                return


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


def decode_stream(
    tokenizer: Tokenizer, ids: Iterable[int], prompt: Sequence[int] = ()
) -> Iterator[str]:
    """Yield the text of tokens as they arrive behind those of a prompt. Text that may
    still change, such as the first bytes of a character, is held back.
    """
    known = list(prompt)
    sent = tokenizer.decode(known).rstrip("\ufffd")
    for token in ids:
        known.append(token)
        text = tokenizer.decode(known)
        if text.startswith(sent) and len(text) > len(sent) and not text.endswith("\ufffd"):
            yield text[len(sent) :]
            sent = text
    if rest := tokenizer.decode(known)[len(sent) :]:
        yield rest


def first_messages(system: str) -> list[dict[str, str]]:
    """What a conversation begins with: the system message, if there is one."""
    return [{"role": "system", "content": system}] if system else []


def run_chat(
    stream: Stream,
    lines: Iterable[str],
    write: Callable[[str], Any],
    *,
    seed: int,
    chat: bool,
    system: str = "",
) -> None:
    """Answer each line, piece by piece. A line is a prompt in the run's format or, with
    `chat`, a turn in the checkpoint's chat format; the oldest turns are dropped when
    the conversation is longer than a prompt.

    With `chat`, raises PretrainedError without a chat template, and UserError if a
    prompt has no room for a turn.
    """
    messages: list[dict[str, str]] = []
    room = stream.config.prompt_length
    start = None if chat else start_token(stream.config, stream.tokenizer)
    if chat:
        check_chat(stream.tokenizer, room, system=system)  # before anybody types
    for index, line in enumerate(filter(str.strip, lines)):
        messages.append({"role": "user", "content": line})
        text = format_prompt(stream.config, {"prompt": line})
        if chat:
            text = recent(messages, stream.tokenizer, room, system=system)
        if note := truncation_note([text], stream.tokenizer, room - len(as_ids(start))):
            print(f"note: {note}", file=sys.stderr)
        ids = stream(text, seed=seed, index=index, start=start)
        answer = ""
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends this answer only
            for piece in decode_stream(stream.tokenizer, ids, stream.tokenizer.encode(text)):
                answer += piece
                write(piece)
        write("\n")
        messages.append({"role": "assistant", "content": answer.strip()})


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


def show(piece: str) -> None:
    """Print a piece of a response; control characters except line ends are escaped."""
    print(files.printable_lines(piece), end="", flush=True)
