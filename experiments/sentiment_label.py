"""Sentiment analysis by a policy that writes the label; the reward is 1 for the right one.

Question   Does such a policy gain from policy optimisation of its accuracy, and does it beat a
           classifier?
Method     Supervised on (sentence, label), then PPO (https://arxiv.org/abs/1707.06347) on the
           reward "the label is right". `experiments/classify.py` is the classifier to compare with.
Command    python experiments/sentiment_label.py
           # --group-size 8 --advantage rloo --value-loss none: without a critic
           # --data examples.jsonl, a line each: {"prompt": ..., "reference": ...}
Data       Review sentences that people rated beyond +-.5 (`jaxppo.data.sentiment`): 80 % for
           training, 10 % to choose the checkpoint, 10 % for the test.
Found      Five seeds, share of right labels on 1,000 test sentences: one sample of each .731 ->
           .769 (+.009 to +.066, 95 % interval over seeds; each seed gains), the greedy label
           .772 -> .777 (-.023 to +.032): the policy becomes surer of what it knew. From
           the same baselines and with equal samples, leave-one-out in groups of eight without a
           critic does as well: samples +.032 (+.001 to +.062). The classifier has .807 +- .003
           on its own test sentences.
Minutes    7 to 10 (in groups 6 to 16) on one core that other work shared.
"""

from dataclasses import dataclass

from jaxppo import cli
from jaxppo.tasks import TaskConfig, stages


@dataclass(frozen=True)
class SentimentLabel(TaskConfig):
    task: str = "sentiment_label"
    name: str = "sentiment_label"
    prompt_length: int = 48
    response_length: int = 3
    tokens: str = "words"
    max_vocab: int = 8000
    width: int = 128
    layers: int = 2
    dropout: float = 0.3
    sft_steps: int = 500
    steps: int = 150
    batch_size: int = 128
    minibatches: int = 2
    kl_coef: float = 0.02
    kl_adaptive: bool = False
    lr: float = 1e-4
    lora: int = 0
    eval_every: int = 15
    save_every: int = 15
    test_rows: int = 1000


def main(options: SentimentLabel) -> None:
    stages.run(options)


if __name__ == "__main__":
    cli.script(main, SentimentLabel)
