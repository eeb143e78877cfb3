"""Every estimator's expected gradient over episodes of two turns against the true one, to 1e-8.

A turn is [1], [0, 0] or [0, 1] of a policy over two tokens; 1 ends it. After a first turn of [1]
the episode is over with a reward of .3; any other is answered by a token 0 or 1, which chance
draws. A reward follows each turn. All 1 + 2 * 2 * 3 = 13 episodes are enumerated.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jaxppo import algorithms, kl
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


def estimate(name, *, batch=1, mask=None, rewards=None, scores=None, beta=BETA, **settings):
    """The expected gradient of the loss −Σ A log π over episodes, or over all batches of some of
    them; `scores` are several rewards of each.
    """
    choice = algorithms.ADVANTAGES[name]
    own = {"group_size": 2 if choice.grouped else 1, "lam": 1.0, "whiten_advantages": False}
    make = choice.make(Config(**own | settings))
    episodes = len(WORLD.chance)
    rows = np.indices((episodes,) * batch).reshape(batch, -1).T  # [batches, batch]
    mask = jnp.asarray(WORLD.mask if mask is None else mask, float)
    given = jnp.asarray(WORLD.rewards if rewards is None else rewards)
    scores = given.sum(1) if scores is None else jnp.asarray(scores)
    # the greedy episode meets the same chance: its score hangs on that, and on nothing else
    coin = [WORLD.chance == 0.7, WORLD.chance == 0.3]
    greedy = jnp.select(coin, [0.8, 0.1], default=0.7 * 0.8 + 0.3 * 0.1)
    statistics = {"baseline": {"mean": jnp.asarray(0.2), "weight": jnp.asarray(1.0)}}

    @jax.jit
    def gradient(logits, ref):
        logprobs = of_tokens(logits) * mask
        rolled = Rollout(
            tokens=jnp.asarray(WORLD.tokens), attend=jnp.asarray(WORLD.attend) > 0, mask=mask,
            finished=jnp.ones(episodes, bool), logprobs=logprobs, raw_logprobs=logprobs,
            ref_logprobs=ref[WORLD.states, WORLD.tokens] * mask,
            # a critic that is wrong, but a function of the state
            values=jnp.sin(jnp.asarray(WORLD.states, float)) * mask, rewards=given,
            extra={"greedy_scores": greedy},
        )  # fmt: skip
        token_rewards = shaping.token_rewards(
            shaping.row_scores(scores), rolled, kl_coef=beta, kl=kl.k1
        )

        def advantage(rows):
            given = jax.tree.map(lambda x: x[rows], (token_rewards, scores, rolled))
            valid = jnp.ones(batch, bool)
            return make(*given, valid=valid, statistics=statistics)[0]

        # the loss is linear in A: an episode's is its mean over the batches and its place in them
        adv = jax.vmap(advantage)(rows).reshape(*[episodes] * batch, batch, T)
        prob = WORLD.chance * jnp.exp((of_tokens(logits) * WORLD.mask).sum(1))
        prob = jnp.prod(prob[rows], 1).reshape(*[episodes] * batch, 1)
        places = range(batch)
        sums = [(adv[..., i, :] * prob).sum([k for k in places if k != i]) for i in places]

        def loss(logits):
            new = of_tokens(logits) * mask
            per_token, _ = token.reinforce(new, logprobs, sum(sums) / batch, mask)
            return (per_token * mask).sum()

        return -jax.grad(loss)(logits)

    return gradient(*tables())


class Episodes(NamedTuple):
    """All episodes, constants: what `oracle.pairs` and `oracle.over_batch` read, and more."""

    prob: np.ndarray  # [E]
    scores: np.ndarray  # the rewards less the KL
    length: np.ndarray  # acting tokens
    rewards: np.ndarray  # of tokens less their KL [E T]


def episodes() -> Episodes:
    logits, ref = tables()
    own = np.asarray(of_tokens(logits)) * WORLD.mask
    rewards = WORLD.rewards - BETA * (
        own - np.asarray(ref)[WORLD.states, WORLD.tokens] * WORLD.mask
    )
    prob = WORLD.chance * np.exp(own.sum(1))
    return Episodes(prob, rewards.sum(1), WORLD.mask.sum(1), rewards)


def score(weights):
    """∂ E[Σ w log π] over acting tokens, the weights [E 1] or [E T] constant."""
    held = jnp.asarray(episodes().prob[:, None] * np.asarray(weights) * WORLD.mask)
    return jax.grad(lambda logits: (held * of_tokens(logits)).sum())(tables()[0])


def pairs(f):
    """The gradient with f(Rᵢ, Rⱼ, nᵢ, nⱼ) as weights, mean over the second episode."""
    return lambda: score(oracle.pairs(episodes(), f))


def whitened(advantage, ddof):
    """The gradient with the advantages [E T] of both episodes of a batch as weights, less their
    mean over tokens and over their deviation, mean over the second episode. `advantage(e, i, j)` is
    of the first.
    """

    def expected():
        e, on = episodes(), WORLD.mask > 0
        weights = np.zeros(on.shape)
        for i, j in np.ndindex(len(on), len(on)):
            first, second = advantage(e, i, j)[on[i]], advantage(e, j, i)[on[j]]
            both = np.concatenate([first, second])
            white = (first - both.mean()) / np.sqrt(both.var(ddof=ddof) + 1e-8)
            weights[i, on[i]] += e.prob[j] * white
        return score(weights)

    return expected


def to_go(e, i, j):
    return np.cumsum(e.rewards[i, ::-1])[::-1]


def half_difference(e, i, j):
    return np.full(T, (e.scores[i] - e.scores[j]) / 2)


def by_turn(w=WORLD):
    """The rewards of the first and of the second turn: [E 2]."""
    return np.stack([w.rewards[:, :TURN].sum(1), w.rewards[:, TURN:].sum(1)], 1)


def wins():
    """GDPO's s = √½ (rewards won − rewards lost) of two groups of 2 whose deviation is
    √(2/3 (s² + s'²)), mean over the three others: see `oracle.wins`.
    """
    p = episodes().prob
    s = sum(oracle.sign(r[:, None], r[None]) for r in by_turn().T)
    own, other = s[:, :, None, None], s[None, None]
    deviation = np.sqrt(2 / 3 * (own**2 + other**2)) + 1e-6
    return score(np.einsum("ijkl,j,k,l->i", own / deviation, p, p, p)[:, None])


EXACT = {  # name -> (episodes in a batch, factor of the true gradient)
    "gae": (1, 1.0),
    "turn_gae": (1, 1.0),
    "returns": (1, 1.0),
    "moving_average": (1, 1.0),
    "remax": (1, 1.0),
    "rloo": (2, 1.0),
    # ½ of the mean is the row's own: (R₁ − R₂) / 2
    "group_mean": (2, 0.5),
    "batch_mean": (2, 0.5),
}
BIASED = {  # name -> (episodes in a batch, the expected gradient, options of `estimate`)
    "group": (2, pairs(oracle.sign), {}),
    "group_over_batch": (4, lambda: score(oracle.over_batch(episodes())), {}),
    "pass_at_k": (2, pairs(lambda r, s, *_: 2 * np.maximum(oracle.sign(r, s), 0)), {}),
    # n and m are acting tokens
    "opo": (2, pairs(lambda r, s, n, m: (r - s) * m / (n + m)), {}),
    "gdpo": (4, wins, {"scores": by_turn()}),
    "reinforce_plus_plus": (2, whitened(to_go, ddof=1), {}),
    "reinforce_plus_plus_baseline": (
        2,
        whitened(half_difference, ddof=0),
        {"whiten_advantages": None},
    ),
}
# gpg and max_rl have tests of their own


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
    batch, factor = EXACT[name]
    found = estimate(name, batch=batch)
    np.testing.assert_allclose(found, factor * exact, rtol=0, atol=TOLERANCE)


@pytest.mark.ci
@pytest.mark.parametrize("name", BIASED)
def test_the_expected_gradient_of_a_biased_one(name, exact):
    """It is what the formula says, and not the true one."""
    batch, formula, options = BIASED[name]
    found, want = estimate(name, batch=batch, **options), formula()
    np.testing.assert_allclose(found, want, rtol=0, atol=TOLERANCE)
    size, angle = oracle.bias(np.ravel(want), np.ravel(exact))
    assert size > 0.02 and angle > 1


@pytest.mark.ci
def test_the_expected_gradient_of_gpg(exact):
    """With two groups of 2, (1 + p) (2 − 1)/2 times the true one, p the chance that both episodes
    of a group have the same score: that they are the same.
    """
    e = episodes()
    assert len(np.unique(e.scores.round(9))) == 13
    factor = (1 + (e.prob**2).sum()) / 2
    found = estimate("gpg", batch=4)
    np.testing.assert_allclose(found, factor * exact, rtol=0, atol=TOLERANCE)


@pytest.mark.ci
def test_the_expected_gradient_of_max_rl(x64):
    """A score of 1 on a right second turn: with two episodes, whose mean is ½ where it counts,
    (R − ½) / (½ + 1e-6) gives the gradient of the chance to be right over 1 + 2e-6.
    """
    right = np.where(WORLD.rewards > 0.55, 1.0, 0.0)
    assert right[:, TURN + ANSWER :].sum() == right.sum() == 6
    prob = lambda logits: WORLD.chance * jnp.exp((of_tokens(logits) * WORLD.mask).sum(1))
    want = jax.grad(lambda logits: (prob(logits) * right.sum(1)).sum())(tables()[0])
    found = estimate("max_rl", batch=2, rewards=right, beta=0.0)
    np.testing.assert_allclose(found, want / (1 + 2e-6), rtol=0, atol=TOLERANCE)


def test_every_estimator_is_here():
    assert {*EXACT, *BIASED, "gpg", "max_rl"} == set(algorithms.ADVANTAGES)


def test_answers_have_no_gradient(exact):
    """What stands after an answer has: its state is another."""
    only_answers = set(WORLD.states[(WORLD.attend - WORLD.mask) > 0]) - set(
        WORLD.states[WORLD.mask > 0]
    )
    assert only_answers
    found = estimate("gae")
    assert not np.asarray(found)[sorted(only_answers)].any()


WRONG = {
    "answers in the mask": {"mask": WORLD.attend},
    "rewards on the answer": {
        "rewards": np.where(
            np.arange(T)[None] == TURN, WORLD.rewards[:, :TURN].sum(1, keepdims=True), WORLD.rewards
        ) * (np.arange(T)[None] >= TURN)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_one_is_found(name, exact):
    off = np.abs(estimate("returns", **WRONG[name]) - exact).max()
    assert off > 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("name", ["turn_gae", "returns"])
def test_a_discount_of_turns(name, x64):
    """γ_turn = .5 gives r₁ + .5 r₂ to the first turn and r₂ to the second, with the KL of the
    tokens of each turn.
    """
    logits, ref = tables()

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
    np.testing.assert_allclose(estimate(name, turn_gamma=0.5), want, rtol=0, atol=TOLERANCE)
