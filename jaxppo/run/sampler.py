"""Prompts by the batch, and responses to them outside of training: many at once, or one
token by token.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from jaxppo import sampling
from jaxppo.config import Config
from jaxppo.data.prompts import PromptSet, _host_prompts
from jaxppo.parallel import processes, sharding
from jaxppo.rollout import rollout
from jaxppo.run.load import Policy
from jaxppo.types import Model, Prompts, Rollout, TrainState


def responses(
    config: Config, model: Model, params, frozen, prompts: Prompts, key, *, greedy: bool = False
) -> Rollout:
    """Rollouts outside of a step: no values, and noise from a key of one's own."""
    noise = sampling.row_uniforms(key, prompts.index, config.response_length)
    return rollout(
        model,
        params,
        frozen,
        prompts,
        noise,
        length=config.response_length,
        sample=config,
        eos=config.eos,
        pad=config.pad,
        with_values=False,
        greedy=greedy,
    )


class Sample(NamedTuple):
    """One response, as text."""

    prompt: str
    response: str
    tokens: list[int]
    kl: float  # nats to the reference, summed over the response


class Sampler:
    """Responses to any number of prompts by one compiled program over a fixed number of
    rows.
    """

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
            with sharding.rows_on_mesh(state.params, batch) as batch:
                done = self.program(state.params, state.frozen, batch, jax.random.key(seed))
            yield self._texts(jax.device_get(processes.to_host(done)))[
                : len(prompts.tokens) - start
            ]

    def _texts(self, done) -> list[Sample]:
        cut = done.tokens.shape[1] - done.mask.shape[1]
        ids = [
            row[keep].tolist()
            for row, keep in zip(done.tokens[:, cut:], done.mask > 0, strict=True)
        ]
        heads = [
            row[keep].tolist()
            for row, keep in zip(done.tokens[:, :cut], done.attend[:, :cut], strict=True)
        ]
        kl = ((done.raw_logprobs - done.ref_logprobs) * done.mask).sum(1)
        texts = zip(
            self.tokenizer.decode_batch(heads),
            self.tokenizer.decode_batch(ids),
            ids,
            kl.tolist(),
            strict=True,
        )
        return [Sample(*row) for row in texts]
