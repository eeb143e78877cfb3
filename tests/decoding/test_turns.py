"""Responses of several turns: what an environment answers is read, and not learned from."""

import itertools
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
import worlds
from toys import SETTINGS
from worlds import ANSWER, LENGTH, TURN

from jaxppo import (
    algorithms,
    kl,
    packing,
    parallel,
    policy,
    ppo,
    presets,
    rollout,
    sampling,
    update,
)
from jaxppo.errors import UserError
from jaxppo.models import shapes
from jaxppo.rewards import in_program, shaping

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


def play_counting():
    """Two groups of four episodes."""
    return play(toys.llama(), toys.grouped(4), environment=counting())


@cache
def _program(model, settings, environment, options):
    def program(params, prompts):
        key = jax.random.key(3)
        noise = sampling.row_uniforms(key, prompts.index, settings.response_length)
        return rollout.rollout(
            model,
            params,
            {"base": {}, "reference": params, "stop": STOPS},
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


KINDS = ("nothing", "rewards NaN", "answers nothing", "answers too much")
# one update, and the metrics have all tokens
ONE = replace(LONG, group_size=1, minibatches=1, epochs=1, log_samples=8)


def with_a_fault():
    """`counting` that answers with tokens 3, and with the fault of the column `kind` in the first
    turn, where that began with an odd token.
    """
    good = worlds.counting(tokens=lambda state, turn: jnp.full((len(turn.tokens), ANSWER), 3))

    def reset(instance, keys):
        return {**good.reset(instance, keys), "kind": instance["kind"]}

    def step(state, turn):
        state, seen = good.step(state, turn)
        faulty = (turn.tokens[:, 0] % 2 == 1) & (state["turn"] == 1)
        kind = jnp.where(faulty, state["kind"], 0)
        reward = jnp.where(kind == 1, jnp.nan, seen.reward)
        length = jnp.select([kind == 2, kind == 3], [0, ANSWER + 1], seen.length)
        return state, seen.replace(reward=reward, length=length)

    return good._replace(reset=reset, step=step)


class Drawn(NamedTuple):
    """What a step played, from its metric `samples`, and what the policy thought of it."""

    tokens: np.ndarray  # of the response [B T]
    acting: np.ndarray
    read: np.ndarray  # acting, or an answer
    gap: np.ndarray  # log π − log π_ref of each token that was read
    entropy: np.ndarray  # before each token that was read


@cache
def one_step(kind: str):
    """(a step's metrics, the state after it, what it played). The reference is another network."""
    toy, step = _step_with_a_fault()
    state = toys.state(toy, ONE)
    state = state.replace(frozen={**state.frozen, "reference": _reference()})
    extra = {"turns": jnp.full(8, 2), "kind": jnp.full(8, KINDS.index(kind))}
    after, metrics = step(state, toys.prompts().replace(extra=extra))
    return jax.device_get(metrics), after, drawn(np.asarray(metrics["samples"])[:, :-1].astype(int))


@cache
def _step_with_a_fault():
    return step_of(ONE, with_a_fault())


@cache
def _reference():
    return toys.random_params(toys.llama().model, seed=2)


def drawn(samples: np.ndarray) -> Drawn:
    """Of token ids, −1 for padding and −2 − i for a token i of an answer: by dense logits."""
    toy, tokens = toys.llama(), np.where(samples < -1, -2 - samples, np.maximum(samples, 0))
    hidden = lambda params: toy.model.apply(params, tokens, samples != -1)[0][:, -LENGTH - 1 : -1]
    both = [toy.model.logits(params, hidden(params)) for params in (toy.params, _reference())]
    response, (own, other) = samples[:, -LENGTH:], (np.asarray(jax.nn.log_softmax(x)) for x in both)
    of = lambda x: np.take_along_axis(x, tokens[:, -LENGTH:, None], 2)[..., 0]
    entropy = -(np.exp(own) * own).sum(-1)
    return Drawn(tokens[:, -LENGTH:], response >= 0, response != -1, of(own) - of(other), entropy)


def by_hand(played: Drawn, where: np.ndarray) -> dict:
    """The step's metrics from these tokens alone. The reward is the number of tokens 3."""
    rows, tokens = where.any(1).sum(), where.sum()
    return {
        "reward": (where & (played.tokens == 3)).sum() / rows,
        "length": tokens / rows,
        "kl": (played.gap * where).sum() / rows,
        "entropy": (played.entropy * where).sum() / tokens,
    }


@pytest.mark.ci
@pytest.mark.parametrize("name", ["reward", "length", "kl", "entropy"])
def test_metrics_are_of_acting_tokens(name):
    """With those of the answers they would be others."""
    metrics, _, played = one_step("nothing")
    right, wrong = (by_hand(played, x)[name] for x in (played.acting, played.read))
    assert metrics[name] == pytest.approx(right, rel=1e-4)
    assert abs(wrong / right - 1) > 1e-3


@pytest.mark.ci
@pytest.mark.parametrize("kind", KINDS[1:])
def test_invalid_rows_are_counted_and_change_nothing(kind):
    """An update from the other rows, whose statistics are theirs."""
    metrics, after, played = one_step(kind)
    odd = played.tokens[:, 0] % 2 == 1
    assert 0 < odd.sum() < 8 and metrics["invalid_rows"] == odd.sum() and metrics["skipped"] == 0
    for name, x in by_hand(played, played.acting & ~odd[:, None]).items():
        assert metrics[name] == pytest.approx(x, rel=1e-4), name
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(toys.numbers(after.params)))


@pytest.mark.ci
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_only_acting_tokens_have_a_gradient(layout, monkeypatch):
    """That of the loss in log-probs, entropies and values, as the scorer gives them."""
    toy, names = toys.llama(), ("logprobs", "raw_logprobs", "entropy", "values")
    settings = replace(LONG, layout=layout, kl_place="loss", kl="k2", entropy_coef=0.1)
    settings = replace(settings, tokens_per_microbatch=38)  # two packed rows
    parts, rolled = algorithms.make_parts(settings, in_program.episode_score), play_counting()
    rolled = rolled.replace(ref_logprobs=(rolled.raw_logprobs - 0.5) * rolled.mask)
    score, everyone = rolled.rewards.sum(1), jnp.ones(8, bool)
    scored = ppo.Scored(rolled, score, everyone, everyone, {})
    rewards = shaping.token_rewards(score, rolled, kl_coef=0.0, kl=kl.k1)
    statistics = shaping.init_statistics()
    batch, _ = ppo.estimate_advantages(parts, rolled, rewards, scored, statistics, None)
    scorer = policy.response_logprobs

    def loss(shift, part):
        def shifted(*args, **options):
            found = scorer(*args, **options)
            return found._replace(**{name: getattr(found, name) + shift[name] for name in names})

        monkeypatch.setattr(policy, "response_logprobs", shifted)
        constants = update.LossConstants({}, kl_coef=0.1)
        given = toy.params, constants, parts.aggregate(batch.mask), batch, jax.random.key(0), part
        return update.make_loss(toy.model, parts, settings)(*given)[0]

    total = packing.make_sum(toy.model, settings, rolled, batch.mask, group_size=4)
    slope = jax.jit(lambda shift: total(lambda part: jax.grad(loss)(shift, part)))
    found = slope(dict.fromkeys(names, jnp.zeros(rolled.mask.shape)))
    acting = np.asarray(rolled.mask) > 0
    assert (np.asarray(rolled.attend)[:, -LENGTH:] & ~acting).any()
    for name in names:
        np.testing.assert_array_equal(np.asarray(found[name]) != 0, acting, err_msg=name)


@pytest.mark.ci
def test_groups_are_chosen_by_the_sum_of_their_turns():
    """DAPO with twice as many groups as it needs. In the first two of four, both episodes have the
    same sum, in other turns.
    """
    own = {"group_size": 2, "batch_size": 4, "oversample": 2, "overlong_buffer": 0}
    settings = replace(presets.preset(LONG, "dapo"), **own)
    turns = [
        [1, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 0],
        [1, 0, 0], [1, 0, 1], [0.5, 0.25, 0], [0, 0, 0.5],
    ]  # fmt: skip
    rewards = jnp.zeros((8, LENGTH)).at[:, :: TURN + ANSWER].set(jnp.array(turns))
    rolled = play_counting().replace(rewards=rewards)
    parts = algorithms.make_parts(settings, in_program.episode_score)
    choose = lambda rolled: ppo.score_rollout(
        parts, settings, {}, rolled, lambda: None, shaping.init_statistics(), None
    )[0]
    scored = jax.jit(choose)(rolled)
    assert scored.rollout.index.tolist() == [4, 5, 6, 7] and scored.learn.all()
    assert scored.scores.tolist() == [1, 2, 0.75, 0.5]
    assert scored.metrics["informative"] == 0.5


# a stop text is two tokens of 2 to 6, one after the other
STOPS = sampling.Stops(
    column=jnp.array([0] * 2 + [1] * 5 + [0] * 4),
    next=jnp.array([[0, 1]] * 2),
    ends=jnp.array([[False, False], [False, True]]),
)


@cache
def unending():
    """32 episodes that the environment never ends, with a stop text."""
    world = worlds.counting(done=lambda state, turn: jnp.zeros(turn.length.shape, bool))
    return play(toys.llama(), toys.grouped(4, rows=32), replace(LONG, stop=("two",)), world)


@pytest.mark.ci
def test_an_environment_that_never_ends():
    """The last of three turns ends the response, unfinished."""
    rolled = unending()
    assert not rolled.finished.any()
    assert all(len(turns) == worlds.TURNS for turns in turns_of(rolled))
    assert np.isfinite(rolled.rewards).all()
    # nobody reads what comes after the last turn
    assert not rolled.attend[:, -ANSWER:].any()


@pytest.mark.ci
def test_a_turn_ends_with_a_stop_text():
    half = lambda token: 2 <= token <= 6
    last = {"end of text": 0, "stop": 0, "full": 0}
    for own, *_ in itertools.chain(*turns_of(unending())):
        stops = [i for i in range(1, len(own)) if half(own[i - 1]) and half(own[i])]
        ends = [i for i in range(len(own)) if own[i] == toys.EOS or i in stops]
        assert ends == [len(own) - 1] or (ends == [] and len(own) == TURN)
        last["full" if not ends else "stop" if stops else "end of text"] += 1
    assert min(last.values()) > 3


@pytest.mark.ci
def test_half_of_a_stop_text_does_not_count_in_the_next_turn():
    half, over = lambda token: 2 <= token <= 6, 0
    for turns in turns_of(unending()):
        for (one, *_), (after, *_) in itertools.pairwise(turns):
            if half(one[-1]) and not half(one[-2]) and half(after[0]):
                assert len(after) > 1  # the text would end with its first token
                over += 1
    assert over > 3


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
