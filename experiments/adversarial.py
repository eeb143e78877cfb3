"""Adversarial text generation: train a discriminator against the policy's samples, and the policy
against the discriminator.

Question   Do samples of a language model come closer to real sentences if a discriminator is the
           reward, and what does it cost?
Method     A language model of review sentences; then rounds: the discriminator learns real from
           sampled sentences, and PPO (https://arxiv.org/abs/1707.06347) maximises its logit
           (SeqGAN, https://arxiv.org/abs/1609.05473) with a KL penalty to the language model. At
           the end a new judge is trained for each of the two, on fresh samples: how often does it
           tell held-out sentences from samples? .5 is the best that a generator can reach.
Command    python experiments/adversarial.py
           # --data texts.jsonl, a line each: {"text": "..."}
Found      Two seeds: told apart .513 -> .531 and .546 -> .609, perplexity of real sentences
           166 -> 168 and 160 -> 164. A new judge hardly tells samples of the language model from
           held-out sentences, which leaves nothing to gain: the task needs a better judge. Before
           real sentences were cut like samples, three seeds had .742 -> .639, .736 -> .710 and
           .775 -> .628: probably judges and policy had learned how samples end.
Changed    First there were 10 rounds of 10 steps at lr 2e-4 and KL .05, one seed: the policy went
           back and forth between responses of 6 and of 30 tokens, and ended farther from real text
           than it began (.749 -> .815). The present settings were chosen after that.
Minutes    5 to 20 on a core that other work shared.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxppo import algorithms, cli, ppo, supervised, tasks, train
from jaxppo.data import jsonl, prompts, rows, sentiment
from jaxppo.data.examples import Example, Examples, drop_duplicates
from jaxppo.errors import UserError
from jaxppo.models import lora
from jaxppo.parallel import processes
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.rewards import in_program, text
from jaxppo.run import files, load, resume, sampler, validation
from jaxppo.run.checkpoint import Checkpoints
from jaxppo.run.policy import Policy
from jaxppo.tasks import TaskConfig, stages


@dataclass(frozen=True)
class Adversarial(TaskConfig):
    RANGES: ClassVar = dict.fromkeys(("sft_steps", "rounds", "judge_steps"), "(0, inf)")
    UNREAD: ClassVar = {
        "reward": "the discriminator is the reward",
        "prompt_format": "the prompt is a line break",
        **dict.fromkeys(("policy_examples", "eval_samples"), "the policy's prompt has no examples"),
    }

    task: str = "adversarial"
    name: str = "adversarial"
    prompt_length: int = 1
    response_length: int = 31
    sft_steps: int = 800
    steps: int = 100
    batch_size: int = 128
    lr: float = 1e-4
    lr_schedule: str = "constant"
    lora: int = 0
    kl_coef: float = 0.1
    kl_adaptive: bool = False
    eval_every: int = 0
    save_every: int = 10
    data: str = ""
    """texts, one JSON object with "text" a line; empty = review sentences"""
    rounds: int = 20
    """rounds of discriminator and policy; each has the same share of the steps"""
    judge_steps: int = 30
    """training steps of the discriminator in a round"""


def main(options: Adversarial) -> None:
    root = stages.check(options)
    if options.tiny:
        options = replace(stages.tiny_options(options), prompt_length=1, rounds=2, judge_steps=2)
    if options.steps % options.rounds:
        raise UserError(
            f"--steps {options.steps} does not divide into --rounds {options.rounds}; "
            "make it a multiple"
        )
    # A line break is the prompt of every sentence.
    task = tasks.Task("", "", (), prompt="\n", response="{reference}")
    stages.check_resumed(options, task, root)
    load.use_compilation_cache()
    if options.data:
        texts = [row["text"] for _, row in jsonl.read(options.data, strings=("text",))]
    else:
        texts = sentiment.load_reviews().texts[:: 40 if options.tiny else 1]
    texts = drop_duplicates(texts, "texts")
    parts = rows.train_validation_split(texts, 0.2)
    training, held_out = ([Example("", texts[i]) for i in part] for part in parts)
    half = len(held_out) // 2
    examples = Examples(training, held_out[:half], held_out[half:])
    model = stages.train_baseline(options, task, examples, root)
    game = Game(replace(options, **stages.prompt_settings(options, task)), root, model, examples)
    for number in range(1, options.rounds + 1):
        game.play_round(number)
    done = {
        "supervised": game.evaluate("judge", game.initial_state()),
        "policy": game.evaluate("judge_of_policy", game.policy_state()),
    }
    if processes.is_main():
        done |= stages.run_info(options, root)
        done["gain"] = {name: [done["policy"][name] - x] for name, x in done["supervised"].items()}
        stages.write_result(options, root, done)
        for name, x in done["supervised"].items():
            print(f"{name}: {x:.3f} -> {done['policy'][name]:.3f}")


def line_breaks(config: Adversarial, tokenizer: Tokenizer, number: int) -> prompts.PromptSet:
    """The prompt, so many times."""
    start = prompts.start_token(config, tokenizer)
    return prompts.encode(["\n"] * number, tokenizer, config.prompt_length, start=start)


class Game:
    """Policy and discriminator. Each is a run with its own folder, so both can be resumed in any
    round.
    """

    def __init__(self, options: Adversarial, root: Path, model: Path, examples: Examples):
        self.options, self.root, self.examples = options, root, examples
        common = {"runs": str(root), "model": str(model), "tiny": False}
        config = replace(options, name="policy", **common)
        resume.check_early(config)
        self.config, self.policy = load.load_policy(config)
        supervised = stages.supervised_settings(root, options.judge_steps) | {
            "lr_schedule": "constant",
            "value_loss": "mse",
            "batch_size": 64,
            "lr": 5e-4,
            "eval_every": 0,
            "save_every": options.judge_steps,
            "lr_warmup": 0,
        }
        config = replace(options, name="discriminator", **common, **supervised)
        self.judge_config, self.discriminator = load.load_policy(config)

    def steps_done(self, name: str) -> int:
        """Steps that a run has saved, as the first process sees it."""
        exists, folder = (self.root / name).exists(), self.root / name / "checkpoints"
        steps = Checkpoints(folder, write=False).steps() if exists else []
        return processes.broadcast_int(steps[-1] if steps else 0)

    def play_round(self, number: int) -> None:
        """Train the discriminator on samples of the policy, then the policy on the discriminator's
        logit.
        """
        steps = number * (self.options.steps // self.options.rounds)
        if self.steps_done("policy") >= steps:
            return
        turn = self.options.judge_steps
        state = self.train_discriminator(
            "discriminator", number * turn, self.policy_state(), turn=turn, seed=number
        )
        reward = lora.merge(self.discriminator.frozen["base"], state.params)
        policy, folder = self.copy(self.policy, reward=reward), self.root / "policy"
        started = files.has_started(folder)
        config = replace(self.config, steps=steps, resume=started)
        files.run_folder(self.root, "policy", resume=started)
        parts = algorithms.make_parts(config, in_program.reward_model(self.discriminator.model))
        train.fit(config, policy, parts, self.prompts(self.options.batch_size), folder=folder)

    def copy(self, policy: Policy, *, reward=None) -> Policy:
        """A policy with its own arrays, because training destroys them."""
        frozen = {**policy.frozen, "reward": reward or {}}
        return replace(policy, params=jax.tree.map(jnp.copy, policy.params), frozen=frozen)

    def initial_state(self):
        """The state of the policy before the first round: the language model."""
        key = jax.random.key(self.options.seed)
        return ppo.init_state(self.config, self.policy.params, self.policy.frozen, key)

    def policy_state(self):
        """The newest state of the policy."""
        if not self.steps_done("policy"):
            return self.initial_state()
        return Checkpoints(self.root / "policy" / "checkpoints", write=False).restore(
            self.initial_state()
        )

    def prompts(self, number: int) -> prompts.PromptSet:
        return line_breaks(self.config, self.policy.tokenizer, number)

    def real_and_sampled(self, texts: list[str], state, *, seed: int):
        """(rows of samples with label 0 and of the texts with label 1, the samples), as many
        samples as texts.
        """
        tokenizer, most = self.policy.tokenizer, self.options.response_length
        draw = sampler.Sampler(self.config, self.policy, rows=64)
        sampled = [sample.tokens for sample in draw(state, self.prompts(len(texts)), seed=seed)]
        encode = rows.inside(tokenizer.encode)
        real = [[*encode(text), tokenizer.eos_id][:most] for text in texts]
        prompt = self.prompts(1)
        start = prompt.tokens[prompt.mask].tolist()
        label = np.repeat(np.asarray([0, 1], np.float32), len(texts))
        sequences = [start + ids for ids in sampled + real]
        return rows.from_ids(sequences, self.config.length, label=label), sampled

    def train_discriminator(self, name: str, steps: int, state, *, turn: int, seed: int):
        """Train a discriminator up to `steps`; the last `turn` of them are on samples of this
        state.
        """
        started = files.has_started(self.root / name)
        # each round has new samples
        own = {"name": name, "steps": steps, "resume": started, "data_changed": "ok"}
        config = replace(self.judge_config, **own)
        real = [x.reference for x in self.examples.train]
        most = min(turn * config.batch_size // 2, len(real))  # half of the rows are sampled
        data, _ = self.real_and_sampled(random.Random(seed).sample(real, most), state, seed=seed)
        files.run_folder(config.runs, name, resume=config.resume)
        policy = self.copy(self.discriminator)
        objective = supervised.binary_cross_entropy(policy.model)
        return train.fit(config, policy, objective, data, folder=self.root / name)

    def evaluate(self, name: str, state) -> dict[str, float]:
        """How often a new judge tells a state's samples from held-out sentences, the perplexity of
        those sentences, and the diversity of the samples.
        """
        steps = 10 * self.options.judge_steps
        judge = self.train_discriminator(name, steps, state, turn=steps, seed=1000)
        real = [x.reference for x in self.examples.test]
        data, sampled = self.real_and_sampled(real, state, seed=1001)
        objective = supervised.binary_cross_entropy(self.discriminator.model)
        accuracy = validation.make_validation(
            self.judge_config, self.discriminator, objective, data
        )
        objective = supervised.language_model(self.policy.model, self.config)
        tokenizer, pairs = self.policy.tokenizer, [("\n", x) for x in real]
        data = rows.responses(
            pairs,
            tokenizer.encode,
            self.config.length,
            eos=tokenizer.eos_id,
            longest=self.config.response_length,
            start=prompts.start_token(self.config, tokenizer),
        )
        perplexity = validation.make_validation(self.config, self.policy, objective, data)
        return {
            "told apart": accuracy(judge)["accuracy"],
            "perplexity": perplexity(state)["perplexity"],
            "distinct_2": text.distinct(sampled, 2, tokens=4000),
        }


if __name__ == "__main__":
    cli.script(main, Adversarial)
