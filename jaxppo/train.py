"""The host loop: load a policy, feed prompts to the compiled step, log, evaluate, save. All the mathematics is elsewhere."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from jaxppo import algorithms, parallel, ppo, pretrained, sampling, tracking
from jaxppo import policy as policies
from jaxppo.checkpoint import Checkpoints
from jaxppo.config import Config, RunConfig, UserError, from_dict, to_dict, validate, validate_run
from jaxppo.data import prompts as data
from jaxppo.fetch import cache_folder
from jaxppo.models import init_value, lora, make, with_critic
from jaxppo.pretrained.tiny import tiny
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.rewards import shaping
from jaxppo.rollout import rollout
from jaxppo.types import Model, Params, Parts, Prompts, TrainState


@dataclass(frozen=True)
class Policy:
    """A model with its weights, cut into what is trained and what is not."""

    model: Model
    params: Params  # trained
    frozen: dict[str, Any]  # base, reference, and a place for the reward model
    tokenizer: Tokenizer


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache, readable by the user alone: who can write there can run code here."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = cache_folder() / "xla"
        folder.mkdir(mode=0o700, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))


def load_policy(config: RunConfig, *, reward: Params | None = None) -> tuple[RunConfig, Policy]:
    """The policy that the configuration names, and the configuration with the tokenizer's ids filled in.

    `reward`: parameters of a reward model of the policy's shape, for `value_init` reward; without them that is a UserError.

    With adapters the checkpoint is the base, and the base alone is the reference. Without, every weight is trained and the
    reference is a second copy.
    """
    if config.tiny:
        model_config, weights, tokenizer = tiny(config.seed)
    else:
        loaded = pretrained.load(config.model)
        model_config, weights, tokenizer = loaded.config, loaded.params, loaded.tokenizer
    if config.length > model_config.max_length:  # positions beyond the table would be clamped without a word
        raise UserError(
            f"--prompt-length {config.prompt_length} + --response-length {config.response_length} = {config.length} tokens, "
            f"but the model takes {model_config.max_length}; lower one of them"
        )
    algorithms.check(config)  # a wrong name is found before anything is compiled
    model = make(model_config, dtype=config.dtype, lora=config.lora, lora_alpha=config.lora_alpha, remat=config.remat)
    if config.critic == "separate" and config.value_loss != "none":
        model = with_critic(model, model, width=model_config.width)
        weights = {**weights, "critic": weights}  # it starts from the same weights; with adapters it shares them
    key = jax.random.key(config.seed)
    known = {path for path, _ in _leaves(weights)}
    # Only the leaves that the checkpoint lacks (adapters, value head) are computed; the rest is dead code to the compiler.
    new = jax.jit(lambda key: lora.split(model.init(key), lambda path: path not in known)[0])(key)
    has_critic = config.value_loss != "none"
    if config.lora:
        # The base is only ever an operand: rounded here once, it takes half the memory and no time in the step.
        own = {name: x for name, x in weights.items() if name != "critic"}
        base = policies.cast(jax.tree.map(jnp.asarray, own), model.dtype)
        base = {**base, "critic": base} if "critic" in weights else base
        params, frozen = new, {"base": base, "reference": None, "reward": {}}
    else:
        # `params` is donated to each step, the reference is not, so each has buffers of its own.
        reference = {name: jax.tree.map(jnp.array, x) for name, x in weights.items() if name != "critic"}
        params = lora.merge(jax.tree.map(jnp.array, weights), new)
        frozen = {"base": {}, "reference": reference, "reward": {}}
    if has_critic and config.value_init != "zero":
        params = init_value(params, jax.random.fold_in(key, 1), config.value_init, reward)
    config = dataclasses.replace(config, eos=tokenizer.eos_id, pad=tokenizer.pad_id)
    return config, Policy(model, params, frozen, tokenizer)


def _leaves(tree: Mapping, path: tuple = ()):
    for name, leaf in tree.items():
        if isinstance(leaf, Mapping):
            yield from _leaves(leaf, (*path, name))
        else:
            yield (*path, name), leaf


class PromptSet(NamedTuple):
    """Encoded prompts, all of them."""

    tokens: Int[np.ndarray, "N P"]
    mask: Bool[np.ndarray, "N P"]  # padding on the left

    def batch(self, config: Config, cursor: int) -> Prompts:
        """The batch that starts at a cursor, the copies of a prompt beside each other; a function of (seed, cursor) alone."""
        chosen = data.indices(
            len(self.tokens), cursor=cursor, batch_size=config.rows // config.group_size, seed=config.seed
        ).repeat(config.group_size)
        rows = np.arange(config.rows, dtype=np.int32)
        return _host_prompts(self.tokens[chosen], self.mask[chosen], rows)

    def call(self, config: RunConfig, cursor: int) -> Prompts:
        """The prompts of one dispatch: a batch, or steps_per_call batches with a leading dimension; NumPy arrays."""
        prompts = config.rows // config.group_size
        batches = [self.batch(config, cursor + k * prompts) for k in range(config.steps_per_call)]
        return batches[0] if config.steps_per_call == 1 else jax.tree.map(lambda *x: np.stack(x), *batches)


def fit(
    config: RunConfig,
    policy: Policy,
    parts: Parts,
    prompts: PromptSet,
    *,
    folder: Path,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
) -> TrainState:
    """Train to `config.steps` steps, from the newest checkpoint when `config.resume`; writes metrics, checkpoints and curves.

    `evaluate(state)` returns numbers for validation prompts; they are logged as `validation_<name>`, and `score` among them
    (else the batch's reward) decides which checkpoint is the best.
    """
    validate_run(config)
    step = compiled(config, policy, parts)
    state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(config.seed))
    checkpoints = Checkpoints(folder / "checkpoints")
    if config.resume:
        state = checkpoints.restore(state)
    else:
        tracking.write_config(folder, to_dict(config))
        if config.reward_reference:
            scores = first_scores(config, policy, parts, prompts, state)
            state = state.replace(statistics=shaping.normalise_to_reference(state.statistics, scores))
    tracker = tracking.Tracker(folder, first_step=int(state.step), total_steps=config.steps)
    try:
        return _loop(config, step, state, prompts, tracker, checkpoints, evaluate)
    finally:
        tracker.close()
        checkpoints.close()
        if (folder / "metrics.jsonl").stat().st_size:
            tracking.plot_curves(folder)


def compiled(config: RunConfig, policy: Policy, parts: Parts) -> parallel.CompiledStep:
    """The step in the configured mode, after a check that the devices are there and the batch divides over them."""
    found = len(jax.devices())
    if config.expect_devices and found != config.expect_devices:
        raise UserError(f"--expect-devices {config.expect_devices}, but there are {found}; is the accelerator's JAX installed?")
    validate(config, devices=parallel.count(config.parallel, config.mesh))

    def make(axis_name: str | None):
        train_step = ppo.make_train_step(policy.model, parts, config, axis_name=axis_name)
        return train_step if config.steps_per_call == 1 else ppo.repeat(train_step)

    step = parallel.prepare(make, mode=config.parallel, mesh=config.mesh, leading=int(config.steps_per_call > 1))
    if config.parallel == "auto" and found > 1:
        print(f"--parallel auto: {step.name}")
    return step


def first_scores(config: RunConfig, policy: Policy, parts: Parts, prompts: PromptSet, state: TrainState) -> jax.Array:
    """Raw scores of `reward_reference` rollouts of the policy as it is, NaN where invalid: what Ziegler et al. 2019
    (https://arxiv.org/abs/1909.08593, section 2.1) give mean 0 and deviation 1. Prompts from the end of the data's order."""

    def program(params, frozen, batch: Prompts, key):
        noise = sampling.row_uniforms(key, batch.index, config.response_length)
        rolled = rollout(
            policy.model, params, frozen, batch, noise, length=config.response_length, sample=config, eos=config.eos,
            pad=config.pad, with_values=False,
        )  # fmt: skip
        scores, valid = parts.reward(frozen["reward"], rolled)
        return jnp.where(valid, scores if scores.ndim == 1 else scores.sum(-1), jnp.nan)

    compiled, out = jax.jit(program), []
    for number in range(-(-config.reward_reference // config.rows)):
        key = jax.random.fold_in(state.key, 2**31 - 1 - number)  # far from any step's
        batch = prompts.batch(config, (2**31 - 1 - number) * config.rows)
        out.append(compiled(state.params, state.frozen, jax.device_put(batch), key))
    return jnp.concatenate(out)[: config.reward_reference]


def _loop(config, step, state, prompts: PromptSet, tracker, checkpoints, evaluate) -> TrainState:
    done, cursor = int(state.step), int(state.cursor)
    frozen = state.frozen
    # For what runs on one device; the untrained weights are there already.
    view = lambda state: step.whole(state.replace(frozen=None)).replace(frozen=frozen)
    state = step.place(state)
    clock = Stopwatch(config)
    while done < config.steps:
        batch = step.put(prompts.call(config, cursor))
        rows = clock.settle()
        state, metrics = step(state, batch)
        tracker.log(rows)  # the last step's numbers are written while this one runs
        clock.watch(done + 1, metrics)
        done += config.steps_per_call
        cursor += config.steps_per_call * config.rows // config.group_size
        last = done == config.steps
        evaluating = evaluate is not None and config.eval_every > 0 and (done % config.eval_every == 0 or last)
        saving = done % config.save_every == 0 or last
        if evaluating or saving:
            rows = clock.settle()
            if evaluating and evaluate is not None:
                rows[-1] |= {f"validation_{name}": x for name, x in evaluate(view(state)).items()}
            tracker.log(rows)
            if saving:
                checkpoints.save(view(state), score=rows[-1].get("validation_score", rows[-1]["reward"]))
            clock.restart()
    return view(state)


class Stopwatch:
    """Waits for the dispatch in flight and turns its metrics into numbers, with the seconds that it took."""

    def __init__(self, config: RunConfig):
        self.config, self.flying = config, None
        self.restart()

    def restart(self) -> None:
        self.started = time.monotonic()

    def watch(self, first_step: int, metrics: dict) -> None:
        self.flying = (first_step, metrics)

    def settle(self) -> list[dict[str, float]]:
        """One dict for each step of the dispatch in flight; none when nothing flies."""
        if self.flying is None:
            return []
        first, metrics = self.flying
        metrics = jax.device_get(metrics)
        seconds = (time.monotonic() - self.started) / self.config.steps_per_call
        self.flying = None
        self.restart()
        rows = []
        for k in range(self.config.steps_per_call):
            row = {name: float(x if self.config.steps_per_call == 1 else x[k]) for name, x in metrics.items()}
            speed = row["length"] * self.config.rows / seconds
            rows.append({"step": first + k, **row, "seconds": seconds, "tokens_per_second": speed})
        return rows


def _host_prompts(tokens: Any, mask: Any, index: Any) -> Prompts:
    """Prompts that are still NumPy arrays."""
    return Prompts(tokens, mask, index)


class Sample(NamedTuple):
    """One response, as text."""

    prompt: str
    response: str
    tokens: list[int]
    kl: float  # nats to the reference, summed over the response


class Sampler:
    """Responses to any number of prompts by one compiled program over a fixed number of rows."""

    def __init__(self, config: Config, policy: Policy, *, rows: int = 64, greedy: bool = False):
        self.rows, self.tokenizer, self.config = rows, policy.tokenizer, config

        def program(params, frozen, prompts, key):
            noise = sampling.row_uniforms(key, prompts.index, config.response_length)
            return rollout(
                policy.model, params, frozen, prompts, noise, length=config.response_length,
                sample=config, eos=config.eos, pad=config.pad, with_values=False, greedy=greedy,
            )  # fmt: skip

        self.program = jax.jit(program)

    def __call__(self, state: TrainState, prompts: PromptSet, *, seed: int) -> list[Sample]:
        """One response to each prompt; the same seed draws the same noise for each."""
        out: list[Sample] = []
        for start in range(0, len(prompts.tokens), self.rows):
            part = [x[start : start + self.rows] for x in prompts]
            short = self.rows - len(part[0])  # the last part is filled up with copies of a row, which are dropped below
            tokens, mask = (np.concatenate([x, x[:1].repeat(short, 0)]) for x in part)
            index = np.arange(start, start + self.rows, dtype=np.int32)
            done = self.program(state.params, state.frozen, _host_prompts(tokens, mask, index), jax.random.key(seed))
            out += self._texts(jax.device_get(done))[: self.rows - short]
        return out

    def _texts(self, done) -> list[Sample]:
        cut = done.tokens.shape[1] - done.mask.shape[1]
        ids = [row[keep].tolist() for row, keep in zip(done.tokens[:, cut:], done.mask > 0, strict=True)]
        heads = [row[keep].tolist() for row, keep in zip(done.tokens[:, :cut], done.attend[:, :cut], strict=True)]
        kl = ((done.raw_logprobs - done.ref_logprobs) * done.mask).sum(1)
        texts = zip(self.tokenizer.decode_batch(heads), self.tokenizer.decode_batch(ids), ids, kl.tolist(), strict=True)
        return [Sample(*row) for row in texts]


def restore(folder: Path) -> tuple[RunConfig, Policy, TrainState]:
    """A run as it was at its newest checkpoint, from its folder alone."""
    stored = json.loads((folder / "config.json").read_text())
    # How the value head started no longer matters: the checkpoint has it.
    config, policy = load_policy(dataclasses.replace(from_dict(RunConfig, stored), value_init="zero"))
    like = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(config.seed))
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        return config, policy, checkpoints.restore(like)
    finally:
        checkpoints.close()


def encode(texts: Sequence[str], tokenizer: Tokenizer, length: int, **options) -> PromptSet:
    """`data.prompts.encode` as a PromptSet."""
    encoded = data.encode(texts, tokenizer, length, **options)
    return PromptSet(encoded.tokens, encoded.mask)
