import signal

import jax.numpy as jnp
import judges
import numpy as np
import pytest

from jaxppo.environments import calculator, guess, host
from jaxppo.errors import UserError
from jaxppo.rewards import function
from jaxppo.rewards.pool import RewardPool
from jaxppo.types import Rollout

COLUMNS = {"prompt": ["one", "two"], "answer": ["1", "2"], "level": [7, 8]}


def decode(rows):
    return ["".join(map(str, row)) for row in rows]


def score(reward, rows=(1, 0), **options):
    """(scores, valid, names and weights) for a rollout of these rows of the data."""
    made = function.from_user(reward, decode, COLUMNS, **options)
    n, zeros = len(rows), jnp.zeros((len(rows), 2), jnp.float32)
    rolled = Rollout(
        tokens=jnp.ones((n, 4), jnp.int32),
        attend=jnp.ones((n, 4), bool),
        mask=zeros + 1,
        finished=jnp.ones(n, bool),
        logprobs=zeros,
        raw_logprobs=zeros,
        ref_logprobs=zeros,
        values=zeros,
        extra={"row": jnp.array(rows, jnp.int32)},
    )
    scores, valid = made.fn({}, rolled)
    return np.asarray(scores), np.asarray(valid), made.score_weights


def test_columns_come_by_name_and_the_prompt_as_the_data_have_it():
    seen = []

    def reward(prompt, response, answer):
        seen.append((prompt, answer))
        return float(answer)

    seen.clear()
    scores, valid, weights = score(reward)
    assert scores.tolist() == [2.0, 1.0] and valid.all() and weights == ()
    assert seen[-2:] == [("two", "2"), ("one", "1")]


def test_keyword_arguments_take_all_columns():
    scores, _, _ = score(lambda prompt, response, **columns: columns["level"] + len(columns))
    assert scores.tolist() == [8 + 2, 7 + 2]  # two columns besides the prompt


def test_a_default_stands_for_a_missing_column():
    scores, _, _ = score(lambda prompt, response, bonus=5: bonus)
    assert scores.tolist() == [5, 5]


def test_batched_by_the_name_of_the_first_parameter():
    def rewards(prompts, responses, level):
        assert prompts in (["two", "one"], ["one"])  # the batch, and the trial call
        return [x / 2 for x in level]

    assert score(rewards)[0].tolist() == [4.0, 3.5]


def test_a_pool_gets_the_columns_that_its_judge_names():
    with RewardPool(judges.level, workers=1) as pool:
        assert score(pool)[0].tolist() == [8.5, 7.5]
        assert function.fingerprint(pool) == function.fingerprint(judges.level)


def test_a_dict_of_scores_has_columns():
    def reward(prompt, response, level):
        return {"right": 1.0, "level": level}

    scores, valid, weights = score(reward, weights={"level": 0.5})
    assert scores.tolist() == [[1, 8], [1, 7]] and valid.all()
    assert weights == (("right", 1.0), ("level", 0.5))


def test_weights_name_the_scores_if_the_trial_call_raises():
    def reward(prompt, response):
        return {"a": 1.0 / len(response), "b": 2.0}

    scores, _, weights = score(reward, weights={"a": 1, "b": 3})
    assert scores[:, 1].tolist() == [2, 2] and weights == (("a", 1.0), ("b", 3.0))


def test_other_scores_than_the_named_ones_are_invalid(caplog):
    def reward(prompt, response):
        return {"a": 1.0} if not response or prompt == "one" else {"b": 1.0}

    scores, valid, _ = score(reward)
    assert valid.tolist() == [False, True] and scores.tolist() == [[0], [1]]
    assert "scores b instead of a" in caplog.text


def test_functions_by_name_are_columns_and_arrays_are_allowed():
    rewards = {
        "level": lambda prompt, response, level: level,
        "length": lambda params, rollout: (rollout.mask.sum(1), rollout.mask[:, 0] > -1),
    }
    scores, valid, weights = score(rewards, weights={"length": 2})
    assert scores[:, 0].tolist() == [8, 7] and valid.all()
    assert weights == (("level", 1.0), ("length", 2.0))


def test_a_reward_of_arrays_stays_as_it_is():
    def reward(params, rollout):
        return rollout.mask.sum(1), rollout.finished

    assert function.from_user(reward, decode, COLUMNS) == (reward, ())


async def wait(prompt, response):
    return 1.0


class Waiting:
    async def __call__(self, prompt, response):
        return 1.0


@pytest.mark.parametrize(
    ("reward", "weights", "words"),
    [
        (lambda prompt, response, colour: 1, None, "takes 'colour', which is no column"),
        (lambda prompt: 1, None, "takes 1 parameter"),
        (lambda prompt, response: {"a": 1}, {"b": 1}, "no score is named 'b'"),
        (
            lambda prompt, response: 1,
            {"b": 1},
            "returns one number, so there is no score named 'b'",
        ),
        (lambda params, rollout: 1, {"b": 1}, "leave them out"),
        (lambda response, answer: 1, None, "takes 'response' first; here it is reward(prompt"),
        (lambda completions, **rest: 1, None, "takes 'completions' first"),
        ({"a": lambda completions, **rest: 1}, None, "takes 'completions' first"),
        (lambda level, text, answer: 1, None, "takes 'level' first"),
        (lambda prompt, answer: 1, None, "takes 'answer' second"),
        (lambda *args, **named: 1, None, "put functools.wraps on its decorator"),
        (lambda *, prompt, response: 1, None, "takes 0 parameters by position"),
        (wait, None, "the reward wait is async"),
        (Waiting(), None, "the reward Waiting is async"),
        (Waiting, None, "but is the class Waiting"),
        ([lambda prompt, response: 1], None, "but is a list"),
        ("mine.py:reward", None, "but is a str"),
        ({}, None, "an empty dict"),
        (min, None, "the parameters of the reward min are not known"),
        (lambda prompt, response: {"a": 1}, {"a": float("nan")}, "the weight of 'a' is nan"),
        (lambda prompt, response: {"a": 1}, {"a": "x"}, "the weight of 'a' is 'x'"),
    ],
)
def test_rewards_that_cannot_be_used(reward, weights, words):
    with pytest.raises(UserError) as error:
        function.from_user(reward, decode, COLUMNS, weights=weights)
    assert words in str(error.value)


def test_a_column_of_the_name_of_the_response_does_not_meet_it(monkeypatch):
    """`response` is the model's, whatever the data have."""
    monkeypatch.setitem(COLUMNS, "response", ["x", "y"])
    seen = []

    def reward(prompt, response, **columns):
        seen.append((response, sorted(columns)))
        return 1.0

    assert score(reward)[1].all()
    assert seen[-1] == ("11", ["answer", "level"])


def test_a_reward_may_change_what_it_is_given(monkeypatch):
    chats = [[{"role": "user", "content": x}] for x in "ab"]
    monkeypatch.setitem(COLUMNS, "prompt", chats)
    monkeypatch.setitem(COLUMNS, "tags", [[], []])

    def reward(prompt, response, tags):
        prompt.append({"role": "assistant", "content": response})
        tags.append(response)
        return len(prompt) + len(tags)

    assert score(reward)[0].tolist() == [3, 3]  # 2 messages and 1 tag, also after the trial call
    assert [len(x) for x in (*chats, *COLUMNS["tags"])] == [1, 1, 0, 0]


def test_the_trial_call_is_no_better_than_those_of_the_step(capsys):
    """Signals work in Python's main thread alone, and the step calls in another."""

    def reward(prompt, response):
        signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGALRM))
        return 1.0

    score(reward)
    said = capsys.readouterr().out
    assert "signal only works in main thread" in said
    assert "turn off timeouts by signals" in said and "RewardPool" in said


def test_the_trial_call_can_be_stopped():
    def reward(prompt, response):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(reward)


def a_tool(state, text):
    return state, "", 0.0, True


def another_tool(state, text):
    return state, "", 1.0, True


@pytest.mark.ci
def test_the_fingerprint_of_an_environment():
    """What it closes over counts: lengths, tables of tokens, the tool on the host."""
    name = lambda environment: function.fingerprint_whole(tuple(environment))
    size = {"max_turns": 2, "turn_length": 3, "reply_length": 2}
    arrays = [np.arange(3), np.arange(3), np.arange(3) + 1]
    closed = [(lambda x: lambda y: x + y)(array) for array in arrays]
    games = [guess.make(n=9), guess.make(n=9), guess.make(n=10000), calculator.make()]
    games = [game.environment for game in [*games, calculator.make(tool=False)]]
    tools = [host.on_host(tool, **size) for tool in (a_tool, a_tool, another_tool)]
    first, again, *others = map(name, [*games, *tools])
    assert first == again and len({first, *others}) == 6  # the same tool twice
    assert others[3] == others[4] != others[5]
    first, again, other = map(function.fingerprint_whole, closed)
    assert first == again != other
