"""Every estimator's expected gradient over episodes of two turns against the true one, to 1e-8.

A turn is [1], [0, 0] or [0, 1] of a policy over two tokens; 1 ends it. After a first turn of [1]
the episode is over with a reward of .3; any other is answered by a token 0 or 1, which chance
draws. A reward follows each turn. All 1 + 2 * 2 * 3 = 13 episodes are enumerated.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxppo import advantages, estimators, kl
from jaxppo.config import Config
from jaxppo.losses import token
from jaxppo.rewards import shaping
from jaxppo.types import Rollout

TOLERANCE, BETA = 1e-8, 0.3
TURN, ANSWER, T = 2, 1, 6
TURNS = ([1], [0, 0], [0, 1])


class World(NamedTuple):
    tokens: np.ndarray  # [E T]
    mask: np.ndarray
    attend: np.ndarray
    states: np.ndarray  # the number of the history before each token
    rewards: np.ndarray
    chance: np.ndarray  # [E], of the answers


def world() -> World:
    histories, rows = {}, []
    number = lambda history: histories.setdefault(tuple(history), len(histories))

    def episode(first, answer=None, second=()):
        row = {name: np.zeros(T) for name in ("tokens", "mask", "attend", "states", "rewards")}
        history, chance = [], 1.0

        def put(slot, x, acting):
            row["tokens"][slot], row["attend"][slot], row["mask"][slot] = x, 1, acting
            row["states"][slot] = number(history)
            history.append(x)

        for slot, x in enumerate(first):
            put(slot, x, 1)
        row["rewards"][len(first) - 1] = 0.3 if first == [1] else 0.5 * first[-1]
        if answer is not None:
            chance = 0.7 if answer == first[-1] else 0.3
            put(TURN, answer, 0)
            for slot, x in enumerate(second):
                put(TURN + ANSWER + slot, x, 1)
            right = second[-1] == answer
            row["rewards"][TURN + ANSWER + len(second) - 1] = 1.0 * right - 0.2 * len(second)
        return (*row.values(), chance)

    rows.append(episode([1]))
    for first in TURNS[1:]:
        for answer in (0, 1):
            rows += [episode(first, answer, second) for second in TURNS]
    tokens, mask, attend, states, rewards, chance = (np.array(x) for x in zip(*rows, strict=True))
    return World(tokens.astype(int), mask, attend, states.astype(int), rewards, chance)


WORLD = world()
STATES = WORLD.states.max() + 1


def tables():
    rng = np.random.default_rng(0)
    logits, ref = rng.standard_normal((2, STATES, 2))
    return jnp.asarray(logits), jax.nn.log_softmax(jnp.asarray(ref))


def of_tokens(logits, w=WORLD):
    """Log-probs of all tokens, the answers included: [E T]."""
    return jax.nn.log_softmax(logits)[w.states, w.tokens] * w.attend


def truth():
    """∂ (E[R] − β E[Σ log π / π_ref]) over acting tokens."""
    logits, ref = tables()

    def objective(logits):
        own = of_tokens(logits) * WORLD.mask
        gap = (own - ref[WORLD.states, WORLD.tokens] * WORLD.mask).sum(1)
        prob = WORLD.chance * jnp.exp(own.sum(1))
        return (prob * (WORLD.rewards.sum(1) - BETA * gap)).sum()

    return jax.grad(objective)(logits)


def estimate(make, *, settings=None, group=1, mask=None, rewards=None):
    """The expected gradient of the loss −Σ A log π over episodes, or over all pairs of them."""
    settings = (
        Config(group_size=group, lam=1.0, whiten_advantages=False) if settings is None else settings
    )
    logits, ref = tables()
    each = np.arange(len(WORLD.chance))
    rows = np.stack(np.meshgrid(*[each] * group, indexing="ij"), -1).reshape(-1)
    w = World(*(x[rows] for x in WORLD))
    mask = jnp.asarray((w.mask if mask is None else mask(w)), float)
    given = jnp.asarray(w.rewards if rewards is None else rewards(w))
    own = of_tokens(logits, w)
    prob = w.chance * jnp.exp((own * w.mask).sum(1))
    prob = jnp.repeat(prob.reshape(-1, group).prod(1), group) / group
    ones = jnp.ones(len(rows), bool)
    logprobs = own * mask
    rolled = Rollout(
        tokens=jnp.asarray(w.tokens), attend=jnp.asarray(w.attend) > 0, mask=mask,
        finished=ones, logprobs=logprobs, raw_logprobs=logprobs,
        ref_logprobs=ref[w.states, w.tokens] * mask,
        # a critic that is wrong, but a function of the state
        values=jnp.sin(jnp.asarray(w.states, float)) * mask, rewards=given,
    )  # fmt: skip
    scores = given.sum(1)
    token_rewards = shaping.token_rewards(scores, rolled, kl_coef=BETA, kl=kl.k1)
    statistics = {"baseline": {"mean": jnp.asarray(0.2), "weight": jnp.asarray(1.0)}}
    adv, _, _ = make(settings)(
        token_rewards, scores, rolled, valid=ones, statistics=statistics, axis_name=None
    )

    def loss(logits):
        new = of_tokens(logits, w) * mask
        per_token, _ = token.reinforce(new, logprobs, adv, mask)
        return (prob[:, None] * per_token * mask).sum()

    return -jax.grad(loss)(logits)


EXACT = {
    "gae": (estimators.gae, 1, 1.0),
    "turn_gae": (estimators.turn_gae, 1, 1.0),
    "returns": (estimators.monte_carlo, 1, 1.0),
    "moving_average": (estimators.moving_average, 1, 1.0),
    "rloo": (estimators.on_rows(advantages.rloo), 2, 1.0),
    # ½ of the others' mean is the row's own: (R₁ − R₂) / 2
    "group_mean": (estimators.on_rows(partial(advantages.group, normalise_std=False)), 2, 0.5),
}


@pytest.fixture
def exact(x64):
    return truth()


def test_the_world():
    assert len(WORLD.chance) == 13 and WORLD.mask.sum(1).min() == 1
    logits, _ = tables()
    total = (WORLD.chance * np.exp((of_tokens(logits) * WORLD.mask).sum(1))).sum()
    assert total == pytest.approx(1, abs=1e-6)


@pytest.mark.ci
@pytest.mark.parametrize("name", EXACT)
def test_the_expected_gradient(name, exact):
    make, group, factor = EXACT[name]
    np.testing.assert_allclose(estimate(make, group=group), factor * exact, rtol=0, atol=TOLERANCE)


def test_answers_have_no_gradient(exact):
    """What stands after an answer has: its state is another."""
    only_answers = set(WORLD.states[(WORLD.attend - WORLD.mask) > 0]) - set(
        WORLD.states[WORLD.mask > 0]
    )
    assert only_answers
    found = estimate(estimators.gae)
    assert not np.asarray(found)[sorted(only_answers)].any()


WRONG = {
    "answers in the mask": {"mask": lambda w: w.attend},
    "rewards on the answer": {
        "rewards": lambda w: np.where(
            np.arange(T)[None] == TURN, w.rewards[:, :TURN].sum(1, keepdims=True), w.rewards
        ) * (np.arange(T)[None] >= TURN)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_one_is_found(name, exact):
    off = np.abs(estimate(estimators.monte_carlo, **WRONG[name]) - exact).max()
    assert off > 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("make", [estimators.turn_gae, estimators.monte_carlo])
def test_a_discount_of_turns(make, x64):
    """γ_turn = .5 gives r₁ + .5 r₂ to the first turn and r₂ to the second, with the KL of the
    tokens of each turn.
    """
    logits, ref = tables()
    settings = Config(lam=1.0, turn_gamma=0.5, whiten_advantages=False)

    def by_turn(logits, first):
        own = of_tokens(logits) * WORLD.mask
        gap = jax.lax.stop_gradient(own) - ref[WORLD.states, WORLD.tokens] * WORLD.mask
        reward = WORLD.rewards - BETA * gap
        one, two = reward[:, :TURN].sum(1), reward[:, TURN:].sum(1)
        prob = WORLD.chance * jnp.exp(own.sum(1))
        held = jax.lax.stop_gradient(prob)
        return held, own, one, two

    def objective(logits):
        """Σ p (A₁ log π₁ + A₂ log π₂), A₁ = r₁ + .5 r₂, A₂ = r₂, each from its token on."""
        held, own, one, two = by_turn(logits, None)
        first, second = own[:, :TURN].sum(1), own[:, TURN:].sum(1)
        return (held * ((one + 0.5 * two) * first + two * second)).sum()

    want = jax.grad(objective)(logits)
    np.testing.assert_allclose(estimate(make, settings=settings), want, rtol=0, atol=TOLERANCE)
