"""Measure TRL's last PPO trainer (trl 1.12) in its own virtual environment; `step.py` starts it.
Prints one JSON object.

It does the same work as jaxppo's step: a random GPT-2 of the same shape, the same number of
rollouts, prompts and responses of fixed length (there is no end-of-text token), 4 epochs x 4
minibatches with an optimizer update each, a frozen reference, reward = count of one token. TRL's
design has a separate value model and computes logits at all positions.

Half precision needs ACCELERATE_MIXED_PRECISION=bf16 in the environment: the trainer's own
`bf16=True` has no effect.
"""

import json
import sys
import tempfile
from types import SimpleNamespace

import datasets
import torch
import trl_common
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel
from trl.experimental.ppo import PPOConfig, PPOTrainer


class CountToken(torch.nn.Module):
    """A reward model as the trainer wants it: a backbone with hidden states, and a score of them.
    Running count of one token.
    """

    base_model_prefix = "backbone"

    def __init__(self, token: int, prompt: int):
        super().__init__()
        self.token, self.prompt = token, prompt
        self.backbone = self.count
        self.score = torch.nn.Identity()

    def count(self, input_ids, **_):
        hits = (input_ids == self.token).float()
        hits[:, : self.prompt] = 0.0
        return SimpleNamespace(hidden_states=(hits.cumsum(1)[..., None],))


def settings(work: dict, steps: int, folder: str) -> PPOConfig:
    return PPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1000,
        num_sample_generations=0,
        learning_rate=1e-5,
        temperature=1.0,
        response_length=work["response"],
        stop_token=None,
        missing_eos_penalty=None,
        num_ppo_epochs=work["epochs"],
        num_mini_batches=work["minibatches"],
        per_device_train_batch_size=work["rows"],
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=work["rows"],
        total_episodes=work["rows"] * (steps + 1),
    )


def trainer(work: dict, steps: int, folder: str, clock: trl_common.Clock) -> PPOTrainer:
    shape = work["model"]
    config = trl_common.gpt2(shape, end=None, num_labels=1)
    never = shape["vocab_size"]  # no token has this id: nothing is padding and nothing ends
    prompts = torch.randint(0, shape["vocab_size"], (4 * work["rows"], work["prompt"]))
    return PPOTrainer(
        args=settings(work, steps, folder),
        processing_class=SimpleNamespace(pad_token_id=never, eos_token_id=never),
        model=GPT2LMHeadModel(config),
        ref_model=None,  # a frozen copy of the policy
        reward_model=CountToken(shape["vocab_size"] // 2, work["prompt"]),
        value_model=GPT2ForSequenceClassification(config),
        train_dataset=datasets.Dataset.from_dict({"input_ids": prompts.tolist()}),
        data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
        callbacks=[clock],
    )


def main(spec: dict) -> dict:
    trl_common.start()
    clock = trl_common.Clock()
    with tempfile.TemporaryDirectory() as folder:
        trained = trainer(spec["work"], spec["steps"], folder, clock)
        updates = []
        step = trained.optimizer.step
        trained.optimizer.step = lambda *args, **kwargs: (updates.append(1), step(*args, **kwargs))[
            1
        ]
        trained.train()
    work = spec["work"]
    expected = work["epochs"] * work["minibatches"] * (spec["steps"] + 1)
    if len(updates) != expected or trained.state.log_history[-1]["val/num_eos_tokens"]:
        raise SystemExit(
            f"wrong work: {len(updates)} updates, not {expected}, or a response that ended"
        )
    return trl_common.measured(trained, clock.ends)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
