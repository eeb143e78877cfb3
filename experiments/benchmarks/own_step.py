"""Measure jaxppo's step in its own process; `step.py` starts it. Prints one JSON object.

python experiments/benchmarks/own_step.py '{"size": "S/32", "dtype": "float32", "steps": 5, "parts":
true, "compile_only": false}'
"""

import json
import resource
import statistics
import sys
import time
from functools import partial

import floor
import jax
import jax.numpy as jnp

from jaxppo import algorithms, parallel, policy, ppo, sampling
from jaxppo.config import Config
from jaxppo.models import lora, make
from jaxppo.rewards import in_program
from jaxppo.rollout import rollout
from jaxppo.types import Batch, Prompts
from jaxppo.update import make_update

LARGE = [(2048, 2048, 2048), (4096, 1024, 4096), (1024, 4096, 1024), (3072, 256, 1024)]
TRIAD = 64 * 2**20  # float32 numbers in each of two arrays: 512 MiB


class Clock:
    """Wall and processor seconds of each call."""

    def __init__(self):
        self.wall, self.cpu = [], []

    def __call__(self, f, *args):
        wall, cpu = time.perf_counter(), time.process_time()
        out = jax.block_until_ready(f(*args))
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return out


class Subject:
    """The step of one size, its state and its prompts."""

    def __init__(self, work: floor.Work, dtype: str, seed: int = 0):
        self.config = Config(
            batch_size=work.rows,
            prompt_length=work.prompt,
            response_length=work.response,
            epochs=work.epochs,
            minibatches=work.minibatches,
            lora=0,
            dtype=dtype,
            lr=1e-5,
            lr_schedule="constant",
            seed=seed,
        )
        self.model = make(work.model, dtype=dtype)
        params = jax.jit(self.model.init)(jax.random.key(seed))
        self.parameters = lora.count(params)
        reference = jax.tree.map(
            jnp.copy, {name: x for name, x in params.items() if name != "value"}
        )
        frozen = {"base": {}, "reference": reference, "reward": {}}
        self.parts = algorithms.make_parts(
            self.config, in_program.count_token(work.model.vocab_size // 2)
        )
        self.state = ppo.init_state(self.config, params, frozen, jax.random.key(seed + 1))
        tokens = jax.random.randint(
            jax.random.key(seed + 2), (work.rows, work.prompt), 0, work.model.vocab_size, jnp.int32
        )
        self.prompts = Prompts(
            tokens, jnp.ones(tokens.shape, bool), jnp.arange(work.rows, dtype=jnp.int32)
        )

    def compile(self) -> dict:
        """Trace and compile the step, and keep it."""
        step = parallel.compile_step(ppo.make_train_step(self.model, self.parts, self.config))
        start = time.perf_counter()
        lowered = step.lower(self.state, self.prompts)
        traced = time.perf_counter()
        self.program = lowered.compile()
        return {"trace_s": traced - start, "compile_s": time.perf_counter() - traced}

    def run(self, steps: int) -> dict:
        """The step itself, after one step of warm-up."""
        clock = Clock()
        for _ in range(steps + 1):
            live, metrics = clock(
                self.program, self.state.replace(frozen=None), self.state.frozen, self.prompts
            )
            self.state = live.replace(frozen=self.state.frozen)
        if float(metrics["skipped"]) or not float(metrics["length"]) == self.config.response_length:
            raise SystemExit(f"wrong work: {metrics}")
        return {"steps_s": clock.wall[1:], "cpu_s": statistics.median(clock.cpu[1:])}

    def phases(self, steps: int) -> dict:
        """Rollout (to the advantages) and update, compiled apart."""
        roll, update = Clock(), Clock()
        generate = jax.jit(self._rollout)
        learn = jax.jit(make_update(self.model, self.parts, self.config), donate_argnums=0)
        frozen, live = self.state.frozen, self.state.replace(frozen={"base": {}})
        for i in range(steps + 1):
            key = jax.random.key(100 + i)
            batch = roll(generate, live.params, frozen, self.prompts, key)
            live, _ = update(learn, live, batch, key)
        return {
            "rollout_s": statistics.median(roll.wall[1:]),
            "update_s": statistics.median(update.wall[1:]),
        }

    def _rollout(self, params, frozen, prompts, key) -> Batch:
        """Numbers 1 to 4 of `ppo.make_train_step`; nothing is invalid here and nothing ends
        early.
        """
        c = self.config
        noise = sampling.row_uniforms(key, prompts.index, c.response_length)
        frozen = {**frozen, "base": policy.cast(frozen["base"], self.model.dtype)}
        rolled = rollout(
            self.model,
            params,
            frozen,
            prompts,
            noise,
            length=c.response_length,
            sample=c,
            eos=c.eos,
            pad=c.pad,
        )
        scores, valid = self.parts.reward(frozen["reward"], rolled)
        shaped = self.parts.token_rewards(scores, rolled, kl_coef=c.kl_coef, kl=self.parts.kl)
        advantages, returns, _ = self.parts.advantage(
            shaped, scores, rolled, valid=valid, statistics={}, axis_name=None
        )
        return Batch(rolled, rolled.mask, rolled.logprobs, advantages, returns)


def gemm_rate(shape: tuple, dtype, budget: float = 0.15) -> float:
    """FLOP/s of the step's own kind of product: operands in `dtype`, sums and result in float32.
    The best of some calls.
    """
    m, k, n, rows, batch = shape
    flops = 2.0 * batch * m * k * n
    several = int(
        min(max(5e7 / flops, 1), 64)
    )  # small products: many in one program, or the dispatch would be measured
    lead = (batch,) if batch > 1 else ()
    xs, w = (
        jnp.ones((several, *lead, m, k), dtype),
        jnp.ones((*lead, n, k) if rows else (*lead, k, n), dtype),
    )
    last = len(lead)
    contract = (((last + 1,), (last + 1 if rows else last,)), ((0,), (0,)) if lead else ((), ()))

    @partial(jax.jit, donate_argnums=0, keep_unused=True)
    def run(out, xs, w):
        # The result is written over `out`, as inside a program: fresh memory would cost page
        # faults.
        product = lambda x: jax.lax.dot_general(x, w, contract, preferred_element_type=jnp.float32)
        return (
            product(xs[0])
            if several == 1
            else jax.lax.scan(lambda _, x: (product(x), None), out, xs)[0]
        )

    clock = Clock()
    out = run(jnp.zeros((*lead, m, n), jnp.float32), xs, w)
    while len(clock.wall) < 3 or sum(clock.wall) < budget:
        out = clock(run, out, xs, w)
    return several * flops / min(clock.wall)


def memory_rate(times: int = 8) -> float:
    """Bytes/s of a ← s a + b over arrays too large for any cache: two reads and a write a number,
    the best of some calls.
    """
    triad = jax.jit(lambda a, b: 0.5 * a + b, donate_argnums=0)
    a, b = jnp.ones(TRIAD), jnp.ones(TRIAD)
    clock = Clock()
    for _ in range(times):
        a = clock(triad, a, b)
    return 3.0 * 4 * TRIAD / min(clock.wall)


def measure_rates(work: floor.Work, dtype) -> tuple[floor.Rates, floor.Rates]:
    """(the best product of any shape, each of the step's own shapes), with the same memory."""
    own = {shape: gemm_rate(shape, dtype) for shape in floor.own_shapes(work)}
    best = max([*own.values(), *(gemm_rate((*shape, False, 1), dtype) for shape in LARGE)])
    memory = memory_rate()
    return floor.Rates(best, memory), floor.Rates(best, memory, own)


def main(spec: dict) -> dict:
    work = floor.WORKS[spec["size"]]
    subject = Subject(work, spec["dtype"])
    out = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "parameters": subject.parameters,
        **subject.compile(),
    }
    if spec["compile_only"]:
        return out
    out |= subject.run(spec["steps"])
    # before anything else is measured: the peak is the compiler's or the step's
    out["peak_gb"] = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )
    if spec["parts"]:
        out |= subject.phases(spec["steps"])
        parameters, itemsize = subject.parameters, jnp.dtype(spec["dtype"]).itemsize
        del subject
        best, own = measure_rates(work, jnp.dtype(spec["dtype"]))
        out |= {"gemm_gflops": best.gemm / 1e9, "memory_gb_s": best.memory / 1e9}
        out["floor_parts_s"] = floor.seconds(work, best, itemsize=itemsize, parameters=parameters)
        out["own_floor_parts_s"] = floor.seconds(
            work, own, itemsize=itemsize, parameters=parameters
        )
        out["own_gflops"] = {
            "x".join(map(str, shape)): rate / 1e9 for shape, rate in own.shapes.items()
        }
    return out


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
