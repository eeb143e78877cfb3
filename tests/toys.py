"""Small models, prompts, settings and states that the tests share."""

import dataclasses
from functools import cache
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxppo import algorithms, models, parallel, policy, ppo, sampling
from jaxppo.config import Config
from jaxppo.models import shapes
from jaxppo.models.shapes import ModelConfig
from jaxppo.rewards.in_program import count_token
from jaxppo.rollout import rollout
from jaxppo.types import Environment, Model, Parts, Prompts, Rollout, TrainState

VOCAB = 11
EOS = 1
LLAMA = shapes.llama(
    vocab_size=VOCAB, width=16, num_layers=1, num_heads=4, num_kv_heads=2, max_length=32
)
GEMMA2 = dataclasses.replace(
    LLAMA,
    num_layers=2,
    window=3,
    no_window=(1,),
    norm="rms_plus_one",
    post_norms=True,
    scaled_embedding=True,
    query_size=3,
    score_cap=0.5,
    logit_cap=2.0,
    activation="gelu_tanh",
)
GEMMA3 = dataclasses.replace(
    GEMMA2, score_cap=None, logit_cap=None, qk_norm=True, window_theta=10.0, rope_scaling=(8.0,)
)
GPT2 = shapes.gpt2(vocab_size=VOCAB, width=16, num_layers=1, num_heads=4, max_length=32)
SETTINGS = Config(
    batch_size=8,
    prompt_length=4,
    response_length=5,
    epochs=2,
    minibatches=2,
    steps=10,
    lora=0,
    eos=EOS,
    kl_adaptive=False,
)


class Toy(NamedTuple):
    """A model and its parameters."""

    config: ModelConfig
    model: Model
    params: dict


def random_params(model: Model, seed: int = 0) -> dict:
    """Parameters of which none is 0 or 1, so that every one of them changes the output."""
    leaves, tree = jax.tree.flatten(jax.jit(model.init)(jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    noisy = [
        x + 0.25 * rng.standard_normal(x.shape).astype(np.float32) for x in jax.device_get(leaves)
    ]
    return jax.tree.map(jnp.asarray, jax.tree.unflatten(tree, noisy))


def compiled(model: Model) -> Model:
    """The model with functions that are programs: of a call outside of a program, each operation
    would be compiled alone. Inside of one they are as before.
    """
    program = lambda fn: jax.jit(fn, inline=True)
    functions = {"apply": model.apply, "logits": model.logits, "value": model.value}
    return model._replace(**{name: program(fn) for name, fn in functions.items()})


@cache
def make(shape: ModelConfig, dtype: str = "float32", lora: int = 0, scan: bool = False) -> Toy:
    model = compiled(models.make(shape, dtype=dtype, lora=lora, scan=scan))
    return Toy(shape, model, random_params(model))


def llama(dtype: str = "float32") -> Toy:
    return make(LLAMA, dtype)


def gpt2(dtype: str = "float32") -> Toy:
    return make(GPT2, dtype)


FAMILIES = {"llama": llama, "gpt2": gpt2}


def ragged(lengths, width: int, seed: int = 0) -> Prompts:
    """Random prompts of these lengths, padded on the left with token 0 to `width`. Row i's tokens
    hang on i alone.
    """
    tokens = np.zeros((len(lengths), width), np.int32)
    for row, n in enumerate(lengths):
        tokens[row, width - n :] = np.random.default_rng([seed, row]).integers(2, VOCAB, n)
    mask = np.arange(width)[None] >= width - np.asarray(lengths)[:, None]
    return Prompts(
        jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(len(lengths), dtype=jnp.int32)
    )


def prompts(rows: int = SETTINGS.batch_size, seed: int = 0) -> Prompts:
    """Prompts of 1 to 4 tokens."""
    return ragged(
        [1 + i % SETTINGS.prompt_length for i in range(rows)], SETTINGS.prompt_length, seed
    )


def grouped(group_size: int, rows: int = SETTINGS.batch_size, seed: int = 0) -> Prompts:
    """`prompts`, each for `group_size` adjacent rows."""
    few = prompts(rows // group_size, seed)
    return Prompts(
        *(jnp.repeat(x, group_size, 0) for x in (few.tokens, few.mask)),
        jnp.arange(rows, dtype=jnp.int32),
    )


def roll(
    toy: Toy,
    prompts: Prompts,
    settings: Config = SETTINGS,
    *,
    key: int = 7,
    reference: dict | None = None,
    **options,
) -> Rollout:
    """A rollout of the toy's policy, whose reference is the policy itself unless given."""
    frozen = {"base": {}, "reference": toy.params if reference is None else reference}
    options = {
        "length": settings.response_length,
        "eos": settings.eos,
        "pad": settings.pad,
    } | options
    program = _roll_program(toy.model, settings, tuple(options.items()))
    return program(toy.params, frozen, prompts, jax.random.key(key))


@cache
def _roll_program(model: Model, settings: Config, items: tuple):
    options = dict(items)

    def program(params, frozen, prompts, key):
        noise = sampling.row_uniforms(key, prompts.index, options["length"])
        return rollout(model, params, frozen, prompts, noise, sample=settings, **options)

    return jax.jit(program)


def score(
    toy: Toy, rolled: Rollout, settings: Config = SETTINGS, params: dict | None = None
) -> policy.ResponseLogprobs:
    """What the toy's policy, or these parameters, say of a rollout."""
    return _score_program(toy.model, settings)(toy.params if params is None else params, rolled)


@cache
def _score_program(model: Model, settings: Config):
    return jax.jit(
        lambda params, rolled: policy.response_logprobs(model, params, rolled, config=settings)
    )


def copied(tree):
    """The tree in buffers of its own: a step destroys the state that it is given."""
    return jax.tree.map(jnp.copy, tree)


def logits_in_two_parts(model: Model, params, prompts: Prompts):
    """Logits of rows that are read with a cache: all tokens but the last, then that."""
    rows, length = prompts.tokens.shape
    cache, parts = model.init_cache(rows, length), []
    for some in (slice(0, length - 1), slice(length - 1, length)):
        hidden, cache = model.apply(
            params, prompts.tokens[:, some], prompts.mask[:, some], cache=cache
        )
        parts.append(model.logits(params, hidden))
    return jnp.concatenate(parts, 1)


def state(toy: Toy, settings: Config = SETTINGS, *, seed: int = 0) -> TrainState:
    """The state before the first step; every weight is trained, the reference is a copy."""
    frozen = {"base": {}, "reference": copied(toy.params), "reward": {}}
    return ppo.init_state(settings, copied(toy.params), frozen, jax.random.key(seed))


def parts(settings: Config = SETTINGS, **changes) -> Parts:
    """The configured parts with the count of token 3 as reward, and some exchanged."""
    return algorithms.make_parts(settings, count_token(3))._replace(**changes)


def step(toy: Toy, settings: Config = SETTINGS, **changes) -> parallel.CompiledStep:
    """A compiled step of the toy."""
    return parallel.compile_step(
        ppo.make_train_step(toy.model, parts(settings, **changes), settings)
    )


class Step:
    """A compiled step and how to start it afresh. `changes` are of settings, or an environment."""

    def __init__(self, *, environment: Environment | None = None, **changes):
        self.settings = dataclasses.replace(SETTINGS, **changes)
        self.toy = llama()
        self.compiled = step(self.toy, self.settings, environment=environment)

    def state(self, *, seed: int = 0) -> TrainState:
        return state(self.toy, self.settings, seed=seed)

    def __call__(self, state: TrainState, prompts: Prompts):
        return self.compiled(state, prompts)


def numbers(tree):
    """The tree with NumPy arrays as leaves; PRNG keys as their words."""
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return jax.tree.map(lambda x: np.asarray(plain(x)), tree)


def assert_same(one, other) -> None:
    """Two trees are equal, bit for bit."""
    chex.assert_trees_all_equal(numbers(one), numbers(other))


def assert_close(one, other, *, rtol: float = 1e-7, atol: float = 0.0) -> None:
    """Two trees are equal within a tolerance."""
    chex.assert_trees_all_close(numbers(one), numbers(other), rtol=rtol, atol=atol)
