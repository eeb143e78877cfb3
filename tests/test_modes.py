"""The same step on one device, under pmap and over meshes of 8 simulated devices: the same tokens,
metrics and parameters.
"""

import itertools
import os
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo import algorithms, models, parallel, ppo, sampling
from jaxppo.decoding import compaction
from jaxppo.errors import UserError
from jaxppo.models import int8, lora, shapes
from jaxppo.models.scan import stack_layers, unstack_layers
from jaxppo.presets import preset
from jaxppo.rewards.host import on_host
from jaxppo.rewards.in_program import count_token
from jaxppo.rollout import rollout

pytestmark = pytest.mark.ci

SHAPE = shapes.llama(
    vocab_size=16, width=16, num_layers=2, num_heads=4, num_kv_heads=4, max_length=16
)
SETTINGS = replace(
    toys.SETTINGS,
    batch_size=64,
    minibatches=2,
    lr=1e-4,
    lr_schedule="constant",
    kl_adaptive=True,
    kl_target=1.0,
)
SGD = replace(SETTINGS, optimizer="sgd", lr=1e-2)
OPTIMIZERS = {"adam": SETTINGS, "sgd": SGD}
# parts of two packed rows
PACKED = {
    "ppo": replace(SGD, tokens_per_microbatch=18),
    **{
        name: replace(preset(SGD, name), batch_size=128, tokens_per_microbatch=18)
        for name in ("grpo", "dapo")
    },
}


class Case(NamedTuple):
    """One way to compile the step, and what ought not to change its numbers. `mode` is pmap, jit,
    or a mesh.
    """

    mode: str
    optimizer: str = "sgd"
    reward: str = "graph"
    microbatches: int = 1
    remat: str = "none"
    layers: str = "unrolled"


CHOICES = {
    "mode": ("pmap", "data=8", "fsdp=8", "data=2,tensor=4", "data=2,fsdp=2,tensor=2"),
    "optimizer": ("sgd", "adam"),
    "reward": ("graph", "host"),
    "microbatches": (1, 4),
    "remat": ("none", "block"),
    "layers": ("unrolled", "scanned"),
}
# Every pair of choices stands in one of these.
PAIRWISE = [
    Case("pmap", "sgd", "graph", 1, "none", "unrolled"),
    Case("pmap", "adam", "host", 4, "block", "scanned"),
    Case("data=8", "sgd", "host", 1, "block", "unrolled"),
    Case("data=8", "adam", "graph", 4, "none", "scanned"),
    Case("fsdp=8", "sgd", "graph", 4, "block", "unrolled"),
    Case("fsdp=8", "adam", "host", 1, "none", "scanned"),
    Case("data=2,tensor=4", "sgd", "host", 4, "none", "unrolled"),
    Case("data=2,tensor=4", "adam", "graph", 1, "block", "scanned"),
    Case("data=2,fsdp=2,tensor=2", "adam", "graph", 1, "block", "unrolled"),
    Case("data=2,fsdp=2,tensor=2", "sgd", "host", 4, "none", "scanned"),
    Case("pmap", "adam", "graph", 1, "none", "unrolled"),
    Case("data=2,fsdp=2,tensor=2", "sgd", "graph", 1, "none", "scanned"),
]

# Each choice stands in one of these.
QUICK = [PAIRWISE[i] for i in (2, 4, 7, 9, 10)]


def prompts(number: int):
    """Lengths differ: device 0 of 8 has the shortest rows only."""
    return jax.device_get(toys.ragged([1 + i // 16 for i in range(64)], 4, seed=number))


def uneven(number: int, settings):
    """Whole groups, whose responses are longer from device to device: one token at most on the
    first of 8, and any number on the last four.
    """
    rows, size = settings.batch_size, settings.group_size
    few = toys.ragged([1 + i % 4 for i in range(rows // size)], 4, seed=number)
    batch = jax.tree.map(lambda x: np.repeat(x, size, 0), jax.device_get(few))
    row = np.arange(rows, dtype=np.int32)
    return batch.replace(index=row, extra={"max_tokens": 1 + 8 * row // rows})


def shortest_first(batch):
    """The same rows, each with its own noise, by the length of the response that the first step
    will sample; and the lengths.
    """
    model = models.make(SHAPE)
    params, key = toys.random_params(model, seed=1), jax.random.fold_in(jax.random.key(0), 0)
    batch = jax.device_put(batch)
    noise = sampling.row_uniforms(jax.random.split(key)[0], batch.index, SGD.response_length)
    own = {"length": SGD.response_length, "sample": SGD, "eos": SGD.eos, "pad": SGD.pad}
    frozen = {"base": {}, "reference": params}
    sampled = jax.jit(lambda *args: rollout(model, params, frozen, *args, **own).mask)
    lengths = np.asarray(sampled(batch, noise).sum(1))
    order = np.argsort(lengths, kind="stable")
    return jax.tree.map(lambda x: np.asarray(x)[order], batch), lengths[order]


def run(
    settings,
    mode="jit",
    mesh="",
    steps=3,
    reward=None,
    remat="none",
    scan=False,
    batches=prompts,
    stops=None,
    shape=SHAPE,
    environment=None,
):
    """(the state at the end, with unrolled layers; the metrics of each step)."""
    own = {"lora": settings.lora, "lora_on": settings.lora_on, "lora_alpha": settings.lora_alpha}
    model = models.make(shape, **own, remat=remat, scan=scan)
    parts = algorithms.make_parts(settings, reward or count_token(3))
    parts = parts._replace(environment=environment)
    make = lambda axis_name: ppo.make_train_step(model, parts, settings, axis_name=axis_name)
    step = parallel.compile_for_mode(make, mode=mode, mesh=mesh)
    laid = stack_layers if scan else toys.copied
    plain = models.make(shape, **own)
    params, reference = (laid(toys.random_params(plain, seed=seed)) for seed in (1, 2))
    frozen = {"base": {}, "reference": reference, "reward": {}}
    if settings.lora:
        params, base = lora.split(params, lora.is_trained)
        base = int8.quantise(base) if settings.base_dtype == "int8" else base
        frozen |= {"base": base, "reference": None}
    frozen |= {} if stops is None else {"stop": stops}
    state = step.place(ppo.init_state(settings, params, frozen, jax.random.key(0)))
    rows = []
    for number in range(steps):
        state, metrics = step(state, step.put(batches(number)))
        rows.append(jax.device_get(metrics))
    assert step.traces == 1
    whole = step.unreplicate(state)
    return whole.replace(params=unstack_layers(whole.params)), rows


def run_case(case: Case):
    settings = replace(OPTIMIZERS[case.optimizer], microbatches=case.microbatches)
    mode, mesh = (case.mode, "") if case.mode in ("jit", "pmap") else ("mesh", case.mode)
    reward = host_reward() if case.reward == "host" else None
    return run(settings, mode, mesh, reward=reward, remat=case.remat, scan=case.layers == "scanned")


def largest_differences(got, want) -> tuple[float, float]:
    """(between parameters, between metrics); rewards and lengths among these hang on the sampled
    tokens.
    """
    between = lambda a, b: max(
        float(np.abs(x - y).max())
        for x, y in zip(*(jax.tree.leaves(toys.numbers(x)) for x in (a, b)), strict=True)
    )
    return between(got[0].params, want[0].params), max(
        between(a, b) for a, b in zip(got[1], want[1], strict=True)
    )


@pytest.fixture(scope="module")
def one_device():
    """The reference of each kind of settings, computed once."""
    known = {}

    def get(name, settings, *, case=None, **options):
        if name not in known:
            known[name] = run_case(case) if case else run(settings, **options)
        return known[name]

    return get


def assert_equal_runs(got, want):
    for a, b in zip(got[1], want[1], strict=True):
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_allclose(a[name], b[name], atol=2e-5, rtol=0, err_msg=name)
    toys.assert_close(got[0].params, want[0].params, atol=2e-5)
    toys.assert_close(got[0].controller, want[0].controller, rtol=1e-5)
    assert (int(got[0].step), int(got[0].cursor)) == (int(want[0].step), int(want[0].cursor))


def reference(one_device, case: Case):
    """The same on one device, all in one part, unrolled."""
    plain = Case("jit", case.optimizer, case.reward)
    return one_device(f"{plain}", None, case=plain)


def host_reward():
    decode = lambda rows: ["".join(chr(97 + token) for token in row) for row in rows]
    return on_host(lambda prompt, response: response.count("d") + 0.1 * len(response), decode)


@pytest.mark.parametrize(
    "case",
    [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in PAIRWISE],
    ids=lambda case: " ".join(str(x) for x in case),
)
def test_every_way_equals_one_device(one_device, case):
    """Gradients are summed once, not 8 times: SGD would show it. Whitening, counts and the KL
    controller are of all rows.
    """
    assert_equal_runs(run_case(case), reference(one_device, case))


def test_the_cases_cover_every_pair():
    for one, other in itertools.combinations(CHOICES, 2):
        found = {(getattr(case, one), getattr(case, other)) for case in PAIRWISE}
        assert found == set(itertools.product(CHOICES[one], CHOICES[other])), (one, other)
    for i, (name, values) in enumerate(CHOICES.items()):
        assert {case[i] for case in QUICK} == set(values), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [Case(*choice) for choice in itertools.product(*list(CHOICES.values())[:5])], ids=str
)
def test_the_full_product(one_device, case):
    """All of it but the layers, which take turns; a row of `modes.md` each, when JAXPPO_MODES_TABLE
    names a file to append to.
    """
    turn = sum(values.index(getattr(case, name)) for name, values in list(CHOICES.items())[:5]) % 2
    case = case._replace(layers=CHOICES["layers"][turn])
    got, want = run_case(case), reference(one_device, case)
    if table := os.environ.get("JAXPPO_MODES_TABLE"):
        parameters, metrics = largest_differences(got, want)
        with open(table, "a") as file:
            file.write(
                f"| {' | '.join(str(x) for x in case)} | {parameters:.1e} | {metrics:.1e} |\n"
            )
    assert_equal_runs(got, want)


def test_one_device_with_all_the_short_rows():
    """Whitening, token means, KL control and counters are of all rows: a device's own mean would be
    of 8 short ones.
    """
    batch, lengths = shortest_first(prompts(0))
    assert lengths[:8].mean() < 3 and (lengths[32:] == SGD.response_length).all()
    settings = replace(SGD, advantage="gae", aggregate="token_mean", whiten_rewards=True)
    want = run(settings, steps=1, batches=lambda _: batch)
    assert want[1][0]["length"] == pytest.approx(lengths.mean())
    assert_equal_runs(run(settings, "pmap", steps=1, batches=lambda _: batch), want)


@pytest.mark.slow
def test_groups_and_no_critic(one_device):
    """Over a mesh; test_presets.py has every preset under pmap."""
    settings = replace(
        SGD, advantage="group", group_size=2, value_loss="none", aggregate="sequence_mean"
    )
    assert_equal_runs(run(settings, "mesh", "data=4,fsdp=2"), one_device("groups", settings))


@pytest.mark.ci
@pytest.mark.parametrize(
    ("base", "scan", "mode"),
    [
        pytest.param("same", False, "mesh", marks=pytest.mark.slow),
        pytest.param("same", True, "mesh", marks=pytest.mark.slow),
        pytest.param("int8", True, "mesh", marks=pytest.mark.slow),
        ("int8", 0, "pmap"),
    ],
)
def test_adapters_on_every_layer_over_devices(one_device, base, scan, mode):
    settings = replace(SGD, lora=2, lora_on="all", lora_alpha=1.0, base_dtype=base)
    want = one_device(f"adapters {base}", settings)
    mesh = "data=2,fsdp=2,tensor=2" if mode == "mesh" else ""
    assert_equal_runs(run(settings, mode, mesh, scan=bool(scan)), want)
    first = toys.random_params(models.make(SHAPE, lora=2, lora_on="all"), seed=1)
    first = lora.split(first, lora.is_trained)[0]
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), first, want[0].params)
    assert min(jax.tree.leaves(moved["layers_0"])) > 1e-6  # each of the adapters


@pytest.mark.ci
@pytest.mark.parametrize(
    ("rank", "scan", "mode"),
    [(0, True, "mesh"), pytest.param(2, False, "pmap", marks=pytest.mark.slow)],
)
def test_int8_decoding_over_devices(one_device, rank, scan, mode):
    eight = {"decode_dtype": "int8", "old_logprobs": "scorer", "correction": "truncated"}
    settings = replace(SGD, lora=rank, lora_alpha=1.0, **eight)
    want = one_device(f"int8 decoding {rank}", settings)
    assert all(1e-4 < row["first_ratio_off"] < 1 for row in want[1])
    mesh = "data=2,fsdp=2,tensor=2" if mode == "mesh" else ""
    assert_equal_runs(run(settings, mode, mesh, scan=scan), want)


IN_CI = {("grpo", "pmap")}  # `test_episode_modes.py` has a mesh


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, mode, marks=() if (name, mode) in IN_CI else pytest.mark.slow)
        for name in PACKED
        for mode in ("pmap", "data=8", "fsdp=8", "data=2,fsdp=2,tensor=2")
    ],
)
def test_devices_with_more_and_fewer_packed_rows(one_device, monkeypatch, name, mode):
    """All run the loop over parts as often as the fullest, and decode until the last has ended."""
    monkeypatch.setattr(compaction, "LEAST_LENGTH", 2)
    monkeypatch.setattr(compaction, "LEAST_ROWS", 4)
    settings = PACKED[name]
    batches = lambda number: uneven(number, settings)
    how = ("pmap", "") if mode == "pmap" else ("mesh", mode)
    want = one_device(f"packed {name}", settings, batches=batches)
    assert all(row["first_ratio_off"] < 1e-4 and row["skipped"] == 0 for row in want[1])
    assert_equal_runs(run(settings, *how, batches=batches), want)


@pytest.mark.parametrize(
    "mesh", ["data=2,fsdp=2,tensor=2", pytest.param("data=8", marks=pytest.mark.slow)]
)
def test_logits_in_chunks_on_a_mesh(one_device, mesh):
    """32 rows of 5 tokens are 4 rows on each of 8 devices: 1280 bytes of logits, of which 640 are
    allowed at a time.
    """
    settings = replace(SGD, logits_bytes=640)
    assert_equal_runs(
        run(settings, "mesh", mesh), reference(one_device, Case("jit", "sgd", "graph"))
    )


@pytest.mark.parametrize(
    ("mode", "mesh"),
    [("pmap", ""), pytest.param("mesh", "data=2,fsdp=2,tensor=2", marks=pytest.mark.slow)],
)
def test_stop_texts_and_min_tokens_in_every_mode(mode, mesh):
    """A text is two tokens of 2 to 9, one after the other."""
    stops = sampling.Stops(
        column=jnp.array([0, 0] + [1] * 8 + [0] * 6),
        next=jnp.array([[0, 1]] * 2),
        ends=jnp.array([[False, False], [False, True]]),
    )
    settings = replace(SGD, stop=("two",), min_tokens=2)
    want = run(settings, stops=stops)
    lengths = [float(row["length"]) for row in want[1]]
    assert all(3 <= length < 5 for length in lengths)
    assert all(row["first_ratio_off"] < 1e-4 for row in want[1])
    assert_equal_runs(run(settings, mode, mesh, stops=stops), want)


@pytest.mark.slow  # models/test_scan.py has its gradients
def test_nothing_kept_from_the_forward_pass(one_device):
    got = run(replace(SGD, microbatches=4, minibatches=2), remat="full")
    assert_equal_runs(got, reference(one_device, Case("jit", "sgd", "graph")))


def test_auto_is_pmap_on_several_devices():
    make = lambda axis_name: lambda state, prompts: (state, {})
    assert parallel.compile_for_mode(make).name == "pmap on 8 devices"
    assert parallel.compile_for_mode(make, devices=jax.devices()[:1]).name == "jit on one device"
    with pytest.raises(UserError, match="--parallel 'tpu': choose one of auto, jit, pmap, mesh"):
        parallel.compile_for_mode(make, mode="tpu")


@pytest.mark.slow
def test_several_steps_in_one_dispatch_under_pmap():
    model, settings = models.make(SHAPE), SGD
    parts = algorithms.make_parts(settings, count_token(3))
    make = lambda axis_name: ppo.repeat(
        ppo.make_train_step(model, parts, settings, axis_name=axis_name)
    )
    stacked = jax.tree.map(lambda *x: np.stack(x), prompts(0), prompts(1))
    results = []
    for mode in ("jit", "pmap"):
        step = parallel.compile_for_mode(make, mode=mode, leading=1)
        frozen = {"base": {}, "reference": toys.random_params(model, seed=2), "reward": {}}
        start = ppo.init_state(
            settings, toys.random_params(model, seed=1), frozen, jax.random.key(0)
        )
        state, metrics = step(step.place(start), step.put(stacked))
        assert metrics["loss"].shape == (2,)
        results.append(step.unreplicate(state).params)
    for other in results[1:]:
        toys.assert_close(other, results[0], atol=2e-5)
