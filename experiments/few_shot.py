"""Sentiment labels by a pretrained model: untrained, supervised, by reward, and both.

Question   A pretrained model that sees two examples in its prompt labels some reviews right. What
           do right labels to imitate add, what does a reward alone, and what does the reward add
           after imitation?
Method     SmolLM2-135M with adapters; the response is one token. Supervised on (sentence, label);
           then, or at once (--sft-steps 0), the leave-one-out policy gradient
           (https://arxiv.org/abs/2402.14740) with clipped ratios on the reward "the label is
           right".
Command    python experiments/few_shot.py
           python experiments/few_shot.py --name few_shot-alone --sft-steps 0 --lr 1e-3
           # from the model before any training
Data       The reviews of `experiments/sentiment_label.py`: 640 in the supervised stage, after which
           its validation loss stands still, 320 prompts in the policy stage.
Found      Five seeds, 300 test sentences, share of right labels (95 % interval over seeds).
           Untrained .553 greedy and .143 of samples, the rest being the other label or another
           word. Supervised .854 and .822. The reward adds +.002 (-.015 to +.019) to the greedy
           labels and +.021 (+.004 to +.038) to samples. The reward alone, without a label to
           imitate: .818 and .817.
Minutes    11 to 12 (9 to 15 without the supervised stage) on a core that other work shared.
"""

from dataclasses import dataclass

from jaxppo import cli
from jaxppo.tasks import TaskConfig, stages


@dataclass(frozen=True)
class FewShot(TaskConfig):
    task: str = "sentiment_label"
    name: str = "few_shot"
    model: str = "smollm2"
    prompt_format: str = "A dull mess. = bad\nA lovely film. = good\n{prompt} ="
    prompt_length: int = 48
    response_length: int = 1
    dtype: str = "bfloat16"
    sft_steps: int = 40
    sft_batch_size: int = 16
    sft_lr: float = 1e-3
    sft_eval_every: int = 10
    steps: int = 40
    batch_size: int = 64
    minibatches: int = 2
    group_size: int = 8
    advantage: str = "rloo"
    value_loss: str = "none"
    kl_coef: float = 0.02
    kl_adaptive: bool = False
    lr: float = 3e-4
    eval_every: int = 20
    save_every: int = 20
    test_rows: int = 300


def main(options: FewShot) -> None:
    stages.run(options)


if __name__ == "__main__":
    cli.script(main, FewShot)
