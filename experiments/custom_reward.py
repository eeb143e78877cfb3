"""Train a model on your own prompts with your own reward. Start here if you bring a task.

    1. Write prompts.jsonl, one JSON object a line: {"prompt": "..."}
    2. Edit `reward` below.
    3. Run python experiments/custom_reward.py --data prompts.jsonl --model path/or/hub-id

More options: --steps 100; --algorithm grpo; --reward-model runs/reward_model, which replaces
`reward` by a trained reward model. A loss of your own: see custom_loss.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxppo import algorithms, cli, config, train
from jaxppo.config import RunConfig
from jaxppo.data import jsonl, prompts
from jaxppo.rewards import host, in_program
from jaxppo.run import files, load


def reward(prompt: str, response: str) -> float:
    """Return any number; higher is better. This one likes short words.

    If it raises an exception or returns NaN, the response is left out of the update.
    """
    words = response.split()
    return -sum(map(len, words)) / len(words) if words else -10.0


@dataclass(frozen=True)
class Custom(RunConfig):
    name: str = "custom"
    prompt_length: int = 16
    dtype: str = "bfloat16"
    data: Path = Path("prompts.jsonl")
    """prompts, one JSON object a line: {"prompt": "..."}"""
    too_long: Literal["drop", "last", "error"] = "drop"
    """a prompt of more than prompt_length tokens is dropped, cut to its last tokens, or an error"""
    bad_lines: Literal["strict", "skip"] = "strict"
    """a line without a prompt is an error, or is skipped"""
    max_bad_lines: int = 10
    """most lines that may be skipped"""


def main(options: Custom) -> None:
    config.validate_run(options)

    # Read the prompts.
    rows = jsonl.read(
        options.data, errors=options.bad_lines, max_bad=options.max_bad_lines, strings=("prompt",)
    )
    texts = [row["prompt"] for _, row in rows]

    # Load the model.
    load.use_compilation_cache()
    options, policy = load.load_policy(options)

    # Turn the prompts into tokens.
    start = prompts.start_token(options, policy.tokenizer)
    encoded = prompts.encode(
        texts, policy.tokenizer, options.prompt_length, too_long=options.too_long, start=start
    )

    # Choose the reward: your function, or a trained model.
    judge = host.on_host(reward, policy.tokenizer.decode_batch)
    if options.reward_model:
        model, policy.frozen["reward"] = load.load_reward_model(options, policy.tokenizer)
        judge = in_program.reward_model(model)

    # Train. `parts` are the pieces of the algorithm; replace any of them below this line.
    parts = algorithms.make_parts(options, judge)
    folder = files.run_folder(options.runs, options.name, resume=options.resume)
    train.fit(options, policy, parts, encoded, folder=folder)
    print(f"written to {folder}; try: jaxppo sample {folder} {texts[0]!r}")


if __name__ == "__main__":
    cli.script(main, Custom)
