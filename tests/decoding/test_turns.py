"""Responses of several turns: what an environment answers is read, and not learned from."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
import worlds
from toys import SETTINGS
from worlds import ANSWER, LENGTH, TURN

from jaxppo import algorithms, parallel, policy, ppo, presets, rollout, sampling
from jaxppo.errors import UserError
from jaxppo.models import shapes
from jaxppo.rewards import in_program

LONG = replace(SETTINGS, response_length=LENGTH, group_size=4)
WINDOWED = replace(toys.LLAMA, window=4)
SHAPES = {
    "llama": toys.LLAMA,
    "gpt2": toys.GPT2,
    "window": WINDOWED,
    "capped": replace(WINDOWED, num_layers=2, no_window=(1,), score_cap=0.5),
    **{
        f"a {kind}": shapes.network(kind, vocab_size=toys.VOCAB, width=8)
        for kind in ("gru", "convolution", "window")
    },
}


def play(toy, prompts, settings=LONG, environment=None, **options):
    """A rollout of all turns."""
    environment = worlds.counting() if environment is None else environment
    return _program(toy.model, settings, environment, tuple(options.items()))(toy.params, prompts)


@cache
def counting():
    return worlds.counting()


@cache
def _program(model, settings, environment, options):
    def program(params, prompts):
        key = jax.random.key(3)
        noise = sampling.row_uniforms(key, prompts.index, settings.response_length)
        return rollout.rollout(
            model,
            params,
            {"base": {}, "reference": params},
            prompts,
            noise,
            length=settings.response_length,
            sample=settings,
            group_size=settings.group_size,
            environment=environment,
            world_keys=sampling.world_keys(key, prompts.index),
            **dict(options),
        )

    return jax.jit(program)


FAST = ("llama", "a gru")
each = [x if x in FAST else pytest.param(x, marks=pytest.mark.ci) for x in SHAPES]


@pytest.fixture(scope="module", params=each)
def toy(request):
    return toys.make(SHAPES[request.param])


@pytest.fixture(scope="module")
def played(toy):
    return play(toy, toys.grouped(4), environment=counting())


def turns_of(rolled):
    """For each row a list of (tokens of the turn, tokens of the answer, reward)."""
    found = []
    mask, read = np.asarray(rolled.mask) > 0, np.asarray(rolled.attend)[:, -LENGTH:]
    tokens, rewards = np.asarray(rolled.response), np.asarray(rolled.rewards)
    for row in range(len(mask)):
        turns = []
        for begin in range(0, LENGTH, TURN + ANSWER):
            own, answer = slice(begin, begin + TURN), slice(begin + TURN, begin + TURN + ANSWER)
            assert not mask[row, answer].any()
            assert (mask[row, own] == read[row, own]).all()
            if mask[row, own].any():
                turns.append(
                    (
                        tokens[row, own][mask[row, own]].tolist(),
                        tokens[row, answer][read[row, answer]].tolist(),
                        float(rewards[row, own].sum()),
                    )
                )
        found.append(turns)
    return found


@pytest.mark.ci
def test_turns_and_answers_have_their_slots(played):
    """A turn ends with the end of text or after TURN tokens; the answer's last token stands right
    before the next turn; nothing follows the end of an episode.
    """
    lengths = set()
    for row, turns in enumerate(turns_of(played)):
        read = np.asarray(played.attend)[row, -LENGTH:]
        for number, (own, answer, reward) in enumerate(turns):
            lengths.add((len(own), len(answer)))
            assert own == own[: TURN if toys.EOS not in own else own.index(toys.EOS) + 1]
            assert len(own) == TURN or own[-1] == toys.EOS
            assert reward == own.count(3)
            begin = number * (TURN + ANSWER)
            assert np.asarray(played.rewards)[row, begin + len(own) - 1] == reward
            if number + 1 < len(turns):
                assert answer == [own[0], (own[0] + 1) % 11][2 - len(answer) :]
                assert len(answer) == (2 if own[0] % 2 == 0 else 1)
                assert read[begin + TURN + ANSWER - 1]
            else:
                assert answer == []
        assert bool(played.finished[row])
    assert len({len(turns) for turns in turns_of(played)}) > 1 and len(lengths) > 3


@pytest.mark.ci
def test_sampler_and_scorer_agree(toy, played):
    """Dense and, for transformers, packed: tokens between turns are read once, in order."""
    on = np.asarray(played.mask) > 0
    for layout in ("dense", "packed"):
        settings = replace(LONG, layout=layout)
        scored = jax.jit(
            lambda params, rolled, settings=settings: policy.rollout_logprobs(
                toy.model, params, rolled, config=settings, group_size=4
            )
        )(toy.params, played)
        for name in ("logprobs", "raw_logprobs"):
            got, want = getattr(scored, name), getattr(played, name)
            np.testing.assert_allclose(np.asarray(got)[on], np.asarray(want)[on], atol=1e-4)
    np.testing.assert_allclose(played.ref_logprobs, played.raw_logprobs, atol=1e-4)
    scored = toys.score(toy, played, LONG)
    np.testing.assert_allclose(
        np.asarray(scored.values)[on], np.asarray(played.values)[on], atol=1e-4
    )
    assert not np.asarray(played.logprobs)[~on].any() and not np.asarray(played.values)[~on].any()


@pytest.mark.ci
def test_a_prompt_read_once_gives_the_same_episodes(toy, played):
    """The plain form reads each row's own prompt."""
    plain = play(toy, toys.grouped(4), replace(LONG, layout="dense"), counting())
    assert np.array_equal(plain.tokens, played.tokens) and np.array_equal(plain.mask, played.mask)
    toys.assert_close(plain.logprobs, played.logprobs, atol=1e-4, rtol=1e-4)


@pytest.mark.ci
def test_a_row_does_not_depend_on_the_others(toy, played):
    """Other rows end their turns elsewhere."""
    half = jax.tree.map(lambda x: x[:4], toys.grouped(4))
    few = play(toy, half, LONG, counting())
    for name in ("tokens", "mask", "attend", "rewards", "finished"):
        np.testing.assert_array_equal(getattr(few, name), getattr(played, name)[:4])
    np.testing.assert_allclose(few.logprobs, played.logprobs[:4], atol=1e-5)


def answers(**parts):
    """The episodes of an environment with other parts, each with a turn of every row."""
    return play(toys.llama(), toys.grouped(4), LONG, worlds.counting(**parts))


@pytest.mark.ci
def test_an_environment_that_never_ends():
    """The last of three turns ends the response, unfinished."""
    rolled = answers(done=lambda state, turn: jnp.zeros(turn.length.shape, bool))
    assert not rolled.finished.any()
    assert all(len(turns) == worlds.TURNS for turns in turns_of(rolled))
    assert np.isfinite(rolled.rewards).all()
    # nobody reads what comes after the last turn
    assert not rolled.attend[:, -ANSWER:].any()


FAULTS = {
    "answers nothing": {"length": lambda state, turn: jnp.zeros_like(turn.length)},
    "answers too much": {"length": lambda state, turn: jnp.full_like(turn.length, ANSWER + 1)},
    "rewards NaN": {"reward": lambda state, turn: jnp.full(turn.length.shape, jnp.nan)},
    "rewards infinity": {"reward": lambda state, turn: jnp.full(turn.length.shape, jnp.inf)},
}


@pytest.mark.ci
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow) if x.endswith("infinity") else x for x in FAULTS],
)
def test_a_fault_ends_the_episode(name):
    """Of its row alone: here of rows whose first token is odd, in their first turn. They are
    invalid, and the others go on.
    """
    (part, fault), good = next(iter(FAULTS[name].items())), worlds.counting()

    def sometimes(state, turn):
        right = getattr(good.step({**state, "turn": state["turn"] - 1}, turn)[1], part)
        odd = turn.tokens[:, 0] % 2 == 1
        return jnp.where(odd & (state["turn"] == 1), fault(state, turn), right)

    unending = lambda state, turn: state["turn"] >= 2
    rolled = answers(**{part: sometimes, "done": unending})
    odd = np.asarray(rolled.response[:, 0]) % 2 == 1
    assert odd.any() and not odd.all()
    assert [len(turns) for turns in turns_of(rolled)] == [1 if x else 2 for x in odd]
    assert (np.isnan(rolled.rewards).any(1) == odd).all()
    assert (np.asarray(rolled.finished) == ~odd).all()
    scores, valid = in_program.episode_score({}, rolled)
    assert (np.isfinite(scores) == ~odd).all() and (np.asarray(valid) == ~odd).all()


def step_of(
    settings, environment=None, shape=toys.LLAMA, reward=in_program.episode_score, **changes
):
    toy = toys.make(shape)
    environment = counting() if environment is None else environment
    parts = algorithms.make_parts(settings, reward)._replace(environment=environment, **changes)
    return toy, parallel.compile_step(ppo.make_train_step(toy.model, parts, settings))


@pytest.mark.ci
def test_invalid_rows_are_counted_and_change_nothing():
    """An update from half of the rows, whose statistics are those of the others."""
    fault = lambda state, turn: jnp.where(turn.tokens[:, 0] % 2 == 1, jnp.nan, 1.0)
    settings = replace(LONG, group_size=1, minibatches=1)
    toy, step = step_of(settings, worlds.counting(reward=fault))
    state, metrics = step(toys.state(toy, settings), toys.prompts())
    assert 0 < metrics["invalid_rows"] < 8 and metrics["skipped"] == 0
    assert metrics["reward"] == pytest.approx(1.5, abs=1)  # 1 a turn
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(toys.numbers(state.params)))


@pytest.mark.parametrize(
    ("changes", "prompts", "sentence"),
    [
        ({"response_length": 14}, {}, "need --response-length 15, but it is 14"),
        ({"min_tokens": 2}, {}, "--min-tokens"),
        ({}, {"max_tokens": jnp.full(8, 3)}, "max_tokens"),
    ],
)
def test_what_does_not_fit_is_refused(changes, prompts, sentence):
    with pytest.raises(UserError, match=sentence):
        play(toys.llama(), toys.grouped(4).replace(extra=prompts), replace(LONG, **changes))


CASES = {
    "ppo": {},
    "grpo": {"algorithm": "grpo"},
    "turn_gae": {"advantage": "turn_gae", "turn_gamma": 0.9},
    "dapo": {"algorithm": "dapo", "oversample": 1},
    "remax": {"algorithm": "remax"},
    "gspo": {"algorithm": "gspo"},
    "full KL": {"kl": "full"},
}


def two_steps(settings, **options):
    toy, step = step_of(settings, **options)
    state, rows = toys.state(toy, settings), []
    for _ in range(2):
        state, metrics = step(state, toys.grouped(settings.group_size))
        rows.append(metrics)
    return state.replace(frozen=None), rows


@pytest.mark.ci
@pytest.mark.parametrize(
    "name",
    ["turn_gae", "grpo"]
    + [
        pytest.param(x, marks=pytest.mark.slow) for x in ("full KL", "ppo", "dapo", "remax", "gspo")
    ],
)
def test_packed_equals_dense(name):
    settings = presets.preset(replace(LONG, group_size=1), CASES[name].get("algorithm", "ppo"))
    grouped = algorithms.ADVANTAGES[settings.advantage].grouped
    own = {"lr": 1e-3, "lr_schedule": "constant", "batch_size": 8, "minibatches": 2, "epochs": 2}
    own |= {"response_length": LENGTH, "eos": toys.EOS, "steps": 10, "lora": 0, "prompt_length": 4}
    settings = replace(settings, **own, **CASES[name], group_size=4 if grouped else 1)
    (state, rows), (want, wanted) = (
        two_steps(replace(settings, layout=layout)) for layout in ("packed", "dense")
    )
    for got, metrics in zip(rows, wanted, strict=True):
        assert metrics["skipped"] == 0 and metrics["first_ratio_off"] < 1e-4
        for each, x in metrics.items():
            np.testing.assert_allclose(got[each], x, atol=1e-5, rtol=1e-5, err_msg=each)
    toys.assert_close(state, want, atol=1e-5, rtol=1e-5)
