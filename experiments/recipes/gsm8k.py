"""Word problems of grade school (GSM8K) by PPO, with verl's settings and its scoring.

Not run here on an accelerator: no number of this recipe was measured. Without --data it runs the
mechanics alone, on problems of a generator.

Question   Does jaxppo reach the numbers that are published for small models on GSM8K?
Method     PPO (https://arxiv.org/abs/1707.06347) with a separate critic, from the checkpoint as it
           is, without a supervised stage. The reward is 1 if the number after the last "#### " is
           right, else 0 (`strict`); `flexible` takes the last number. Both as in
           verl/utils/reward_score/gsm8k.py: numbers are compared as text, in the last 300
           characters. Prompts are verl's, in Qwen2.5's chat format. Tests are greedy, on all 1,319
           test questions; one of twenty training questions chooses the checkpoint.
Command    python experiments/recipes/gsm8k.py --data openai/gsm8k     # pip install datasets
           # by GRPO, with SkyRL's settings:
           python experiments/recipes/gsm8k.py --data openai/gsm8k
             --model Qwen/Qwen2.5-1.5B-Instruct --algorithm grpo --group-size 5 --batch-size 5120
             --minibatches 4 --kl-coef 0.001 --entropy-coef 0 --aggregate token_mean --steps 140
             --response-length 1024
           python experiments/recipes/gsm8k.py --tiny --steps 2     # the mechanics
           # --data examples.jsonl, a line each: {"prompt": question, "reference": "... #### 42"}
Data       GSM8K (MIT, https://arxiv.org/abs/2110.14168), or gsm_symbolic of reasoning-gym
           (Apache-2.0), a stand-in whose numbers cannot be compared.
Published  verl (https://github.com/volcengine/verl, docs/algo/baseline.md): Qwen2.5-0.5B-Instruct,
           56.7. Its log (verl-data, gsm8k/Qwen2.5-0.5B-bsz256_2-prompt1024-resp512-0.567.log): 435
           steps of 256 prompts, minibatches of 64, lr 1e-6, critic 1e-5, lambda 1, KL .001 in the
           reward, entropy bonus .001, 1,024 + 512 tokens, 1,312 test questions: .013 after 10
           steps, .458 after 30, at best .579, at the end .569. The 49.6 before training in verl's
           table is Qwen's own, of another protocol. One 24 GB GPU, a minute a step.
           SkyRL (https://github.com/NovaSky-AI/SkyRL, docs/content/docs/recipes/overview.mdx):
           Qwen2.5-1.5B-Instruct by GRPO, 140 steps of 1,024 x 5, .796; four H100.
           AReaL (https://github.com/inclusionAI/AReaL, docs/en/algorithms/prox_approx.md): the same
           model, 300 steps, .795 to .799 by another scorer; 163 to 207 minutes.
Expected   .567 and .796. By verl's log the model has to learn the form "#### number" first.
"""

from dataclasses import dataclass

from jaxppo import cli
from jaxppo.tasks import TASKS, TaskConfig, stages

# Qwen2.5's chat format, around verl's prompt
CHAT = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    f"<|im_end|>\n<|im_start|>user\n{TASKS['gsm8k'].prompt}<|im_end|>\n<|im_start|>assistant\n"
)


@dataclass(frozen=True)
class Gsm8k(TaskConfig):
    task: str = "gsm8k"
    name: str = "gsm8k"
    model: str = "Qwen/Qwen2.5-0.5B-Instruct"
    prompt_format: str = CHAT
    prompt_length: int = 512
    response_length: int = 512
    sft_steps: int = 0
    steps: int = 435
    batch_size: int = 256
    minibatches: int = 4
    loss: str = "clip"
    lam: float = 1.0
    whiten_ddof: int = 1
    kl_coef: float = 0.001
    kl_adaptive: bool = False
    entropy_coef: float = 0.001
    critic: str = "separate"
    critic_lr: float = 1e-5
    value_clip: float = 0.5
    value_coef: float = 1.0
    optimizer: str = "adamw"
    adam_eps: float = 1e-8
    lr: float = 1e-6
    lr_schedule: str = "constant"
    lora: int = 0
    dtype: str = "bfloat16"
    remat: str = "block"
    scan_layers: bool = True
    eval_every: int = 10
    save_every: int = 10
    test_rows: int = 1319


def main(options: Gsm8k) -> None:
    stages.run(options)


if __name__ == "__main__":
    cli.script(main, Gsm8k)
