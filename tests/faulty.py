"""A run that goes wrong when it is told to: a script like any other, for the fault tests to start,
kill and resume.

Everything is random tokens and a reward in the graph, so that a step takes milliseconds. At the
steps of --at the prompts hold a poisoned token, and what reads them says NaN. FAULTY_DIE (data,
manifest, prune) and FAULTY_AT in the environment say where, in the save of which step, SIGKILL
strikes.
"""

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

from jaxppo import algorithms, cli, train
from jaxppo.config import RunConfig
from jaxppo.data.prompts import PromptSet, batch_indices
from jaxppo.parallel import processes
from jaxppo.rewards.host import on_host
from jaxppo.run import checkpoint, files, load, manifest

POISON = 250
ROWS = 8
PROMPTS = 1024  # whatever --steps says: another number would be another run


@dataclass(frozen=True)
class Faulty(RunConfig):
    name: str = "a"
    tiny: bool = True
    batch_size: int = ROWS
    minibatches: int = 2
    prompt_length: int = 4
    response_length: int = 4
    lora: int = 2
    lr: float = 1e-2
    lr_schedule: str = "constant"
    layout: str = "dense"
    save_every: int = 2
    eval_every: int = 0
    max_invalid_rewards: float = 1.0
    fault: str = ""
    """loss | gradient | reward | logits | judge: what is NaN (or raises) at the steps of --at"""
    at: tuple[int, ...] = ()
    slow: float = 0.0
    """seconds that the host's reward takes for a batch"""


def main(options: Faulty) -> None:
    import jax.numpy as jnp
    import numpy as np

    load.use_compilation_cache()
    options, policy = load.load_policy(options)
    tokens = np.random.default_rng(0).integers(1, 200, (PROMPTS, 4)).astype(np.int32)
    for step in options.at:
        tokens[
            batch_indices(PROMPTS, cursor=(step - 1) * ROWS, batch_size=ROWS, seed=options.seed), 0
        ] = POISON
    prompts = PromptSet(tokens, np.ones_like(tokens, bool))

    def reward(params, rollout):
        scores = (rollout.response > 128).mean(1).astype(jnp.float32)
        sick = poisoned(rollout.tokens)
        return jnp.where(sick & (options.fault == "reward"), jnp.nan, scores), scores > -1

    parts = algorithms.make_parts(
        options, host(options, policy) if options.fault == "judge" or options.slow else reward
    )
    if options.fault == "loss":
        plain = parts.token_rewards
        log = lambda scores, rollout, **rest: (
            plain(scores, rollout, **rest)
            + jnp.log(jnp.where(poisoned(rollout.tokens), -1.0, 1.0)[:, None])
        )
        parts = parts._replace(token_rewards=log)
    if options.fault in ("logits", "gradient"):
        policy = replace(
            policy, model=policy.model._replace(apply=sick_apply(policy.model.apply, options))
        )
    folder = files.run_folder(options.runs, options.name, resume=options.resume)
    strike(os.environ.get("FAULTY_DIE", ""), int(os.environ.get("FAULTY_AT", "0")))
    state = train.fit(options, policy, parts, prompts, folder=folder)
    if processes.is_main():
        print(f"done: step {int(state.step)}")


def poisoned(tokens):
    """Rows whose prompt is; a response may hold the token by chance."""
    return (tokens[:, :4] == POISON).any(1) & (tokens.shape[1] >= 4)


def sick_apply(apply, options: Faulty):
    """Hidden states that are NaN where the prompt is poisoned, or whose gradient is: d √x / dx · 0
    at x = 0.
    """
    import jax.numpy as jnp

    def sick(params, tokens, attend, **rest):
        hidden, cache = apply(params, tokens, attend, **rest)
        where = poisoned(tokens)[:, None, None]
        if options.fault == "logits":
            return jnp.where(where, jnp.nan, hidden), cache
        return hidden + jnp.sqrt(jnp.where(where, hidden * 0.0, 1.0)) - jnp.where(
            where, 0.0, 1.0
        ), cache

    return sick


def host(options: Faulty, policy):
    """A judge in Python, which is slow, or raises for poisoned prompts."""
    import time

    def judge(prompt: str, response: str) -> float:
        time.sleep(options.slow / ROWS)
        if options.fault == "judge" and chr(POISON) in prompt:
            raise RuntimeError("poison")
        return len(response) / 10

    decode = lambda rows: ["".join(chr(token) for token in row) for row in rows]
    return on_host(judge, decode)


def strike(where: str, at: int) -> None:
    """SIGKILL in the middle of a save's data, between data and manifest, or before older ones are
    removed.
    """

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    seal, remove = manifest.seal, checkpoint.Checkpoints._prune
    if where == "data":

        class Writer:
            def save(self, path: Path, args) -> None:
                if path.parent.name == str(at):
                    (path.with_name("state.orbax-checkpoint-tmp") / "d").mkdir(parents=True)
                    kill()
                with plain() as writer:
                    writer.save(path, args=args)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

        plain, checkpoint.checkpointer = checkpoint.checkpointer, Writer
    elif where == "manifest":
        manifest.seal = lambda folder, about: (
            kill() if about.get("step") == at else seal(folder, about)
        )
    elif where == "prune":
        checkpoint.Checkpoints._prune = lambda self: (
            kill() if self.steps()[-1] == at else remove(self)
        )


if __name__ == "__main__":
    cli.script(main, Faulty)
