"""Write out the named entities of a tweet with their kinds, with a small chat model and adapters.

Question   Does policy optimisation of the entities' F1 add to supervised fine-tuning, whose loss
           weights every token equally?
Method     Supervised on (tweet, "Jack = person; New York = geo-loc" or "none"), then the
           leave-one-out policy gradient (https://arxiv.org/abs/2402.14740) with clipped ratios. The
           reward is the row's contribution to the F1 of all rows (`named_gain` in
           `jaxppo.tasks.rewards`, after https://arxiv.org/abs/1402.1892). LoRA.
Command    python experiments/entities.py
           # --data examples.jsonl, a line each: {"prompt": ..., "reference": ...}
Data       2,295 tweets with ten kinds of entities; three of five tweets have none.
Found      Five seeds, F1 of 229 test tweets (95 % interval over seeds): samples .373 -> .437 (+.047
           to +.082), more in each seed; greedy responses .487 -> .491 (-.049 to +.058), in two
           seeds of five less. The reward is for an F1 of .5, which greedy responses reach; for .4,
           samples of one seed gained .041 instead of .069. With 80 supervised steps and adapters on
           queries and values F1 had been .24, and the policy learned to name fewer (three seeds,
           groups of four). With the row's own F1 as the reward, a policy that always writes "none"
           gets .6, and that policy was learned.
Minutes    21 on one core, 13 of them for the supervised stage.
"""

from dataclasses import dataclass

from jaxppo import cli
from jaxppo.tasks import TaskConfig, stages


@dataclass(frozen=True)
class Entities(TaskConfig):
    task: str = "entities"
    name: str = "entities"
    model: str = "smollm2"
    prompt_length: int = 52
    response_length: int = 16
    lora: int = 16
    lora_on: str = "all"
    sft_steps: int = 400
    sft_batch_size: int = 8
    sft_lr: float = 1e-3
    sft_eval_every: int = 80
    steps: int = 30
    batch_size: int = 128
    minibatches: int = 2
    epochs: int = 1
    tokens_per_microbatch: int = 280
    group_size: int = 8
    advantage: str = "rloo"
    value_loss: str = "none"
    kl_coef: float = 0.02
    kl_adaptive: bool = False
    lr: float = 5e-4
    eval_every: int = 10
    save_every: int = 10
    test_rows: int = 229


def main(options: Entities) -> None:
    stages.run(options)


if __name__ == "__main__":
    cli.script(main, Entities)
