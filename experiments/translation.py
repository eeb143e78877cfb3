"""Translate short German sentences into English, with a small chat model and adapters.

Question   How much BLEU does policy optimisation add to a supervised baseline, if BLEU is the
           reward?
Method     Supervised on the pairs, then the leave-one-out policy gradient
           (https://arxiv.org/abs/2402.14740) with clipped ratios. The reward is sentence BLEU on
           token ids, in the program; sacrebleu measures decoded text. LoRA.
Command    python experiments/translation.py
           # --data pairs.jsonl, a line each: {"prompt": ..., "reference": ...}
Data       Sentence pairs of at most eight words of the Ding dictionary, from Debian's package
           trans-de-en, many of them idioms. `--sft-examples 0` adds 55,456 phrases.
Found      One seed, 300 test sentences (95 % interval over them): samples BLEU .99 -> 1.63 (+.12 to
           +1.53), greedy 4.2 -> 4.9 (-.35 to +1.84), which is not decided; chrF 20.3 -> 20.4;
           translations become .3 words shorter (-.49 to -.17). SmolLM2 knows little German: after
           each pair once the loss is 2.1 a token and still falls. "Meine Eltern sind nicht sehr
           streng" becomes "My children are not very strong".
Changed    A new network of width 192 had BLEU 2.1, 1.4 and 1.3 before the policy stage, and gained
           .33 (-.16 to +1.00), .08 and -.13 (three seeds); with the phrases it was stopped after
           500 of 4,000 supervised steps at a loss of 4.8 a token.
Minutes    38 for the supervised stage, 8 for the policy (one core, other work shared it).
"""

from dataclasses import dataclass

from jaxppo import cli
from jaxppo.tasks import TaskConfig, stages


@dataclass(frozen=True)
class Translation(TaskConfig):
    task: str = "translation"
    name: str = "translation"
    model: str = "smollm2"
    prompt_length: int = 26
    response_length: int = 13
    dtype: str = "bfloat16"
    lora: int = 16
    lora_on: str = "all"
    sft_steps: int = 540
    sft_batch_size: int = 16
    sft_examples: int = 8555
    sft_lr: float = 1e-3
    sft_eval_every: int = 135
    policy_examples: int = 8555
    steps: int = 24
    batch_size: int = 64
    minibatches: int = 2
    tokens_per_microbatch: int = 600
    group_size: int = 8
    advantage: str = "rloo"
    value_loss: str = "none"
    kl_coef: float = 0.02
    kl_adaptive: bool = False
    lr: float = 1e-3
    eval_every: int = 12
    save_every: int = 12
    test_rows: int = 300


def main(options: Translation) -> None:
    stages.run(options)


if __name__ == "__main__":
    cli.script(main, Translation)
