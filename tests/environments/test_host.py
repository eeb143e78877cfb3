"""Tools in Python, in the program."""

import logging
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pebble
import pytest
import toys
from fraction_tool import add, late

from jaxppo import algorithms, parallel, ppo
from jaxppo.environments.host import on_host
from jaxppo.environments.play import play
from jaxppo.environments.text import make_tables, on_bytes
from jaxppo.pretrained.tiny import byte_tokenizer
from jaxppo.rewards import in_program
from jaxppo.rewards.pool import ToolPool
from jaxppo.types import Turn

SIZES = {"max_turns": 3, "turn_length": 16, "reply_length": 6}
CALLS = "=1/3+1/6\n"


def make(tool=add, reset=lambda instance, seed: [], **more):
    return on_host(tool, reset, **SIZES | more)


def episodes(environment, *rows: list[str], seed: int = 0):
    """Episodes with these turns; then the policy says "again"."""
    instances = [{"prompt": "", "row": np.int32(i)} for i in range(len(rows))]
    turns = lambda x, replies, rng: [*rows[x["row"]], *["again"] * 3][len(replies)]
    return play(environment, instances, turns, seed=seed)


@pytest.fixture(scope="module")
def pool():
    with pytest.MonkeyPatch.context() as patch, ToolPool(add, workers=1, seconds=1.0) as pool:
        patch.setattr(pebble.CONSTS, "term_timeout", 0.3)
        yield pool


def test_a_tool_answers():
    first, second = episodes(make(), [CALLS, "1/2\n"], ["1/3"])
    assert first.replies == ["1/2\n", ""] and first.rewards == [0, 1] and first.done
    assert second.turns == ["1/3"] and second.rewards == [0] and second.done


def test_a_pool_does_the_same_and_faults_cost_one_row(pool, caplog):
    """Rows 0 and 4 go on; the others are late, end their process, divide by 0, or have a state
    that cannot be sent.
    """
    with caplog.at_level(logging.WARNING):
        found = episodes(
            make(pool),
            [CALLS, "count", "1/2"],
            ["sleep"],
            [CALLS, "exit"],
            ["=1/0+1/1"],
            ["count", "count", "count"],
            ["lock"],
        )
    assert found[0].replies == ["1/2\n", "2", ""] and found[0].rewards == [0, 0, 1]
    assert found[4].replies == ["1", "2", "3"] and found[4].done
    for i in (1, 2, 3, 5):
        assert np.isnan(found[i].rewards[-1]) and found[i].done
        assert not found[i].replies[-1] and not np.isnan(found[i].rewards[:-1]).any()
    said = [x.getMessage() for x in caplog.records]
    assert len(said) == 4 and all(x.endswith("the episode ends") for x in said)
    assert "row 1 of the batch, turn 1: no answer within 1.0 s" in said[0]
    assert "ZeroDivisionError" in said[1] and "cannot pickle" in said[2]
    assert "row 2 of the batch, turn 2: its process ended (exit code 3)" in said[3]


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ("=1/0+1/1", "ZeroDivisionError"),
        ("say nothing", "a tool must return (state, reply, reward, done), but it is 'None'"),
        ("nan", "a reward must be finite in float32, but is nan"),
        ("huge", "a reward must be finite in float32, but is 1e+300"),
    ],
)
def test_a_failing_call_ends_its_episode(turn, words, caplog):
    with caplog.at_level(logging.WARNING):
        good, bad = episodes(make(), [CALLS, "1/2"], [CALLS, turn])
    assert good.score == 1 and np.isnan(bad.rewards[1]) and bad.done and len(bad.turns) == 2
    assert words in caplog.text and "row 1 of the batch, turn 2" in caplog.text


def test_a_state_that_was_used_before_ends_its_episode(caplog):
    """The program never does that; and an exception there would destroy its state."""
    environment = make()
    keys = jax.random.split(jax.random.key(0), 1)
    state = environment.reset({"row": jnp.arange(1)}, keys)
    said = jnp.zeros((1, 16), jnp.uint8), jnp.array([0])
    _, first = environment.step(state, *said)
    _, second = environment.step(state, *said)
    assert first.done and not np.isnan(first.reward[0])
    assert second.done and np.isnan(second.reward[0]) and "LookupError" in caplog.text


def test_a_failing_reset_ends_its_episode(caplog):
    def reset(instance, seed):
        return [1 // int(instance["row"])]

    bad, good = episodes(make(reset=reset), ["count"], ["count"])
    assert np.isnan(bad.score) and len(bad.turns) == 1 and good.replies[0] == "2"
    assert "row 0 of the batch, turn 1: ZeroDivisionError" in caplog.text


def test_a_pool_without_its_module_ends_every_episode(caplog):
    from broken_judge import judge

    with ToolPool(judge, workers=1) as pool:
        (found,) = episodes(make(pool), ["a"])
    assert np.isnan(found.score) and found.done
    assert "UserError: workers could not import the tool broken_judge.judge" in caplog.text


def test_replies_are_cut():
    tool = lambda state, text: (state, "1234567é", 0.5, False)
    (found,) = episodes(make(tool), [])
    assert found.replies == ["123456"] * 3 and found.rewards == [0.5] * 3 and found.done


def test_a_state_is_its_rows_own_and_leaves_with_the_episode():
    states = []

    def reset(instance, seed):
        states.append({"row": int(instance["row"]), "seed": seed, "turns": 0})
        return states[-1]

    def tool(state, text):
        state["turns"] += 1  # in place
        return state, f"{state['row']}{state['turns']}", 0.0, text == "end"

    environment = make(tool, reset)
    first, second = episodes(environment, ["a", "end"], ["a", "a", "a"], seed=3)
    assert first.replies == ["01", "02"] and second.replies == ["11", "12", "13"]
    host = environment.reset.__closure__[0].cell_contents
    assert host.states == {}
    # the seeds depend on the keys alone
    episodes(environment, [], [], seed=3)
    episodes(environment, [], [], seed=4)
    seeds = [x["seed"] for x in states]
    assert seeds[:2] == seeds[2:4] and len(set(seeds)) == 4


def unroll(environment, keys, texts):
    """Rewards [turns B] in one program; `texts` is UInt8[turns B W]."""
    rows = len(keys)
    state = environment.reset({"row": jnp.arange(rows)}, keys)

    def body(state, text):
        state, reply = environment.step(state, text, jnp.full(rows, text.shape[1]))
        return state, reply.reward

    return jax.lax.scan(body, state, texts)[1]


def count_turns():
    """The reward is 10 · row + turn."""

    def tool(state, text):
        return [state[0], state[1] + 1], "", 10.0 * state[0] + state[1] + 1, False

    return make(tool, lambda instance, seed: [int(instance["row"]), 0])


def test_the_turns_of_a_scan_are_in_order():
    texts = jnp.zeros((3, 4, 16), jnp.uint8)
    rewards = jax.jit(lambda keys: unroll(count_turns(), keys, texts))(
        jax.random.split(jax.random.key(0), 4)
    )
    expected = 10 * np.arange(4)[None] + np.arange(1, 4)[:, None]
    np.testing.assert_array_equal(rewards, expected)


def test_several_runs_under_vmap_and_pmap_are_kept_apart():
    environment, texts = count_turns(), jnp.zeros((3, 4, 16), jnp.uint8)
    keys = jax.random.split(jax.random.key(0), (2, 4))
    expected = 10 * np.arange(4)[None] + np.arange(1, 4)[:, None]
    run = lambda keys: unroll(environment, keys, texts)
    for many in (jax.jit(jax.vmap(run)), jax.pmap(run)):
        np.testing.assert_array_equal(many(keys), np.stack([expected] * 2))


@pytest.mark.ci
def test_on_tokens():
    tokenizer = byte_tokenizer()
    world = on_bytes(make(), make_tables(tokenizer))
    state = world.reset({"row": jnp.arange(1)}, jax.random.split(jax.random.key(0), 1))
    ids = tokenizer.encode("=1/3+1/6")
    state, seen = world.step(state, Turn(jnp.array([ids]), jnp.array([len(ids)])))
    assert tokenizer.decode(seen.tokens[0, -4:]) == "1/2\n" and seen.length == 4
    ids = tokenizer.encode("1/2")
    _, seen = world.step(state, Turn(jnp.array([ids]), jnp.array([3])))
    assert seen.reward == 1 and seen.done.all() and seen.length == 0


MODES = {"jit": {}, "pmap": {"devices": 2}, "mesh": {"mesh": "data=2,fsdp=2", "devices": 4}}


def train_step(environment, mode="jit"):
    """(a compiled step of 8 rows, the state before it, the prompts)."""
    tokenizer = byte_tokenizer()
    world = on_bytes(environment, make_tables(tokenizer))
    toy = toys.make(replace(toys.LLAMA, vocab_size=tokenizer.vocab_size))
    changes = {"response_length": world.length, "eos": tokenizer.eos_id, "minibatches": 1}
    settings = replace(toys.SETTINGS, **changes)
    parts = algorithms.make_parts(settings, in_program.episode_score)._replace(environment=world)
    step = parallel.compile_for_mode(
        lambda axis: ppo.make_train_step(toy.model, parts, settings, axis_name=axis),
        mode=mode,
        mesh=MODES[mode].get("mesh", ""),
        devices=jax.devices()[: MODES[mode].get("devices", 1)],
    )
    prompts = toys.prompts().replace(extra={"row": jnp.arange(8)})
    return step, step.place(toys.state(toy, settings)), jax.device_get(prompts)


@pytest.mark.ci
@pytest.mark.parametrize("mode", ["jit", pytest.param("pmap", marks=pytest.mark.slow), "mesh"])
def test_a_tool_fails_in_a_train_step(mode, caplog):
    """In the second turn of one of 8 rows, which is invalid and counted: the mean reward is that of
    the others' three turns.
    """

    def tool(state, text):
        row, turn = state
        if row == 3 and turn == 1:
            raise RuntimeError("no answer")
        return [row, turn + 1], "ok", 0.5 * (turn + 1), False  # 0.5 + 1 + 1.5

    start = lambda instance, seed: [int(instance["row"]), 0]
    environment = make(tool, start, turn_length=2, reply_length=2)
    step, state, prompts = train_step(environment, mode)
    for _ in range(2):
        state, metrics = step(state, step.put(prompts))
        assert metrics["invalid_rows"] == 1 and metrics["skipped"] == 0
        assert metrics["reward"] == pytest.approx(3) and metrics["finished"] == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(step.unreplicate(state).params))
    assert step.traces == 1
    failed = [x.getMessage() for x in caplog.records if "the tool failed" in x.getMessage()]
    want = "the tool failed in row 3 of the batch, turn 2: RuntimeError: no answer"
    assert failed == [f"{want}; the episode ends"] * 2
    assert environment.reset.__closure__[0].cell_contents.states == {}


@pytest.mark.slow
def test_a_late_tool_holds_a_train_step_for_no_longer_than_its_deadline(monkeypatch, caplog):
    """Its row is invalid and counted; the mean reward is that of the other seven."""
    monkeypatch.setattr(pebble.CONSTS, "term_timeout", 0.3)
    with ToolPool(late, workers=2, seconds=0.5) as pool:
        own = {"max_turns": 1, "turn_length": 2, "reply_length": 2}
        environment = make(pool, lambda instance, seed: int(instance["row"]), **own)
        step, state, prompts = train_step(environment)
        for _ in range(2):
            began = time.monotonic()
            state, metrics = step(state, step.put(prompts))
            assert metrics["invalid_rows"] == 1 and metrics["skipped"] == 0
            assert metrics["reward"] == 0.5
        assert time.monotonic() - began < 30  # the tool would sleep for 1000 s
    said = [x.getMessage() for x in caplog.records if "the tool failed" in x.getMessage()]
    want = "the tool failed in row 3 of the batch, turn 1: no answer within 0.5 s"
    assert len(said) == 2 and all(x.startswith(want) for x in said)
