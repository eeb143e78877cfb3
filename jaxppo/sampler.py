"""Prompts by the batch, and responses to them outside of training."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxppo import processes, sampling
from jaxppo.assemble import Policy
from jaxppo.config import Config, RunConfig
from jaxppo.data import prompts as data
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
        out: list[Sample] = []
        for start in range(0, len(prompts.tokens), self.rows):
            # the last part is filled up with copies of a row, which are dropped below
            rows = np.minimum(np.arange(start, start + self.rows), len(prompts.tokens) - 1)
            extra = {name: x[rows] for name, x in prompts.extra.items()}
            index = np.arange(start, start + self.rows, dtype=np.int32)
            batch = _host_prompts(prompts.tokens[rows], prompts.mask[rows], index, extra)
            done = self.program(state.params, state.frozen, batch, jax.random.key(seed))
            out += self._texts(jax.device_get(done))[: len(prompts.tokens) - start]
        return out

    def _texts(self, done) -> list[Sample]:
        cut = done.tokens.shape[1] - done.mask.shape[1]
        ids = [row[keep].tolist() for row, keep in zip(done.tokens[:, cut:], done.mask > 0, strict=True)]
        heads = [row[keep].tolist() for row, keep in zip(done.tokens[:, :cut], done.attend[:, :cut], strict=True)]
        kl = ((done.raw_logprobs - done.ref_logprobs) * done.mask).sum(1)
        texts = zip(self.tokenizer.decode_batch(heads), self.tokenizer.decode_batch(ids), ids, kl.tolist(), strict=True)
        return [Sample(*row) for row in texts]
