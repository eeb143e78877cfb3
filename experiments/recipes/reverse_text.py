"""Write a sentence backward, letter by letter.

Question   How much of a reversed sentence does a policy gradient get right beyond a supervised
           stage?
Method     Supervised on (sentence, "<reversed_text>...</reversed_text>"), then GRPO
           (https://arxiv.org/abs/2402.03300) without a KL penalty. The reward is difflib's
           similarity ratio of the text in the tags to the reversed sentence.
Command    python experiments/recipes/reverse_text.py
           # from prime-rl's supervised checkpoint, with its settings:
           python experiments/recipes/reverse_text.py --data PrimeIntellect/Reverse-Text-RL
             --model PrimeIntellect/Qwen3-0.6B-Reverse-Text-SFT --sft-steps 0
             --prompt-length 256 --response-length 128 --batch-size 128
             --group-size 16 --minibatches 1 --steps 20 --lr 3e-6 --lr-schedule constant
             --dtype bfloat16 --remat block --eval-every 5 --save-every 5
           # --model smollm2 --lora 8 --prompt-length 80 instead of a new network: not measured
           # --data examples.jsonl, a line each: {"prompt": sentence, "reference": reversed}
Data       Sentences of at most 30 letters of Shakespeare's plays (public domain): a small network
           begins to learn them in minutes. No test sentence is in the training set.
Published  prime-rl, examples/basic/reverse-text (https://github.com/PrimeIntellect-ai/prime-rl):
           Qwen3-0.6B, 100 supervised steps of 32 (lr 2e-5), then 20 steps of 8 x 16 rollouts of at
           most 128 tokens (lr 3e-6). Mean reward .05 before both, about .8 after both, of 60
           rollouts each; the number between the two is not published. Two GPUs, minutes.
Found      The small slice, five seeds, ratio of 500 test sentences: one sample of each, as in the
           public run, .345 -> .460 (+.087 to +.143, 95 % interval over seeds; each seed gains), the
           greedy response .560 -> .546 (-.028 to .000). Taught by 500 sentences until validation
           stopped improving, one seed sampled about .9, and 30 steps at this rate added nothing.
           The public run was not repeated.
Minutes    7 on two free cores with another run; up to 22 when more work shared them.
"""

from dataclasses import dataclass, replace

from jaxppo import cli
from jaxppo.tasks import TaskConfig, stages

ASK = "Reverse the text character-by-character. Put your answer in <reversed_text> tags."
CHAT = f"<|im_start|>system\n{ASK}<|im_end|>\n<|im_start|>user\n{{prompt}}<|im_end|>\n"
CHAT += "<|im_start|>assistant\n"


@dataclass(frozen=True)
class ReverseText(TaskConfig):
    task: str = "reverse_text"
    name: str = "reverse_text"
    prompt_length: int = 34
    response_length: int = 44
    max_vocab: int = 270
    width: int = 128
    layers: int = 3
    sft_steps: int = 150
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
    lr: float = 3e-4
    lora: int = 0
    eval_every: int = 40
    save_every: int = 40


def main(options: ReverseText) -> None:
    if options.model and not options.prompt_format:
        options = replace(options, prompt_format=CHAT)
    stages.run(options)


if __name__ == "__main__":
    cli.script(main, ReverseText)
