"""Your prompts, your reward, your checkpoint: the shortest path for somebody who comes with a task.

Edit `reward`, then: python experiments/custom_reward.py --data prompts.jsonl --model path/or/hub-id
--steps 100 (one JSON object a line: {"prompt": "..."}). With --reward-model runs/reward_model a
trained reward model takes the place of the function, in the compiled step. A loss of your own:
`parts = parts._replace(policy_loss=my_loss)` (see custom_loss.py).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxppo import algorithms, cli, config, train
from jaxppo.config import RunConfig
from jaxppo.data import prompts
from jaxppo.rewards import host, in_program
from jaxppo.run import files, load


def reward(prompt: str, response: str) -> float:
    """Any number; higher is better. Here: short words. An exception or NaN leaves the sample
    out.
    """
    words = response.split()
    return -sum(map(len, words)) / len(words) if words else -10.0


@dataclass(frozen=True)
class Custom(RunConfig):
    name: str = "custom"
    prompt_length: int = 16
    dtype: str = "bfloat16"
    data: Path = Path("prompts.jsonl")
    """prompts, one JSON object a line"""
    too_long: Literal["drop", "last", "error"] = "drop"
    """a prompt of more than prompt_length tokens is left out and counted, cut to its last tokens,
    or an error
    """
    bad_lines: Literal["strict", "skip"] = "strict"
    """a line that is no prompt ends the run before it begins, or is skipped and counted"""
    max_bad_lines: int = 10
    """most lines that may be skipped"""


def main(options: Custom) -> None:

    config.validate_run(options)
    records = prompts.read_jsonl(
        options.data, errors=options.bad_lines, max_bad=options.max_bad_lines
    )
    load.use_compilation_cache()
    options, policy = load.load_policy(options)
    texts = [record.prompt for record in records]
    start = prompts.start_token(options, policy.tokenizer)
    encoded = prompts.encode(
        texts, policy.tokenizer, options.prompt_length, too_long=options.too_long, start=start
    )
    judge = host.on_host(reward, policy.tokenizer.decode_batch)
    if options.reward_model:
        model, policy.frozen["reward"] = load.load_reward_model(options, policy.tokenizer)
        judge = in_program.learned(model)
    parts = algorithms.make_parts(options, judge)
    folder = files.run_folder(options.runs, options.name, resume=options.resume)
    train.fit(options, policy, parts, encoded, folder=folder)
    print(f"written to {folder}; try: jaxppo sample {folder} {records[0].prompt!r}")


if __name__ == "__main__":
    cli.script(main, Custom)
