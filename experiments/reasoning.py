"""Verifiable reasoning by GRPO: answers that a program can check.

Question   How much accuracy does a group-relative policy gradient add to a small network that a few
           hundred worked examples have taught, if answers to many more can be checked?
Method     Supervised on 400 examples until validation stops improving, then GRPO
           (https://arxiv.org/abs/2402.03300) on all 16,000 prompts, without a KL penalty. The
           reward is 1 for the right answer.
Command    python experiments/reasoning.py
           # --task sums --name sums; --task counting --prompt-length 64
Data       Procedural tasks of reasoning-gym (Apache-2.0); no test question is in the training set.
Found      spelling, five seeds, share of 500 new words right: greedy responses .570 -> .690
           (+.030 to +.212, 95 % interval over seeds), samples .541 -> .673 (+.041 to +.223).
           Every seed gains: .976 -> .984, .750 -> .872, .180 -> .390, .702 -> .852, .240 -> .354.
           Whether 400 examples teach the rule depends on the seed; with 600, one seed had .990
           before the policy stage and .992 after it.
Minutes    8 on two free cores with two other runs; 11 to 32 when more work shared them.
"""

from dataclasses import dataclass

from jaxppo import cli
from jaxppo.tasks import TaskConfig, stages


@dataclass(frozen=True)
class Reasoning(TaskConfig):
    task: str = "spelling"
    name: str = "spelling"
    prompt_length: int = 30
    response_length: int = 16
    tokens: str = "bytes"
    width: int = 128
    layers: int = 3
    sft_steps: int = 600
    sft_examples: int = 400
    steps: int = 80
    batch_size: int = 256
    minibatches: int = 2
    group_size: int = 8
    advantage: str = "group"
    clip_low: float = 0.2
    clip_high: float = 0.28
    value_loss: str = "none"
    kl_coef: float = 0.0
    kl_adaptive: bool = False
    lr: float = 2e-4
    lora: int = 0
    eval_every: int = 10
    save_every: int = 10


def main(options: Reasoning) -> None:
    stages.run(options)


if __name__ == "__main__":
    cli.script(main, Reasoning)
