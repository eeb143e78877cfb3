"""Your own policy loss, in your own script: nothing in the library changes.

Question   Does a loss that leaves out tokens whose ratio has left a band (in place of clipping it) learn as well as PPO's clip?
Command    python experiments/custom_loss.py            # --band 0.1; --steps 200; --seed 1
In a run   In custom_reward.py or a copy of sentiment.py, below `make_parts`: `parts = parts._replace(policy_loss=...)`.
           Checkpoints, metrics and --resume are those of any run; a loss is no setting, so give
           each its own --name.
Minutes    Under 1 on a CPU; a small random model learns to write one token of 32.
Expected   Right after 20 steps (seeds 0, 1, 2): band .998 1.000 1.000, clip .992 1.000 .998; after 60 steps all, with both
"""

from dataclasses import dataclass

from jaxppo import algorithms, cli, config, models, parallel, ppo
from jaxppo.config import Config
from jaxppo.models.shapes import llama
from jaxppo.rewards import in_program
from jaxppo.types import Prompts


def band_loss(logprobs, old_logprobs, advantages, mask, *, band, key=None):
    """−r A where |r − 1| ≤ band, else 0. Every argument is [B T]; nothing is reduced here."""
    import jax.numpy as jnp

    ratio = jnp.exp(logprobs - old_logprobs)
    inside = (jnp.abs(ratio - 1) <= band) & (mask > 0)
    return jnp.where(inside, -ratio * advantages, 0.0), {
        "inside_fraction": inside.astype(jnp.float32)
    }


@dataclass(frozen=True)
class Custom(Config):
    steps: int = 60
    response_length: int = 8
    epochs: int = 4
    lr: float = 3e-3
    kl_coef: float = 0.0
    band: float = 0.2
    """tokens whose ratio is farther from 1 have no gradient"""


def main(options: Custom) -> None:
    from functools import partial

    import jax
    import jax.numpy as jnp

    config.validate(options)
    model = models.make(llama(vocab_size=32))
    parts = algorithms.make_parts(options, in_program.count_token(7))
    ones = jnp.ones((options.batch_size, options.prompt_length), jnp.int32)
    prompts = Prompts(ones, ones > 0, jnp.arange(options.batch_size, dtype=jnp.int32))
    for name, loss in {
        "band": partial(band_loss, band=options.band),
        "clip": parts.policy_loss,
    }.items():
        step = parallel.compile_step(
            ppo.make_train_step(model, parts._replace(policy_loss=loss), options)
        )
        params, reference = (jax.jit(model.init)(jax.random.key(options.seed)) for _ in range(2))
        state = ppo.init_state(
            options,
            params,
            {"base": {}, "reference": reference, "reward": {}},
            jax.random.key(options.seed),
        )
        for number in range(1, options.steps + 1):
            state, metrics = step(state, prompts)
            if number in (20, options.steps):
                print(
                    f"{name}: step {number:3}, {float(metrics['reward']) / options.response_length:.3f} of tokens right"
                )


if __name__ == "__main__":
    cli.script(main, Custom)
