"""Named entities of a tweet, as text of one tag a word.

Question   Does policy optimisation of the entity F1 add to supervised tagging, whose loss counts every tag alike?
Method     Supervised on (tweet, tags), then the leave-one-out policy gradient (https://arxiv.org/abs/2402.14740) with clipped
           ratios; the reward is the row's entity F1, 1 for a tweet without entities in which none was found.
Command    python experiments/entities.py                      # --data examples.jsonl: words and tags, each joined by spaces
Data       2,394 tweets with ten kinds of entities.
"""

from dataclasses import dataclass

from jaxppo import cli
from jaxppo.tasks import TaskConfig


@dataclass(frozen=True)
class Entities(TaskConfig):
    task: str = "entities"
    name: str = "entities"
    prompt_length: int = 72
    response_length: int = 56
    width: int = 128
    layers: int = 3
    dropout: float = 0.3
    sft_steps: int = 800
    sft_batch_size: int = 32
    sft_lr: float = 1e-3
    steps: int = 80
    batch_size: int = 128
    minibatches: int = 2
    group_size: int = 4
    advantage: str = "rloo"
    value_loss: str = "none"
    kl_coef: float = 0.02
    kl_adaptive: bool = False
    lr: float = 2e-4
    lora: int = 0
    eval_every: int = 20
    save_every: int = 20


def main(options: Entities) -> None:
    from jaxppo import stages

    stages.run(options)


if __name__ == "__main__":
    cli.script(main, Entities)
