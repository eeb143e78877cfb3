"""Sample responses to prompts outside of training."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

from jaxppo.config import Config
from jaxppo.data.prompts import PromptSet
from jaxppo.parallel import processes, sharding
from jaxppo.rewards.host import decode_responses
from jaxppo.rollout import sample_responses
from jaxppo.run.policy import Policy
from jaxppo.types import Prompts, Rollout, TrainState


def decode_rollout(tokenizer, done: Rollout) -> tuple[list[str], list[str], list[list[int]]]:
    """(texts of the prompts, texts of the responses, their token ids)."""
    length = done.tokens.shape[1] - done.mask.shape[1]  # of the prompts
    kept = lambda rows, mask: [row[m].tolist() for row, m in zip(rows, mask, strict=True)]
    prompts = kept(done.tokens[:, :length], done.attend[:, :length])
    responses = kept(done.tokens[:, length:], done.mask > 0)
    return *decode_responses(tokenizer.decode_batch, prompts, responses), responses


class Sample(NamedTuple):
    """One response, as text."""

    prompt: str
    response: str
    tokens: list[int]
    kl: float  # nats to the reference, summed over the response
    finished: bool  # it ended with the end of text or a stop text


def on_batches(
    program: Callable, state: TrainState, batches: Iterable[Prompts], *, seed: int
) -> Iterator[Any]:
    """Yield program(params, frozen, batch, key) of each batch, on the host."""
    for batch in batches:
        with sharding.rows_on_mesh(state.params, batch) as batch:
            found = program(state.params, state.frozen, batch, jax.random.key(seed))
        yield jax.device_get(processes.to_host(found))


class Sampler:
    """Responds to any number of prompts, with one program of `rows` rows."""

    def __init__(self, config: Config, policy: Policy, *, rows: int = 64, greedy: bool = False):
        self.rows, self.tokenizer, self.config = rows, policy.tokenizer, config

        def program(params, frozen, prompts, key):
            return sample_responses(
                config, policy.model, params, frozen, prompts, key, greedy=greedy
            )

        self.program = jax.jit(program)

    def __call__(self, state: TrainState, prompts: PromptSet, *, seed: int) -> list[Sample]:
        """One response to each prompt; a prompt's noise depends on `seed` and its
        place.
        """
        return [sample for part in self.batches(state, prompts, seed=seed) for sample in part]

    def batches(
        self, state: TrainState, prompts: PromptSet, *, seed: int
    ) -> Iterator[list[Sample]]:
        """The same responses, up to `rows` at a time."""
        left = len(prompts.tokens)
        for done in on_batches(self.program, state, prompts.in_order(self.rows), seed=seed):
            yield self._texts(done)[:left]
            left -= self.rows

    def _texts(self, done) -> list[Sample]:
        kl = ((done.raw_logprobs - done.ref_logprobs) * done.mask).sum(1)
        texts = decode_rollout(self.tokenizer, done)
        rows = zip(*texts, kl.tolist(), done.finished.tolist(), strict=True)
        return [Sample(*row) for row in rows]
