"""Answer a quiz's questions (capitals, elements, opposites, presidents) in a word, with a small
chat model and adapters.

Question   Does policy optimisation on the F1 of the answer's words add to supervised fine-tuning,
           on facts that the model may know?
Method     Supervised on (question, answer), then the leave-one-out policy gradient
           (https://arxiv.org/abs/2402.14740) with clipped ratios. The reward is the F1 of the
           answer's tokens (https://arxiv.org/abs/1606.05250), in the program. LoRA.
Command    python experiments/question_answering.py
           # --data examples.jsonl, a line each: {"prompt": ..., "reference": ...}
           # --task choices --prompt-length 80: QuaRTz, two answers to choose from
Data       The game quiz of Debian's bsdgames; QuaRTz (https://arxiv.org/abs/1909.03553).
Found      Five seeds, share of 214 test questions right (95 % interval over seeds): greedy
           .450 -> .454 (-.005 to +.012), samples .331 -> .348 (-.004 to +.037).
           Four of five seeds gain, and it is not decided. A rate of 1e-3 for 60 steps gains no more
           (seed 0: samples +.033, and +.037 at 3e-4), nor do 260 supervised examples, adapters on
           all layers and 100 steps (+.023, best at step 20): the policy learns the answers of its
           514 questions by heart, and validation falls. QuaRTz, one seed, other settings: .469 ->
           .461 of 128, which is chance.
Minutes    6 to 9 on a core that other work shared; the records of two seeds include a pause.
"""

from dataclasses import dataclass

from jaxppo import cli
from jaxppo.tasks import TaskConfig, stages


@dataclass(frozen=True)
class QuestionAnswering(TaskConfig):
    task: str = "question_answering"
    name: str = "question_answering"
    model: str = "smollm2"
    prompt_length: int = 18
    response_length: int = 8
    dtype: str = "bfloat16"
    sft_steps: int = 120
    sft_batch_size: int = 16
    sft_lr: float = 2e-3
    sft_eval_every: int = 30
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
    test_rows: int = 216


def main(options: QuestionAnswering) -> None:
    stages.run(options)


if __name__ == "__main__":
    cli.script(main, QuestionAnswering)
