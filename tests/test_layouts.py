"""The packed layout computes what the dense one does, whatever the settings: parameters, moments,
statistics, coefficients and every metric after two steps, for responses of 1 to T tokens.
"""

import contextlib
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo import algorithms, models, packing, parallel, ppo, sampling
from jaxppo.decoding import compaction
from jaxppo.models import critic, lora, shapes
from jaxppo.presets import ALGORITHMS
from jaxppo.rewards.in_program import count_token

T = 6
LLAMA, DEEP = toys.LLAMA, replace(toys.LLAMA, num_layers=2)
WINDOW = replace(LLAMA, window=4)
MIXED = replace(DEEP, window=4, no_window=(1,), no_rope=(0,))
CAPPED, TWO_THETAS = replace(toys.GEMMA2, window=4), replace(toys.GEMMA3, window=4)
# SGD for it: the bias of its keys has no gradient but rounding, which Adam would scale up
GPT2 = replace(toys.GPT2, num_layers=2)
SETTINGS = replace(
    toys.SETTINGS,
    batch_size=16,
    response_length=T,
    eos=(1, 4, 7),  # 3 tokens of 11: a row of each length
    lr=1e-2,
    lr_schedule="constant",
    kl_adaptive=True,
    kl_target=1.0,
)
EVERY = tuple(range(toys.VOCAB))  # as ids of the end of text: all responses have one token
STOPS = sampling.Stops(  # a text of two tokens of 2 to 9, one after the other
    column=jnp.array([0, 0] + [1] * 8 + [0]),
    next=jnp.array([[0, 1]] * 2),
    ends=jnp.array([[False, False], [False, True]]),
)
GROUPS = {"advantage": "group", "group_size": 8, "value_loss": "none"}
IN_LOSS = {"kl_place": "loss", "kl_adaptive": False}


def some_invalid(params, rolled):
    """The count of token 3; not valid for rows with a 5."""
    scores, valid = count_token(3)(params, rolled)
    return scores, valid & ~((rolled.response == 5) & (rolled.mask > 0)).any(1)


def even_prompts_alike(params, rolled):
    """The sum of the tokens; 1 for prompts that end with an even one."""
    scores, valid = count_token(3)(params, rolled)
    total = (rolled.response * (rolled.mask > 0)).sum(1).astype(jnp.float32)
    return jnp.where(rolled.tokens[:, 3] % 2 == 0, 1.0, total), valid


class Case(NamedTuple):
    """Settings, and what else a run consists of. Conjugate gradients (trpo, npg) amplify rounding
    by the condition number of the Fisher matrix.
    """

    changes: dict
    shape: shapes.ModelConfig = LLAMA
    model: tuple[tuple[str, Any], ...] = ()  # options of models.make
    reward: Any = count_token(3)
    length: tuple[float, float] = (1.3, T - 0.7)  # the mean lies between
    max_tokens: bool = False  # rows have limits of their own
    fewer_rows: bool = False  # decode by 16, 8 and 4 rows
    atol: float = 1e-5
    off: float = 1e-4  # of the first ratio from 1


def start(case: Case, settings, *, seed: int = 0):
    """(the model, the state before the first step)."""
    model = models.make(
        case.shape, lora=settings.lora, lora_on=settings.lora_on, **dict(case.model)
    )
    if settings.critic == "separate":
        model = critic.with_critic(model, models.make(case.shape), width=case.shape.width)
    params = toys.random_params(model, seed)
    frozen = {"base": {}, "reference": None, "reward": {}} | (
        {"stop": STOPS} if settings.stop else {}
    )
    if settings.lora:
        params, frozen["base"] = lora.split(params, lora.is_trained)
    else:
        other = toys.random_params(model, 5)
        frozen["reference"] = {name: x for name, x in other.items() if name != "critic"}
    return model, ppo.init_state(settings, params, frozen, jax.random.key(seed))


def prompts_of(case: Case, settings):
    prompts = toys.grouped(settings.group_size, settings.rows)
    limits = 1 + jnp.arange(settings.rows, dtype=jnp.int32) % T
    return prompts.replace(extra={"max_tokens": limits} if case.max_tokens else {})


@contextlib.contextmanager
def small_sizes(case: Case):
    """Parts of two packed rows, and decode loops of ever fewer rows, at a toy's size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "LEAST_TOKENS", 2 * (toys.SETTINGS.prompt_length + T))
        patch.setattr(compaction, "LEAST_ROWS", 4)
        patch.setattr(compaction, "LEAST_LENGTH", 2 if case.fewer_rows else T + 1)
        yield


def run(case: Case, layout: str, steps: int = 2):
    """(the state at the end, the metrics of each step)."""
    settings = replace(SETTINGS, **case.changes, layout=layout)
    if layout == "dense":
        settings = replace(settings, microbatches=1)
    model, state = start(case, settings)
    parts = algorithms.make_parts(settings, case.reward)
    step = parallel.compile_step(ppo.make_train_step(model, parts, settings))
    rows = []
    with small_sizes(case):
        for _ in range(steps):
            state, metrics = step(state, prompts_of(case, settings))
            rows.append(metrics)
    assert packing.is_packed(model, settings) == (layout == "packed")
    return state.replace(frozen=None), rows


def assert_layouts_agree(case: Case):
    (state, rows), (want, wanted) = run(case, "packed"), run(case, "dense")
    for got, metrics in zip(rows, wanted, strict=True):
        assert set(got) == set(metrics)
        for name, x in metrics.items():
            np.testing.assert_allclose(got[name], x, atol=case.atol, rtol=case.atol, err_msg=name)
        assert metrics["skipped"] == metrics["empty"] == 0
        assert got["first_ratio_off"] < case.off
    toys.assert_close(state, want, atol=case.atol, rtol=case.atol)
    low, high = case.length
    lengths = [float(metrics["length"]) for metrics in wanted]
    assert low <= min(lengths) and max(lengths) <= high, lengths


@pytest.mark.ci
def test_packed_is_dense():
    changes = {"tokens_per_microbatch": 30, "epochs": 1}
    assert_layouts_agree(Case(changes, max_tokens=True, fewer_rows=True))


CI = {
    "groups with invalid rows": Case(
        {**GROUPS, "temperature": 0.8, "epochs": 1, "aggregate": "sequence_mean"},
        reward=some_invalid,
    ),
    "separate critic": Case(
        {"critic": "separate", "min_tokens": 2, "top_p": 0.9, "temperature": 0.8, "top_k": 8},
        reward=some_invalid,
        length=(2, T),
        max_tokens=True,
        fewer_rows=True,
    ),
    # two tokens of six slots: packed rows have logits of three
    "short responses, scorer, full KL in the loss, entropy": Case(
        {
            **GROUPS, **IN_LOSS, "kl": "full", "kl_importance": True, "old_logprobs": "scorer",
            "correction": "truncated", "top_entropy": 0.5, "entropy_coef": 0.01,
            "aggregate": "sequence_sum", "response_length": 2, "min_tokens": 1,
        },
        reward=some_invalid,
        length=(1, 2),
        max_tokens=True,
    ),
    "filtered groups, oversampled": Case(
        {**GROUPS, "filter_groups": True, "oversample": 2, "kl": "full", "batch_size": 32},
        reward=even_prompts_alike,
    ),
    "gspo, adapters on every layer, scanned, recomputed": Case(
        {
            **GROUPS, "loss": "gspo", "lora": 2, "lora_on": "all", "microbatches": 3,
            "aggregate": "constant",
        },
        DEEP,
        (("scan", True), ("remat", "block"), ("lora_alpha", 1.0)),
    ),
    "int8 decoding, separate critic, adapters, scanned": Case(
        {
            "critic": "separate", "group_size": 8, "lora": 2, "old_logprobs": "scorer",
            "decode_dtype": "int8", "correction": "masked_sequence",
        },
        DEEP,
        (("scan", True),),
        fewer_rows=True,
        off=0.2,
    ),
    "nlpo, window": Case(
        {"mask_top_p": 0.8, "mask_every": 2, "stop": ("two",)}, WINDOW, fewer_rows=True
    ),
    "remax, learned positions": Case(
        {
            "advantage": "remax", "value_loss": "none", "loss": "kl_penalty", "beta_target": 0.01,
            "aggregate": "token_sum", "tokens_per_microbatch": 1, "optimizer": "sgd",
        },
        GPT2,
    ),
    "kl_stop": Case({**GROUPS, "kl_stop": 0.02, "epochs": 4, "logits_bytes": 200}),
    "trpo": Case(
        {
            "update": "trpo", "value_loss": "mse", "group_size": 4, "lr": 1e-3,
            "cg_iterations": 4, "epochs": 1,
        },
        reward=some_invalid,
        atol=1e-4,
    ),
}  # fmt: skip
SLOW = ("trpo", "kl_stop", "groups with invalid rows")


@pytest.mark.ci
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in CI]
)
def test_packed_is_dense_with_every_option(name):
    assert_layouts_agree(CI[name])


@pytest.mark.ci
def test_packed_is_dense_over_seeds():
    """Runs in one program, of which the longest decides how long loops go on: each is what it is
    alone.
    """
    case = Case({**GROUPS, "minibatches": 1, "epochs": 1}, fewer_rows=True)
    prompts, found = prompts_of(case, replace(SETTINGS, **case.changes)), {}
    for layout in ("dense", "packed"):
        settings = replace(SETTINGS, **case.changes, layout=layout)
        model, _ = start(case, settings)
        states = [start(case, settings, seed=seed)[1] for seed in range(3)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
        parts = algorithms.make_parts(settings, some_invalid)
        step = ppo.make_train_step(model, parts, settings, stop_axis="seeds")
        together = jax.jit(jax.vmap(step, in_axes=(0, None), axis_name="seeds"))
        with small_sizes(case):
            found[layout] = together(stacked, prompts)
    toys.assert_close(found["packed"], found["dense"], atol=1e-5, rtol=1e-5)
    with small_sizes(case):
        alone = jax.jit(ppo.make_train_step(model, parts, settings))(states[2], prompts)
    last = jax.tree.map(lambda x: x[2], found["packed"])
    toys.assert_close(last, alone, atol=1e-5, rtol=1e-5)


# Everything that a setting can name


SIZES = {"batch_size", "prompt_length", "response_length", "lora", "lr_schedule"}
SIZES |= {"missing_eos_score", "reward_reference"}


def small_preset(name: str) -> dict:
    """The preset's settings at a toy size."""
    changes = {key: x for key, x in ALGORITHMS[name].settings.items() if key not in SIZES}
    changes |= {"minibatches": min(changes.get("minibatches", 2), 2), "algorithm": name}
    changes["lr"] = 1e-3  # Adam turns rounding of a gradient near 0 into shares of it
    return changes | ({"lam_alpha": 1.0} if "lam_alpha" in changes else {})


NATURAL = {"trpo", "npg"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_preset_packed_is_dense(name):
    changes = small_preset(name)
    atol = 1e-4 if name in NATURAL else 1e-5
    assert_layouts_agree(Case(changes, reward=some_invalid, atol=atol))


RANKED = {"kl_cov", "clip_cov"}  # rank the tokens of a part: the same if there is one
CHOICES = {
    "loss": algorithms.POLICY_LOSSES,
    "advantage": algorithms.ADVANTAGES,
    "aggregate": algorithms.AGGREGATES,
    "kl": algorithms.KLS | algorithms.FULL_KLS,
    "value_loss": algorithms.VALUE_LOSSES,
    "reward_norm": ("none", "running", "batch"),
    "optimizer": ("adam", "adamw", "rmsprop", "sgd"),
}


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [1, 8])
@pytest.mark.parametrize(
    ("option", "name"), [(option, name) for option, names in CHOICES.items() for name in names]
)
def test_every_choice_packed_is_dense(option, name, group_size):
    changes: dict[str, Any] = {option: name, "group_size": group_size}
    if option == "advantage" and algorithms.ADVANTAGES[name].grouped and group_size == 1:
        pytest.skip("compares the rows of a group")
    if name in RANKED:
        changes["tokens_per_microbatch"] = 10**6
    if (
        name == "kl_cov"
    ):  # |log ratio|, in the first minibatch of numbers that are 0 but for rounding
        changes["loss_settings"] = (("coef", 0.0),)
    if option == "kl":
        changes |= IN_LOSS
    assert_layouts_agree(Case(changes, reward=some_invalid))


LENGTHS = {
    "ragged": ({}, (1.3, T - 0.7)),
    "one token": ({"eos": EVERY}, (1, 1)),
    "full": ({"eos": -1}, (T, T)),
}
NETWORKS = {
    "llama": (DEEP, ()),
    "window": (replace(DEEP, window=3), ()),
    "layers that differ": (MIXED, ()),
    "layers that differ, scanned": (MIXED, (("scan", True),)),
    "soft caps": (CAPPED, ()),
    "gpt2": (GPT2, ()),
    "scanned": (DEEP, (("scan", True),)),
    "recomputed": (DEEP, (("remat", "block"),)),
    "recomputed at once": (DEEP, (("remat", "full"),)),
    "two frequencies, scanned": (TWO_THETAS, (("scan", True),)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "network", "group_size", "tokens"),
    [
        (lengths, network, group_size, (1, 25, 10**6)[(i + j) % 3])
        for i, lengths in enumerate(LENGTHS)
        for j, network in enumerate(NETWORKS)
        for group_size in (1, 8)
    ],
)
def test_every_network_and_length_packed_is_dense(lengths, network, group_size, tokens):
    changes, between = LENGTHS[lengths]
    changes = {**changes, "group_size": group_size, "tokens_per_microbatch": tokens, "epochs": 1}
    if network == "gpt2":
        changes["optimizer"] = "sgd"
    shape, options = NETWORKS[network]
    assert_layouts_agree(Case(changes, shape, options, some_invalid, between, fewer_rows=True))
