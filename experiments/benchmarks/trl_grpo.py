"""Measure TRL's GRPO trainer (trl 1.16) in its own virtual environment; `ragged.py` starts it.
Prints one JSON object.

It does the same work as jaxppo's step: a random GPT-2 of the same shape, the same prompts, group
size and lengths of responses, as many updates, a frozen reference, reward = count of one token. A
processor of logits ends each row at its length, and no row before. TRL pads to the longest.

Half precision needs ACCELERATE_MIXED_PRECISION=bf16 in the environment.
"""

import json
import sys
import tempfile

import datasets
import tokenizers
import torch
import trl_common
from transformers import GPT2LMHeadModel, LogitsProcessorList, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

END = 0


class EndAt:
    """A processor of logits that ends each row at its length, unless that is the largest."""

    def __init__(self, lengths: list[int], prompt: int, most: int):
        self.last, self.prompt, self.most = torch.tensor(lengths) - 1, prompt, most

    def __call__(self, tokens, scores):
        done = tokens.shape[1] - self.prompt
        ends = (self.last == done) & (self.last + 1 < self.most)
        scores[:, END] = -torch.inf
        scores[ends] = -torch.inf
        scores[ends, END] = 0.0
        return scores


def words(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose token i is the word `i`."""
    vocabulary = {str(i) if i != END else "<end>": i for i in range(size)}
    whole = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<end>", pad_token="<end>")


def main(spec: dict) -> dict:
    trl_common.start()
    shape, work, group = spec["model"], spec["work"], spec["group_size"]
    rows, steps = work["rows"], spec["steps"] + 1  # the first is a warm-up
    updates = spec["epochs"] * spec["minibatches"]
    model = GPT2LMHeadModel(trl_common.gpt2(shape, end=END))
    prompts = torch.randint(1, shape["vocab_size"], (steps * rows // group, work["prompt"]))
    target = shape["vocab_size"] // 2
    clock = trl_common.Clock()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        trainer = GRPOTrainer(
            model=folder,  # and so is the reference
            reward_funcs=lambda completion_ids, **_: [
                float(x.count(target)) for x in completion_ids
            ],
            args=GRPOConfig(
                output_dir=folder,
                model_init_kwargs={"dtype": "float32"},
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                disable_tqdm=True,
                save_strategy="no",
                logging_steps=1000,
                learning_rate=1e-5,
                beta=spec["kl_coef"],
                num_generations=group,
                max_completion_length=work["response"],
                per_device_train_batch_size=rows // spec["minibatches"],
                gradient_accumulation_steps=1,
                steps_per_generation=spec["minibatches"],
                num_iterations=spec["epochs"],
                max_steps=steps * updates,
            ),
            train_dataset=datasets.Dataset.from_dict(
                {"prompt": [" ".join(map(str, row)) for row in prompts.tolist()]}
            ),
            processing_class=words(shape["vocab_size"]),
            callbacks=[clock],
        )
        generate, seen = trainer.model.generate, []

        def generate_lengths(*args, **kwargs):
            ends = EndAt(spec["lengths"], work["prompt"], work["response"])
            found = generate(*args, **kwargs, logits_processor=LogitsProcessorList([ends]))
            seen.append(int((found[:, work["prompt"] :] != END).sum()))
            return found

        trainer.model.generate = generate_lengths
        trainer.train()
    # a row that ended early has its end as the last of its tokens
    ended = sum(length < work["response"] for length in spec["lengths"])
    if seen != [sum(spec["lengths"]) - ended] * steps or len(clock.ends) != steps * updates + 1:
        raise SystemExit(f"wrong work: {seen} tokens, {len(clock.ends) - 1} updates")
    return trl_common.measured(trainer, clock.ends[::updates])


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
