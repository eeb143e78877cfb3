"""Reach a number with given ones: countdown, with the answer and its form rewarded apart.

Question   How many more puzzles does a policy gradient solve than the supervised policy it starts
           from?
Method     Supervised on worked solutions ("3 * 7 = 21, 21 + 5 = 26 <answer> 3 * 7 + 5 </answer>"),
           then GRPO (https://arxiv.org/abs/2402.03300) without a KL penalty. Two scores: `format`,
           weight .1, for an answer in tags, and `result`, weight .9, for an expression that uses
           each number exactly once and reaches the target, in exact arithmetic.
Command    python experiments/recipes/countdown.py
           # TinyZero's settings:
           python experiments/recipes/countdown.py --data Jiayi-Pan/Countdown-Tasks-3to4
             --model Qwen/Qwen2.5-3B --sft-steps 0 --prompt-length 256
             --response-length 1024 --algorithm verl_ppo --loss clip --clip-high 0.2
             --kl-coef 0.001 --group-size 1 --batch-size 256 --minibatches 4 --steps 1000
             --dtype bfloat16 --remat block --test-rows 1024
           # --data examples.jsonl, a line each: {"prompt": ..., "reference": "3 5 7 -> 26"}, with
           # --model also "numbers" and "target", which its prompt names
Data       Puzzles of reasoning-gym (Apache-2.0) with three numbers from 1 to 12 and targets from 1
           to 60; no test puzzle is in the training set.
Published  TinyZero (https://github.com/Jiayi-Pan/TinyZero): Qwen2.5-3B by PPO, 256 prompts a step,
           minibatches of 64, lr 1e-6 and 1e-5 (critic), KL .001, 256 + 1024 tokens; it learns to
           search and to check, Qwen2.5-0.5B does not. Two GPUs, "under $30"; no table of numbers.
           lmpo (https://github.com/kvfrans/lmpo): Qwen3-1.7B by GRPO, 256 groups of 8, lr 1e-6,
           four numbers; .446 -> .67 (20 steps) -> .75 (60 steps), in JAX on TPUs.
Found      The small slice, five seeds, 377 test puzzles, share solved (95 % interval over seeds):
           greedy .279 -> .324 (+.009 to +.081), samples .207 -> .298 (+.063 to +.117), at 4.9 nats;
           each seed gains. The answer alone is rewarded, and the working stays wrong where it was:
           "12 + 12 = 24, 24 + 1 = 50 <answer> 12 + 12 + 1 </answer>". Before: a rate of 1e-3
           collapsed, one of 1e-4 learned nothing in 40 steps, and puzzles of three or four numbers
           at batch 128 went from .156 to .118. The public runs were not repeated.
Minutes    8 to 13 on a core that other work shared.
"""

from dataclasses import dataclass, replace

from jaxppo import cli
from jaxppo.tasks import TaskConfig, stages

# TinyZero's prompt for base models
ASK = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer.\nUser: Using the numbers {numbers}, create an equation that equals "
    "{target}. You can use basic arithmetic operations (+, -, *, /) and each number can only be "
    "used once. Show your work in <think> </think> tags. And return the final answer in <answer> "
    "</answer> tags, for example <answer> (1 + 2) / 3 </answer>.\nAssistant: Let me solve this "
    "step by step.\n<think>"
)


@dataclass(frozen=True)
class Countdown(TaskConfig):
    task: str = "countdown"
    name: str = "countdown"
    prompt_length: int = 12
    response_length: int = 32
    max_vocab: int = 400
    width: int = 128
    layers: int = 3
    sft_steps: int = 600
    steps: int = 200
    batch_size: int = 256
    minibatches: int = 2
    group_size: int = 8
    advantage: str = "group"
    clip_low: float = 0.2
    clip_high: float = 0.28
    value_loss: str = "none"
    kl_coef: float = 0.0
    kl_adaptive: bool = False
    lr: float = 3e-4
    lora: int = 0
    eval_every: int = 100
    save_every: int = 100


def main(options: Countdown) -> None:
    if options.model and not options.prompt_format:
        options = replace(options, prompt_format=ASK)
    stages.run(options)


if __name__ == "__main__":
    cli.script(main, Countdown)
