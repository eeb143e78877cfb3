"""Prompts by the batch, and responses to them outside of training: many at once, or one token by token."""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from jaxppo import policy as policies
from jaxppo import processes, sampling, sharding, tracking
from jaxppo.assemble import Policy
from jaxppo.config import Config, RunConfig, UserError
from jaxppo.data import prompts as data
from jaxppo.models import lora
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.rollout import rollout
from jaxppo.types import Model, Prompts, Rollout, TrainState


class PromptSet(NamedTuple):
    """Encoded prompts, all of them."""

    tokens: Int[np.ndarray, "N P"]
    mask: Bool[np.ndarray, "N P"]  # padding on the left
    extra: Mapping[str, np.ndarray] = MappingProxyType({})  # [N ...] each: references, labels, task ids, features

    def batch(self, config: Config, cursor: int) -> Prompts:
        """The batch that starts at a cursor, the copies of a prompt beside each other; a function of (seed, cursor) alone."""
        chosen = data.indices(
            len(self.tokens), cursor=cursor, batch_size=config.rows // config.group_size, seed=config.seed
        ).repeat(config.group_size)
        rows = np.arange(config.rows, dtype=np.int32)
        return _host_prompts(self.tokens[chosen], self.mask[chosen], rows, {name: x[chosen] for name, x in self.extra.items()})

    def call(self, config: RunConfig, cursor: int) -> Prompts:
        """The prompts of one dispatch: a batch, or steps_per_call batches with a leading dimension; NumPy arrays."""
        prompts = config.rows // config.group_size
        batches = [self.batch(config, cursor + k * prompts) for k in range(config.steps_per_call)]
        return batches[0] if config.steps_per_call == 1 else jax.tree.map(lambda *x: np.stack(x), *batches)


def encode(
    texts: Sequence[str], tokenizer: Tokenizer, length: int, *, extra: Mapping[str, np.ndarray] | None = None, **options
) -> PromptSet:
    """`data.prompts.encode` as a PromptSet; `extra` has one entry for each text, and goes with it. Counts what it leaves out."""
    encoded = data.encode(texts, tokenizer, length, **options)
    if encoded.dropped and processes.is_main():
        print(f"{encoded.dropped} of {len(texts)} prompts are longer than {length} tokens and were left out")
    return PromptSet(encoded.tokens, encoded.mask, {name: np.asarray(x)[encoded.rows] for name, x in (extra or {}).items()})


def _host_prompts(tokens: Any, mask: Any, index: Any, extra: Any) -> Prompts:
    """Prompts that are still NumPy arrays."""
    return Prompts(tokens, mask, index, extra)


def responses(config: Config, model: Model, params, frozen, prompts: Prompts, key, *, greedy: bool = False) -> Rollout:
    """Rollouts outside of a step: no values, and noise from a key of one's own."""
    noise = sampling.row_uniforms(key, prompts.index, config.response_length)
    return rollout(
        model, params, frozen, prompts, noise, length=config.response_length, sample=config, eos=config.eos, pad=config.pad,
        with_values=False, greedy=greedy,
    )  # fmt: skip


def narrowed(config: RunConfig, *, temperature: float | None, max_tokens: int | None) -> RunConfig:
    """A run's settings with another temperature and shorter responses. Temperature 0 leaves it, for a greedy sampler.

    Raises UserError for more tokens than the run's own responses have, where nothing was learned, and for a temperature below 0.
    """
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature must be 0 or a number above it, but is {temperature}")
    if max_tokens is not None and not 1 <= max_tokens <= config.response_length:
        most = config.response_length
        raise UserError(f"--max-tokens {max_tokens}: the run's responses have at most {most} tokens; give 1 to {most}")
    length = config.response_length if max_tokens is None else max_tokens
    return dataclasses.replace(config, temperature=temperature or config.temperature, response_length=length)


def put(config: RunConfig, words: Mapping[str, str]) -> str:
    """A prompt as the run was trained on it: its `prompt_format` with these words in the places that it names (and nothing else
    of `str.format`: the settings may be a stranger's). Raises UserError for a place without a word.

    >>> put(RunConfig(prompt_format="{prompt}\\n="), {"prompt": "Guten {Tag}"})
    'Guten {Tag}\\n='
    """

    def word(found: re.Match) -> str:
        if found[1] not in words:
            raise UserError(f"the run's prompts are {config.prompt_format!r}: give {found[1]!r}, too, with --file PROMPTS.jsonl")
        return words[found[1]]

    return re.sub(r"\{(\w+)\}", word, config.prompt_format)


def start_of(config: RunConfig, tokenizer: Tokenizer) -> int | None:
    """The id that every prompt of the run begins with, if one does."""
    return tokenizer.start_id if config.prompt_start else None


class Sample(NamedTuple):
    """One response, as text."""

    prompt: str
    response: str
    tokens: list[int]
    kl: float  # nats to the reference, summed over the response


class Sampler:
    """Responses to any number of prompts by one compiled program over a fixed number of rows."""

    def __init__(self, config: Config, policy: Policy, *, rows: int = 64, greedy: bool = False):
        self.rows, self.tokenizer, self.config = rows, policy.tokenizer, config

        def program(params, frozen, prompts, key):
            return responses(config, policy.model, params, frozen, prompts, key, greedy=greedy)

        self.program = jax.jit(program)

    def __call__(self, state: TrainState, prompts: PromptSet, *, seed: int) -> list[Sample]:
        """One response to each prompt; the same seed draws the same noise for each."""
        return [sample for part in self.parts(state, prompts, seed=seed) for sample in part]

    def parts(self, state: TrainState, prompts: PromptSet, *, seed: int) -> Iterator[list[Sample]]:
        """The same, a call of the program at a time."""
        for start in range(0, len(prompts.tokens), self.rows):
            # the last part is filled up with copies of a row, which are dropped below
            rows = np.minimum(np.arange(start, start + self.rows), len(prompts.tokens) - 1)
            extra = {name: x[rows] for name, x in prompts.extra.items()}
            index = np.arange(start, start + self.rows, dtype=np.int32)
            batch = _host_prompts(prompts.tokens[rows], prompts.mask[rows], index, extra)
            with sharding.beside(state.params, batch) as batch:
                done = self.program(state.params, state.frozen, batch, jax.random.key(seed))
            yield self._texts(jax.device_get(processes.here(done)))[: len(prompts.tokens) - start]

    def _texts(self, done) -> list[Sample]:
        cut = done.tokens.shape[1] - done.mask.shape[1]
        ids = [row[keep].tolist() for row, keep in zip(done.tokens[:, cut:], done.mask > 0, strict=True)]
        heads = [row[keep].tolist() for row, keep in zip(done.tokens[:, :cut], done.attend[:, :cut], strict=True)]
        kl = ((done.raw_logprobs - done.ref_logprobs) * done.mask).sum(1)
        texts = zip(self.tokenizer.decode_batch(heads), self.tokenizer.decode_batch(ids), ids, kl.tolist(), strict=True)
        return [Sample(*row) for row in texts]


class Stream:
    """A response token by token, of two compiled programs: one reads a prompt, one chooses a token and reads it in turn. They are
    compiled at the first prompt and never again. The same seed and number of prompt give what `Sampler` gives."""

    def __init__(self, config: RunConfig, policy: Policy, state: TrainState, *, greedy: bool = False):
        self.config, self.tokenizer, model = config, policy.tokenizer, policy.model
        self.params = policies.cast(lora.merge(state.frozen["base"], state.params), model.dtype)

        def read(params, tokens, mask):
            hidden, cache = model.apply(params, tokens, mask, cache=model.init_cache(1, config.length, model.dtype))
            return cache, hidden[:, -1]

        def choose(params, cache, hidden, uniform):
            logits = sampling.temper(model.logits(params, hidden), temperature=config.temperature)
            token = sampling.draw(sampling.process(logits, sample=config), uniform, greedy=greedy)
            after, cache = model.apply(params, token[:, None], jnp.ones((1, 1), bool), cache=cache)
            return cache, after[:, -1], token

        self.read, self.choose = jax.jit(read), jax.jit(choose, donate_argnums=(1, 2))

    def __call__(self, text: str, *, seed: int, index: int = 0, start: int | None = None) -> Iterator[int]:
        """The ids of a response to the `index`-th prompt as they are chosen, up to and including the end of text. A prompt that
        is too long loses its beginning."""
        prompt = encode([text], self.tokenizer, self.config.prompt_length, too_long="last", start=start)
        number = jnp.asarray([index], jnp.int32)
        noise = np.asarray(sampling.row_uniforms(jax.random.key(seed), number, self.config.response_length))
        cache, hidden = self.read(self.params, prompt.tokens, prompt.mask)
        for t in range(self.config.response_length):
            cache, hidden, token = self.choose(self.params, cache, hidden, noise[:, t])
            yield int(token[0])
            if int(token[0]) == self.config.eos:
                return


def check_chat(tokenizer: Tokenizer, room: int) -> None:
    """Raises UserError where a turn of one word is longer than a prompt of so many tokens may be, and PretrainedError without a
    chat template."""
    least = len(tokenizer.encode(tokenizer.apply_chat([{"role": "user", "content": "?"}])))
    if least > room:
        raise UserError(
            f"--chat: a turn of one word has {least} tokens, but the run was trained on prompts of at most {room}; train with a "
            "larger --prompt-length"
        )


def cut(texts: Sequence[str], tokenizer: Tokenizer, room: int) -> str:
    """A remark on the texts that lose their beginning, since they have more tokens than there is room for; empty for none.

    >>> from jaxppo.pretrained.tiny import byte_tokenizer
    >>> cut(["short", "much longer"], byte_tokenizer(), 8), cut(["short"], byte_tokenizer(), 8)
    ('1 of 2 prompts has more than 8 tokens (--prompt-length of the run) and lost its beginning', '')
    """
    long = sum(len(tokenizer.encode(text)) > room for text in texts)
    words = ("has", "its") if long == 1 else ("have", "their")
    limit = f"more than {room} tokens (--prompt-length of the run)"
    return f"{long} of {len(texts)} prompts {words[0]} {limit} and lost {words[1]} beginning" if long else ""


def pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come: together that of all of them. What may still change is held back, such as the first bytes
    of a character."""
    known, told = [], ""
    for token in ids:
        known.append(token)
        text = tokenizer.decode(known)
        if text.startswith(told) and len(text) > len(told) and not text.endswith("\ufffd"):
            yield text[len(told) :]
            told = text
    if rest := tokenizer.decode(known)[len(told) :]:
        yield rest


def converse(stream: Stream, lines: Iterable[str], write: Callable[[str], Any], *, seed: int, chat: bool) -> None:
    """Answer each line by the pieces of a response, and the end of a line. Without `chat` each is a prompt of the run; with it,
    a turn of a conversation in the checkpoint's own format, of which the oldest turns go when it becomes longer than a prompt.

    Raises PretrainedError for `chat` without a chat template, UserError where a prompt has no room for a turn.
    """
    messages: list[dict[str, str]] = []
    start = None if chat else start_of(stream.config, stream.tokenizer)
    if chat:
        check_chat(stream.tokenizer, stream.config.prompt_length)  # before anybody has typed a line
    for index, line in enumerate(filter(str.strip, lines)):
        messages.append({"role": "user", "content": line})
        room = stream.config.prompt_length
        text = recent(messages, stream.tokenizer, room) if chat else put(stream.config, {"prompt": line})
        if remark := cut([text], stream.tokenizer, stream.config.prompt_length - (start is not None)):
            print(f"note: {remark}", file=sys.stderr)
        answer = ""
        try:
            for piece in pieces(stream.tokenizer, stream(text, seed=seed, index=index, start=start)):
                answer += piece
                write(piece)
        except KeyboardInterrupt:  # enough of this one
            pass
        write("\n")
        messages.append({"role": "assistant", "content": answer.strip()})


def recent(messages: list[dict[str, str]], tokenizer: Tokenizer, room: int) -> str:
    """The conversation as text, without its oldest turns when it has more than `room` tokens; the last message always stays."""
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
    """A part of a response at once; lines end where it says, other control characters are shown and not obeyed."""
    print("\n".join(tracking.printable(line) for line in piece.split("\n")), end="", flush=True)
