"""Time a step whose responses differ in length, dense and packed.

Question   What does a step cost when it pays only for tokens that exist?
Work       GRPO, 64 rollouts, prompt 128, responses up to 256 tokens whose lengths are a fixed list
           (`lengths.json`: geometric, mean 64), reward = count of one token, frozen reference.
             S     GPT-2 shape, 4 layers, width 256, vocabulary 8,192 (5 M), all weights, 4 epochs
                   x 4 minibatches
             135M  SmolLM2's shape, 30 layers, width 576, vocabulary 49,152, adapters of rank 8,
                   1 x 4
Command    python experiments/benchmarks/ragged.py                # S, float32, groups of 8
           python experiments/benchmarks/ragged.py --size 135M --dtype bfloat16 --steps 3
           python experiments/benchmarks/ragged.py --group-size 1 --full   # nothing to gain
           python experiments/benchmarks/ragged.py --peer trl   # and TRL 1.16's GRPO trainer
Minutes    4 for S (2 CPU cores). The machine must be quiet.
Columns    step: median seconds of the whole program, dense and packed in turns in one process.
           rollout: the part before the reward, compiled alone. positions: what an epoch of the
           update computes. floor: the arithmetic of the tokens that exist, at the best rate of a
           matrix product measured in the same process.

`--peer trl` runs TRL's trainer on the same lengths (`trl_grpo.py`), at S, in the virtual
environment of `step.py` with trl==1.16.0.
"""

import dataclasses
import json
import os
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import floor
import jax
import jax.numpy as jnp
import numpy as np
import own_step
import step

from jaxppo import algorithms, cli, models, parallel, policy, ppo, sampling, update
from jaxppo.config import Config
from jaxppo.costs import phases
from jaxppo.errors import UserError
from jaxppo.models import lora, shapes
from jaxppo.rewards import in_program
from jaxppo.rollout import rollout
from jaxppo.types import Prompts

HERE = Path(__file__).parent
LENGTHS = json.loads((HERE / "lengths.json").read_text())


@dataclass(frozen=True)
class Options:
    RANGES: ClassVar = {"steps": "(0, inf)", "group_size": "(0, inf)"}

    size: Literal["S", "135M", "tiny"] = "S"
    """shape of the network; tiny is a smoke test"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    group_size: int = 8
    """samples for each prompt"""
    full: bool = False
    """all responses have the full length"""
    steps: int = 5
    """steps timed of each layout, after one of warm-up"""
    peer: Literal["none", "trl"] = "none"
    """also run TRL's GRPO trainer on the same work"""
    peer_python: Path = Path("~/.cache/jaxppo/trl-venv/bin/python")
    """the python of the peer's virtual environment"""
    json: bool = False
    """print the numbers as one line of JSON, the last"""


@dataclass(frozen=True)
class Work:
    """A size: its network and its settings."""

    model: shapes.ModelConfig
    epochs: int
    lora: int = 0
    prompt: int = 128
    response: int = 256
    rows: int = 64


WORKS = {
    "S": Work(
        shapes.gpt2(vocab_size=8192, width=256, num_layers=4, num_heads=4, max_length=384), epochs=4
    ),
    "135M": Work(
        dataclasses.replace(
            shapes.llama(
                vocab_size=49152,
                width=576,
                num_layers=30,
                num_heads=9,
                num_kv_heads=3,
                max_length=384,
            ),
            mlp_width=1536,
            tied=True,
        ),
        epochs=1,
        lora=8,
    ),
    "tiny": Work(
        shapes.gpt2(vocab_size=64, width=16, num_layers=1, num_heads=2, max_length=24),
        epochs=1,
        prompt=8,
        response=16,
        rows=16,
    ),
}


def main(options: Options) -> None:
    work = WORKS[options.size]
    if options.peer == "trl":
        step.check_peer(options.peer_python)
        if work.lora:
            raise UserError(
                f"--peer trl --size {options.size}: TRL is compared at S, without adapters"
            )
    lengths = response_lengths(work, full=options.full)
    dense, packed = (Subject(options, work, lengths, layout) for layout in ("dense", "packed"))
    clocks = {subject: own_step.Clock() for subject in (dense, packed)}
    for _ in range(options.steps + 1):
        for subject, clock in clocks.items():
            clock(subject.step)
    seconds = {subject: statistics.median(clock.wall[1:]) for subject, clock in clocks.items()}
    rolls = {subject: subject.time_rollout(options.steps) for subject in clocks}
    rate = best_rate(work, jnp.dtype(options.dtype))
    least = floor_seconds(work, lengths, options.group_size, rate)
    positions = positions_of_an_epoch(dense.config, work, lengths)
    found = {
        "size": options.size,
        "dtype": options.dtype,
        "group_size": options.group_size,
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "dense_s": seconds[dense],
        "packed_s": seconds[packed],
        "ratio": seconds[packed] / seconds[dense],
        "dense_rollout_s": rolls[dense],
        "packed_rollout_s": rolls[packed],
        "dense_temporaries": dense.temporaries,
        "packed_temporaries": packed.temporaries,
        "tokens": positions["tokens"],
        "positions_dense": positions["dense"],
        "positions_packed": positions["packed"],
        "floor_s": least,
        "times_floor": seconds[packed] / least,
    }
    for name in ("dense", "packed"):
        print(
            f"{name:7} {found[name + '_s']:.3f} s a step, of which rollout "
            f"{found[name + '_rollout_s']:.3f} s; {found['positions_' + name]:,} positions an epoch"
            f" for {found['tokens']:,} tokens; {found[name + '_temporaries'] / 2**20:,.0f} MiB"
        )
    print(
        f"packed / dense {found['ratio']:.3f}; floor of the tokens that exist {least:.3f} s: "
        f"packed {found['times_floor']:.2f} x"
    )
    if options.peer == "trl":
        found["trl"] = measure_trl(options, work, dense.config, lengths)
        seconds = found["trl"]["step_s"]
        print(
            f"trl {found['trl']['trl']} {seconds:.3f} s a step: "
            f"{seconds / found['packed_s']:.1f} x packed, {seconds / found['dense_s']:.1f} x dense"
        )
    if options.json:
        print(json.dumps(found))


def response_lengths(work: Work, *, full: bool) -> np.ndarray:
    """Length of each rollout's response."""
    if full:
        return np.full(work.rows, work.response)
    return np.minimum(np.asarray(LENGTHS["rollouts"][: work.rows]), work.response)


class Subject:
    """The step of one layout, compiled, with its state and prompts."""

    def __init__(self, options: Options, work: Work, lengths: np.ndarray, layout: str):
        self.config = Config(
            algorithm="grpo",
            batch_size=work.rows,
            group_size=options.group_size,
            prompt_length=work.prompt,
            response_length=work.response,
            epochs=work.epochs,
            minibatches=4 if options.size != "tiny" else 2,
            lora=work.lora,
            dtype=options.dtype,
            lr=1e-5,
            lr_schedule="constant",
            layout=layout,
            advantage="group" if options.group_size > 1 else "moving_average",
        )
        self.model = models.make(work.model, dtype=options.dtype, lora=work.lora)
        whole = jax.jit(self.model.init)(jax.random.key(0))
        reference = jax.tree.map(jnp.copy, {n: x for n, x in whole.items() if n != "value"})
        trained, base = dict(whole), {}
        if work.lora:
            trained, base = lora.split(trained, lora.is_trained)
            reference = None
        frozen = {"base": policy.cast(base, self.model.dtype), "reference": reference, "reward": {}}
        self.parts = algorithms.make_parts(
            self.config, in_program.count_token(work.model.vocab_size // 2)
        )
        self.state = ppo.init_state(self.config, trained, frozen, jax.random.key(1))
        shape = (work.rows // options.group_size, work.prompt)
        tokens = jax.random.randint(jax.random.key(2), shape, 0, work.model.vocab_size, jnp.int32)
        self.prompts = Prompts(
            jnp.repeat(tokens, options.group_size, 0),
            jnp.ones((work.rows, work.prompt), bool),
            jnp.arange(work.rows, dtype=jnp.int32),
            {"max_tokens": jnp.asarray(lengths, jnp.int32)},
        )
        compiled = parallel.compile_step(ppo.make_train_step(self.model, self.parts, self.config))
        self.program = compiled.lower(self.state, self.prompts).compile()
        self.temporaries = self.program.memory_analysis().temp_size_in_bytes
        self.mean_length = float(np.mean(lengths))

    def step(self) -> dict:
        """Run one step; its metrics."""
        frozen = self.state.frozen
        live, metrics = self.program(self.state.replace(frozen=None), frozen, self.prompts)
        self.state = live.replace(frozen=frozen)
        if float(metrics["skipped"]) or abs(float(metrics["length"]) - self.mean_length) > 1e-3:
            raise SystemExit(f"wrong work: {metrics}")
        return metrics

    def time_rollout(self, steps: int) -> float:
        """Median seconds of the rollout alone, with the reference's log-probs."""
        c = self.config

        @jax.jit
        def roll(params, frozen, prompts):
            noise = sampling.row_uniforms(jax.random.key(3), prompts.index, c.response_length)
            options = {"length": c.response_length, "sample": c, "group_size": c.group_size}
            return rollout(self.model, params, frozen, prompts, noise, with_values=False, **options)

        clock = own_step.Clock()
        for _ in range(steps + 1):
            clock(roll, self.state.params, self.state.frozen, self.prompts)
        return statistics.median(clock.wall[1:])


def measure_trl(options: Options, work: Work, config: Config, lengths: np.ndarray) -> dict:
    """What `trl_grpo.py` finds on the same work."""
    names = ("rows", "prompt", "response")
    spec = {
        "model": dataclasses.asdict(work.model),
        "work": {name: getattr(work, name) for name in names},
        "lengths": lengths.tolist(),
        "group_size": config.group_size,
        "epochs": config.epochs,
        "minibatches": config.minibatches,
        "kl_coef": config.kl_coef,
        "steps": options.steps,
    }
    row = {"size": options.size, "dtype": options.dtype, "threads": "all"}
    precision = "bf16" if options.dtype == "bfloat16" else "no"
    extra = {"ACCELERATE_MIXED_PRECISION": precision, "HF_HUB_OFFLINE": "1"}
    python = str(options.peer_python.expanduser())
    found = step.run_child(python, "trl_grpo.py", spec, row, extra)
    return found | {"step_s": statistics.median(found["steps_s"])}


def positions_of_an_epoch(config: Config, work: Work, lengths: np.ndarray) -> dict[str, int]:
    """Positions that one epoch of the update computes in each layout (packed: the mean over the
    step's epochs), and tokens that exist: each prompt once, and the responses.
    """
    group, length = config.group_size, config.length
    draw = partial(update.minibatch_units, units=work.rows // group, minibatches=config.minibatches)
    number = 8  # permutations
    chosen = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), number)))
    groups = lengths.reshape(-1, group)
    # `packed_rows` deals groups to the minibatches in turn
    orders = (groups[units.T.reshape(-1)].reshape(-1) for units in chosen)
    packed = sum(phases.packed_rows(config, order, config.minibatches) for order in orders)
    return {
        "tokens": int(work.rows // group * work.prompt + lengths.sum()),
        "dense": work.rows * length,
        "packed": round(packed * length / number),
    }


def best_rate(work: Work, dtype) -> float:
    """FLOP/s of the best product among some of the step's shapes."""
    wide, tall = work.model.mlp_width, work.prompt + work.response
    own = [(tall, work.model.width, wide), (4 * tall, work.model.width, wide)]
    shapes = [(*shape, False, 1) for shape in (*own, *own_step.LARGE)]
    return max(own_step.gemm_rate(shape, dtype) for shape in shapes)


def floor_seconds(work: Work, lengths: np.ndarray, group: int, rate: float) -> float:
    """Seconds of the arithmetic that the tokens that exist need: each prompt is read once a pass,
    each response token once to be generated, once by the reference and `epochs` times by the
    update, which costs three passes (two with adapters).
    """
    model = work.model
    trunk, head = floor.weights(model)
    pair = 4.0 * model.num_layers * model.num_heads * model.head_dim
    prompts, response = work.rows // group, float(lengths.sum())
    tokens = prompts * work.prompt + response
    pairs = prompts * work.prompt**2 / 2 + (lengths * (work.prompt + lengths / 2)).sum()
    once = 2.0 * (trunk * tokens + head * response) + pair * pairs
    passes = 2 + (2 if work.lora else 3) * work.epochs
    return passes * once / rate


if __name__ == "__main__":
    cli.script(main, Options)
