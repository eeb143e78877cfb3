"""Write some responses of the training batches, with their scores, while a run goes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxppo.run.files import json_line, read_jsonl, write_jsonl

EVERY = 10  # steps


class SampleLog:
    """Appends lines of {"step", "prompt", "response", "reward"} and the named scores to
    samples.jsonl.

    Args:
      decode: lists of token ids -> strings.
      names: of the scores' columns.
      first_step: a resumed run continues after it; later lines are dropped.
    """

    def __init__(
        self,
        folder: Path,
        decode: Callable[[Sequence[Sequence[int]]], Sequence[str]],
        names: Sequence[str],
        *,
        first_step: int,
    ):
        self.path, self.decode, self.names = folder / "samples.jsonl", decode, names
        kept = [row for row in read_jsonl(self.path) if row.get("step", 0) <= first_step]
        write_jsonl(self.path, kept)

    def write(self, step: int, samples: dict[str, Any]) -> None:
        """Write the responses of a step: the first one, and every `EVERY` steps."""
        if step != 1 and step % EVERY:
            return
        tokens, mask = samples["tokens"], samples["mask"] > 0
        length = tokens.shape[1] - mask.shape[1]  # of the prompts
        kept = lambda rows, keep: self.decode([row[k].tolist() for row, k in zip(rows, keep)])
        prompts = kept(tokens[:, :length], samples["attend"][:, :length])
        responses = kept(tokens[:, length:], mask)
        with self.path.open("a", encoding="utf-8") as file:
            for n, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
                row = {"step": step, "prompt": prompt, "response": response}
                row["reward"] = float(samples["reward"][n])
                row |= {name: float(samples["scores"][n][i]) for i, name in enumerate(self.names)}
                file.write(json_line(row))
