"""What the scripts that run in TRL's virtual environment share."""

import itertools
import os
import resource
import statistics
import time

import torch
import transformers
import trl
from transformers import GPT2Config, TrainerCallback


class Clock(TrainerCallback):
    """Wall and processor time at the start, and at the end of each of the trainer's steps."""

    def __init__(self):
        self.ends = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.ends.append((time.perf_counter(), time.process_time()))

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append((time.perf_counter(), time.process_time()))


def start() -> None:
    """All of the process's cores, and the same numbers each time."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)


def gpt2(shape: dict, *, end: int | None, **more) -> GPT2Config:
    """The network of this shape, with the token `end` at both ends of a text."""
    return GPT2Config(
        vocab_size=shape["vocab_size"],
        n_positions=shape["max_length"],
        n_embd=shape["width"],
        n_layer=shape["num_layers"],
        n_head=shape["num_heads"],
        bos_token_id=end,
        eos_token_id=end,
        **more,
    )


def measured(trainer, ends: list[tuple[float, float]]) -> dict:
    """Versions, and the seconds between the ends of steps, without the first: a warm-up."""
    spans = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(ends)][1:]
    return {
        "trl": trl.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "precision": trainer.accelerator.mixed_precision,
        "threads": torch.get_num_threads(),
        "steps_s": [wall for wall, _ in spans],
        "cpu_s": statistics.median(cpu for _, cpu in spans),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
