"""Write some responses of the training batches, with their scores, while a run goes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from jaxppo.rewards.host import Decode, decode_responses
from jaxppo.run.files import json_line, read_jsonl, write_jsonl

EVERY = 10  # steps


class SampleLog:
    """Appends lines of {"step", "prompt", "response", "reward"} and the named scores to
    samples.jsonl. In a response of several turns, the answers stand in ⟦ ⟧.

    Args:
      decode: lists of token ids -> strings.
      show_prompts: decodes prompts as they are written; the tokens of a chat's format
        may be there, too.
      prompt_length: tokens of a prompt.
      length: tokens of prompt and response.
      weights: of the named scores, in order (`Parts.score_weights`).
      first_step: a resumed run continues after it; later lines are dropped.
    """

    def __init__(
        self,
        folder: Path,
        decode: Decode,
        *,
        show_prompts: Decode,
        prompt_length: int,
        length: int,
        weights: Sequence[tuple[str, float]],
        first_step: int,
    ):
        self.path, self.decode, self.weights = folder / "samples.jsonl", decode, weights
        self.show_prompts = show_prompts
        self.prompt_length, self.length = prompt_length, length
        kept = [row for row in read_jsonl(self.path) if row.get("step", 0) <= first_step]
        write_jsonl(self.path, kept)

    def write(self, step: int, samples: Float[np.ndarray, "K N"]) -> None:
        """Write the responses of a step: the first one, and every `EVERY` steps.
        `samples`: as `step_metrics.first_samples` packs them.
        """
        if step != 1 and step % EVERY:
            return
        tokens, scores = samples[:, : self.length].astype(int), samples[:, self.length :]
        kept = lambda rows: [row[row != -1] for row in rows]
        prompts = [row.tolist() for row in kept(tokens[:, : self.prompt_length])]
        responses = kept(tokens[:, self.prompt_length :])
        if any((row < 0).any() for row in responses):
            responses = [episode_text(self.decode, row) for row in responses]
        else:
            responses = [row.tolist() for row in responses]
            _, responses = decode_responses(self.decode, prompts, responses)
        prompts = self.show_prompts(prompts)
        with self.path.open("a", encoding="utf-8") as file:
            for prompt, response, own in zip(prompts, responses, scores.tolist(), strict=True):
                row = {"step": step, "prompt": prompt, "response": response}
                factors = [weight for _, weight in self.weights] or [1.0] * len(own)
                row["reward"] = sum(x * factor for x, factor in zip(own, factors, strict=True))
                row |= {name: x for (name, _), x in zip(self.weights, own)}
                file.write(json_line(row))


def episode_text(decode: Decode, tokens: Int[np.ndarray, "N"]) -> str:
    """The text of an episode, from token ids i, and -2 - i of answers, which it puts in
    ⟦ ⟧.
    """
    parts = np.split(tokens, np.flatnonzero(np.diff(tokens < 0)) + 1)
    texts = decode([np.where(part < 0, -2 - part, part).tolist() for part in parts])
    marked = (f"⟦{x}⟧" if part[0] < 0 else x for x, part in zip(texts, parts, strict=True))
    return "".join(marked)
