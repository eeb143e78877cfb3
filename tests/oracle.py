"""The exact expected gradient of every estimator, by enumerating all sequences of a tiny policy.

Of three tokens END ends the sequence, which has at most three: 15 sequences of 1, 2 and 3 tokens. A
policy is a table [S V] of log-probs with one row for each prefix, its state. States are in heap
order: token a leads from s to 2 s + 1 + a.

Each row of ROWS is an estimator with a claim about its expectation: it is the gradient of E[R] (or,
with a KL, of E[R] − β KL of whole sequences), a multiple of it, or something else. If there is a
formula for the expectation, the row has it, as a function whose gradient with respect to the table
is meant. `python tests/oracle.py` prints the table for
docs/estimators.md.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxppo import advantages, aggregate, kl, masked
from jaxppo.losses import correction, covariance, sequence, token

VOCAB, LENGTH, END, STATES = 3, 3, 2, 7
BETA, LAM = 0.3, 0.5

_random = np.random.default_rng(0)
LOGITS, OLD, REF = _random.normal(size=(3, STATES, VOCAB))
# of a token after a prefix; R is the sum over a sequence
REWARDS = _random.uniform(-0.9, 0.9, (STATES, VOCAB))
ERROR = _random.normal(size=STATES)  # of a critic


class World(NamedTuple):
    """All sequences; [N T]."""

    tokens: np.ndarray
    states: np.ndarray
    mask: np.ndarray


@cache
def world(length: int = LENGTH) -> World:
    rows = []

    def extend(state, path):
        for symbol in range(VOCAB):
            now = [*path, (symbol, state, 1)]
            if symbol == END or len(now) == length:
                # padding has a real log-prob, which the mask must exclude
                rows.append(now + [(0, 0, 0)] * (length - len(now)))
            else:
                extend(2 * state + 1 + symbol, now)

    extend(0, [])
    return World(*np.moveaxis(np.array(rows), -1, 0))


class Batch(NamedTuple):
    """The inputs of an estimator for some sequences, [B T]; `greedy` is [B]."""

    logprobs: jax.Array
    old: jax.Array
    ref: jax.Array
    mask: jax.Array
    rewards: jax.Array
    values: jax.Array
    error: jax.Array
    full: jax.Array
    greedy: jax.Array
    entropy: jax.Array
    forward: jax.Array
    jsd: jax.Array


class Exact(NamedTuple):
    """The inputs of a formula: tables [S V] and all sequences [N T], [N]. Only `new` and `logprobs`
    have gradients.
    """

    new: jax.Array
    old: jax.Array  # of the sampler: the same numbers on policy
    reference: jax.Array
    logprobs: jax.Array
    x: jax.Array  # log π − log π_ref
    ratio: jax.Array
    prob: jax.Array  # of the sampler, constant
    to_go: jax.Array
    length: jax.Array
    scores: jax.Array  # R


# The estimators: only functions of jaxppo.

AGGREGATES = {
    **{
        f.__name__: f
        for f in (
            aggregate.sequence_sum,
            aggregate.sequence_mean,
            aggregate.token_mean,
            aggregate.token_sum,
        )
    },
    "constant(3)": partial(aggregate.constant, length=LENGTH),
}


def spread(x, mask):
    return x[:, None] * mask


def over_sequence(f):
    """A KL estimator of whole sequences, on the first token of each."""
    return lambda b: jnp.pad(
        f(
            jnp.sum(b.logprobs * b.mask, -1, keepdims=True),
            jnp.sum(b.ref * b.mask, -1, keepdims=True),
        ),
        ((0, 0), (0, b.mask.shape[1] - 1)),
    )


def one_action(loss):
    """A loss on tokens, applied to each sequence as one token, the first."""

    def whole(logprobs, old, a, mask, *, key):
        total = lambda x: jnp.sum(x * mask, -1, keepdims=True)
        per_token, diagnostics = loss(total(logprobs), total(old), a[:, :1], mask[:, :1])
        return jnp.pad(per_token, ((0, 0), (0, mask.shape[1] - 1))), diagnostics

    return whole


def corrected(**options):
    """REINFORCE times the `correction`, as in `update`. `old` is from the sampler, `logprobs` from
    the policy.
    """
    return times_mask(partial(correction.importance, **options))


def times_mask(factor):
    """REINFORCE times a weight or mask of (old log-probs, sampler's, mask)."""

    def loss(logprobs, old, a, mask, *, key=None):
        per_token, diagnostics = token.reinforce(logprobs, logprobs, a, mask)
        return per_token * factor(lax.stop_gradient(logprobs), old, mask), diagnostics

    return loss


def near(logprobs, old, a, mask, *, key=None):
    """REINFORCE without bad sequences that are far from the sampler."""
    kept = correction.off_policy_mask(logprobs, old, a, mask, threshold=0.1)
    return token.reinforce(logprobs, logprobs, a * kept, mask)


def token_kl(f):
    return lambda b: f(b.logprobs, b.ref)


def token_ratio(f):
    return lambda b: jnp.exp(b.logprobs - b.old) * f(b.logprobs, b.ref)


def sequence_ratio(f):
    return lambda b: (
        jnp.exp(jnp.sum((b.logprobs - b.old) * b.mask, -1, keepdims=True)) * f(b.logprobs, b.ref)
    )


def full(b):
    return b.full


def to_go(b):
    return advantages.returns_to_go(b.rewards, b.mask, gamma=1.0)


def whole(b):
    return spread(jnp.sum(b.rewards, -1), b.mask)


def own(b):
    """Each token's KL (k1) counts for that token alone."""
    penalty = BETA * masked.keep(kl.k1(b.logprobs, b.ref), b.mask)
    return to_go(b._replace(rewards=b.rewards + penalty)) - penalty


def gae(lam, wrong):
    return lambda b: advantages.gae(
        b.rewards, b.values + wrong * b.error, b.mask, gamma=1.0, lam=lam
    )[0]


def grouped(f, **options):
    return lambda b: spread(f(jnp.sum(b.rewards, -1), **options), b.mask)


def top_half(b):
    """Returns-to-go of the half of the tokens with the highest entropy."""
    return to_go(b) * correction.top_entropy(b.entropy, b.mask, fraction=0.5)


def opo(b):
    return spread(advantages.opo(jnp.sum(b.rewards, -1), jnp.sum(b.mask, -1), group_size=2), b.mask)


def gdpo(b):
    """Two rewards with sum R: that of the first token and that of the rest."""
    scores = jnp.stack([b.rewards[:, 0], jnp.sum(b.rewards[:, 1:], -1)], -1)
    return spread(advantages.gdpo(scores, group_size=2), b.mask)


def right(b):
    """MaxRL, for right answers: 1 where R > 0, else 0."""
    scores = jnp.where(jnp.sum(b.rewards, -1) > 0, 1.0, 0.0)
    return spread(advantages.max_rl(scores, group_size=len(scores), eps=0.0), b.mask)


def less_batch_mean(b):
    scores = jnp.sum(b.rewards, -1)
    return spread(scores - masked.mean(scores, jnp.ones_like(scores)), b.mask)


class Row(NamedTuple):
    """One estimator and its claim: "exact", "c times: why" or "biased: why"."""

    name: str
    claim: str
    expected: Callable | None = None  # formula of the expectation, of an Exact
    loss: Callable = token.reinforce
    advantage: Callable = to_go
    aggregate: str = "sequence_sum"
    kl: str = ""
    in_reward: Callable | None = None
    in_loss: Callable | None = None
    batch: int = 1
    length: int = LENGTH
    off_policy: bool = False

    @property
    def kind(self) -> str:
        """exact | times | biased"""
        return self.claim.split(":")[0].split(" ")[-1]

    @property
    def place(self) -> str:
        return " and ".join(
            ["reward"] * (self.in_reward is not None) + ["loss"] * (self.in_loss is not None)
        )


def surrogate(row: Row, tables, index) -> jax.Array:
    """The loss of one batch, as in `ppo` and `update`."""
    new, old, ref = tables
    w = world(row.length)
    tokens, states, mask = (jnp.asarray(x)[index] for x in w)
    mask = mask.astype(new.dtype)
    best = jnp.argmax(new, -1)[w.states] == w.tokens
    is_greedy = jnp.all(best | (w.mask == 0), -1).astype(new.dtype)
    greedy = jnp.sum(is_greedy * jnp.sum(jnp.asarray(REWARDS[w.states, w.tokens] * w.mask), -1))
    b = Batch(
        new[states, tokens],
        old[states, tokens],
        ref[states, tokens],
        mask,
        jnp.asarray(REWARDS)[states, tokens] * mask,
        state_values(new)[states],
        jnp.asarray(ERROR)[states],
        kl.full(new, ref)[states],
        jnp.full(len(index), greedy),
        entropies(new)[states],
        kl.forward(new, ref)[states],
        kl.jensen_shannon(new, ref, beta=0.3)[states],
    )
    if row.in_reward is not None:
        b = b._replace(rewards=b.rewards - BETA * masked.keep(row.in_reward(b), mask))
    per_token, _ = row.loss(
        b.logprobs, b.old, lax.stop_gradient(row.advantage(b)), mask, key=jax.random.key(0)
    )
    if row.in_loss is not None:
        per_token = per_token + BETA * masked.keep(row.in_loss(b), mask)
    return jnp.sum(AGGREGATES[row.aggregate](mask) * per_token)


def gradients(rows: tuple[Row, ...], new, old, ref) -> list[tuple]:
    """For each row (expected gradient of the estimator, true gradient, gradient of the formula or
    None), in one program.

    With respect to the table `new`; shapes [S V].
    """
    sizes = {(len(world(row.length).tokens), row.batch) for row in rows}
    # all of them, in every order
    batches = {(n, b): np.indices((n,) * b).reshape(b, -1).T for n, b in sizes}
    return _gradients(rows, batches, new, old, ref)


@partial(jax.jit, static_argnums=0)
def _gradients(rows, batches, new, old, ref):
    def one(row):
        sampler = old if row.off_policy else new
        index = batches[len(world(row.length).tokens), row.batch]
        prob = jnp.prod(exact(new, sampler, ref, row.length).prob[index], -1)
        # On policy the old log-probs are the same numbers, as constants.
        losses = lambda z: jax.vmap(lambda i: surrogate(row, (z, sampler, ref), i))(index)
        formula = lambda f: jax.grad(lambda z: f(exact(z, sampler, ref, row.length)))(new)
        truth = formula(lambda x: true(x, BETA if row.kl else 0.0))
        estimate = jax.grad(lambda z: -jnp.sum(prob * losses(z)))(new)
        return estimate, truth, None if row.expected is None else formula(row.expected)

    return [one(row) for row in rows]


# The formulas.


def exact(new, old, ref, length: int = LENGTH) -> Exact:
    tokens, states, m = world(length)
    mask = jnp.asarray(m, new.dtype)
    read = lambda table: table[states, tokens] * mask
    rewards, logprobs = read(jnp.asarray(REWARDS)), read(new)
    to_go = jnp.cumsum(rewards[:, ::-1], -1)[:, ::-1]
    prob = lax.stop_gradient(jnp.exp(jnp.sum(read(old), -1)))
    ratio = lax.stop_gradient(jnp.exp(logprobs - read(old)))
    return Exact(
        new,
        old,
        ref,
        logprobs,
        logprobs - read(ref),
        ratio,
        prob,
        to_go,
        jnp.sum(mask, -1),
        to_go[:, 0],
    )


def true(x: Exact, beta: float) -> jax.Array:
    """E[R] − β KL(π‖π_ref), a sum over sequences, differentiated through their probabilities."""
    return jnp.sum(jnp.exp(jnp.sum(x.logprobs, -1)) * (x.scores - beta * jnp.sum(x.x, -1)))


def score(x: Exact, weights) -> jax.Array:
    """Its gradient is E[Σₜ wₜ ∇log π(aₜ)], with constant weights [N T] or [N 1]."""
    return jnp.sum(x.prob * jnp.sum(lax.stop_gradient(weights) * x.logprobs, -1))


def values(logprobs, gamma: float = 1.0):
    """Q [S V]: the token's reward and what follows, discounted."""
    after, levels = jnp.zeros((4, VOCAB)), []
    for low, high in ((3, 7), (1, 3), (0, 1)):
        q = jnp.asarray(REWARDS[low:high]) + gamma * after
        pairs = jnp.sum(jnp.exp(logprobs[low:high]) * q, -1).reshape(-1, 2) if low else after
        after = jnp.pad(pairs, ((0, 0), (0, VOCAB - pairs.shape[1])))
        levels = [q, *levels]
    return jnp.concatenate(levels)


def state_values(logprobs):
    return jnp.sum(jnp.exp(logprobs) * values(logprobs), -1)


def entropies(logprobs):
    return -jnp.sum(jnp.exp(logprobs) * logprobs, -1)


def visits(logprobs):
    """The expected visits of each state in a sequence, a constant."""
    p = lax.stop_gradient(jnp.exp(logprobs))
    second = p[0, :2]
    return jnp.concatenate([jnp.ones(1), second, (second[:, None] * p[1:3, :2]).reshape(-1)])


def held(x: Exact, per_state) -> jax.Array:
    """The sum over states of a function of their distributions, weighted with constant visits."""
    return jnp.sum(visits(x.new) * per_state(x.new, x.reference))


def improvement(x: Exact, policy, gamma: float = 1.0) -> jax.Array:
    """Σ d(s) π(a|s) Q(s, a) with constant visits d (not discounted) and Q, of `policy`."""
    return jnp.sum(
        visits(policy)[:, None] * jnp.exp(x.new) * lax.stop_gradient(values(policy, gamma))
    )


reverse = lambda p, q: jnp.sum(jnp.exp(p) * (p - q), -1)
forward = lambda p, q: jnp.sum(jnp.exp(q) * (q - p), -1)
mixture = lambda p, q: jnp.log(0.7 * jnp.exp(p) + 0.3 * jnp.exp(q))
jensen_shannon = lambda p, q: 0.3 * reverse(q, mixture(p, q)) + 0.7 * reverse(p, mixture(p, q))
variation = lambda p, q: jnp.sum(jnp.abs(jnp.exp(p) - jnp.exp(q)), -1)


def pairs(x: Exact, f) -> jax.Array:
    """f(Rᵢ, Rⱼ, nᵢ, nⱼ) of a sequence and a second one, mean over the second: weights [N 1]."""
    table = f(x.scores[:, None], x.scores[None], x.length[:, None], x.length[None])
    return jnp.sum(x.prob[None] * table, -1, keepdims=True)


def sign(r, s, *_):
    """GRPO's advantage with two samples: half the difference over its standard deviation |r − s| /
    √2.
    """
    return (r - s) / 2 / (jnp.abs(r - s) / np.sqrt(2.0) + 1e-6)


def best(x: Exact, f) -> jax.Array:
    """E[f(p, p')] of two sequences' rewards, differentiated through their probabilities."""
    prob = jnp.exp(jnp.sum(x.logprobs, -1))
    return prob @ f(x.scores[:, None], x.scores[None]) @ prob


def chance(x: Exact) -> jax.Array:
    """p = P(R > 0)."""
    return jnp.sum(jnp.where(x.scores > 0, jnp.exp(jnp.sum(x.logprobs, -1)), 0.0))


def over_batch(x: Exact) -> jax.Array:
    """`group_over_batch` with two groups of 2, mean over the three others: weights [N 1]."""
    r = x.scores
    four = jnp.stack(jnp.meshgrid(r, r, r, r, indexing="ij"))
    half = (r[:, None] - r[None]) / 2
    return jnp.einsum(
        "ij,ijkl,j,k,l->i", half, 1 / (jnp.std(four, 0, ddof=1) + 1e-4), *[x.prob] * 3
    )[:, None]


def wins(x: Exact) -> jax.Array:
    """GDPO's advantage with two groups of 2, mean over the three others: weights [N 1].

    s = √½ (rewards won − rewards lost); a group has s and −s, so the deviation of two is √(2/3 (s²
    + s'²)).
    """
    first, rest = jnp.asarray(REWARDS[0, world().tokens[:, 0]]), x.to_go[:, 1]
    s = sum(sign(r[:, None], r[None]) for r in (first, rest))
    own, other = s[:, :, None, None], s[None, None]
    return jnp.einsum(
        "ijkl,j,k,l->i", own / (jnp.sqrt(2 / 3 * (own**2 + other**2)) + 1e-6), *[x.prob] * 3
    )[:, None]


def kept_by_clip_cov(x: Exact) -> jax.Array:
    centre = lambda y: y - (jnp.sum(y, -1) / x.length)[:, None]  # both are 0 at padding
    cov = centre(x.to_go) * centre(x.logprobs)
    return score(x, jnp.where((cov <= 0.05) | (cov >= 5), x.to_go, 0))


def kept_by_clip(x: Exact) -> jax.Array:
    kept = jnp.where(x.to_go > 0, x.ratio < 1.2, x.ratio > 0.8)
    return score(x, jnp.where(kept, x.ratio * x.to_go, 0))


def sequence_mean_ratio(x: Exact) -> jax.Array:
    """The geometric mean of a sequence's ratios, [N 1]; at padding they are 1."""
    return (jnp.prod(x.ratio, -1) ** (1 / x.length))[:, None]


def kept_by_gspo(x: Exact) -> jax.Array:
    s, a = sequence_mean_ratio(x), x.scores[:, None]
    return score(x, jnp.where(jnp.where(a > 0, s < 1 + 4e-4, s > 1 - 3e-4), s * a, 0))


def sequence_product(x: Exact) -> jax.Array:
    """The product of a sequence's ratios, [N 1]."""
    return jnp.prod(x.ratio, -1, keepdims=True)


def kept_by_entropy(x: Exact) -> jax.Array:
    """Tokens at or above the median of their sequence."""
    h = jnp.where(world().mask > 0, lax.stop_gradient(entropies(x.new))[world().states], jnp.nan)
    return score(x, jnp.where(h >= jnp.nanmedian(h, -1, keepdims=True), x.to_go, 0))


def product_within(x: Exact) -> jax.Array:
    w = sequence_product(x)
    return ((w >= 0.5) & (w <= 2)).astype(w.dtype)


def kept_near(x: Exact) -> jax.Array:
    far = -jnp.log(sequence_mean_ratio(x)) > 0.1
    return score(x, jnp.where(far & (x.scores[:, None] < 0), 0, x.scores[:, None]))


def normalised(x: Exact) -> jax.Array:
    """Sequences' ratios over their mean in a batch of 2, mean over the other: weights [N 1]."""
    w = jnp.prod(x.ratio, -1)
    return jnp.sum(x.prob[None] * 2 * w[:, None] / (w[:, None] + w[None]), -1, keepdims=True)


def kept_by_rloo_clip(x: Exact) -> jax.Array:
    w, a = sequence_product(x), x.scores[:, None]
    return score(x, jnp.where(jnp.where(a > 0, w < 1.2, w > 0.8), w * a, 0))


def weighed_by_vespo(x: Exact) -> jax.Array:
    w, a = sequence_product(x), x.scores[:, None]
    weight = jnp.where(a >= 0, w**2 * jnp.exp(3 * (1 - w)), w**3 * jnp.exp(2 * (1 - w)))
    return score(x, weight * a)


def wrong_critic(x: Exact) -> jax.Array:
    """δ is wrong by e₊ − e; the sum with λ leaves −eₜ, a baseline, and (1 − λ) Σₖ λᵏ⁻¹ eₜ₊ₖ."""
    e = jnp.asarray(ERROR[world().states] * world().mask)
    later = jnp.stack([e[:, 1] + LAM * e[:, 2], e[:, 2], jnp.zeros_like(e[:, 2])], -1)
    return true(x, 0.0) + score(x, (1 - LAM) * later)


def times(c):
    return lambda x: c * true(x, 0.0)


def held_fixed(per_state, coef=-BETA, beta=0.0):
    return lambda x: true(x, beta) + coef * held(x, per_state)


per_token = lambda x: score(x, (x.scores / x.length)[:, None])
less_kl = lambda x, terms: score(x, (x.scores - BETA * jnp.sum(terms, -1))[:, None])
no_clip = partial(token.clip, low=1.0, high=jnp.inf)
plus = lambda f: lambda b: kl.straight_through(f(b.logprobs, b.ref), kl.k2(b.logprobs, b.ref))
ungrouped = partial(advantages.group, normalise_std=False)
ON_SEQUENCES = (sequence.gspo, sequence.gspo_token, sequence.gmpo)
STATES_FIXED = "biased: the slope of each state's KL, how often states are met held fixed"
EVERY = "biased: a token of a sequence of n counts 1/n"
REINFORCE = "`reinforce`"
IMPORTANCE = "`importance`"
OLD_STATES = "biased: states and values of the old policy (TRPO's surrogate)"

ROWS = (
    *(
        Row(f"`{getattr(f, 'func', f).__name__}`", "exact", loss=f)
        for f in (
            token.reinforce,
            token.clip,
            token.dual_clip,
            token.cispo,
            token.two_sided,
            token.sapo,
            token.dppo_tv,
            token.dppo_kl,
            covariance.kl_cov,
            partial(token.kl_penalty, beta=0.5),
            partial(token.dro, beta=0.5),
        )
    ),
    *(
        Row(f"`{f.__name__}`", "exact", loss=f, advantage=whole)
        for f in (sequence.vespo, *ON_SEQUENCES)
    ),
    Row(
        "`rloo_clip`", "exact", loss=sequence.rloo_clip, advantage=whole, aggregate="sequence_mean"
    ),
    *(
        Row(f"`{f.__name__}`", EVERY, per_token, loss=f, advantage=whole, aggregate="sequence_mean")
        for f in ON_SEQUENCES
    ),
    Row(
        "`clip_cov`, where it acts",
        "biased: tokens of high covariance are left out",
        kept_by_clip_cov,
        loss=partial(covariance.clip_cov, fraction=1.0, lower=0.05),
    ),
    Row(
        "`awr`, whole return",
        "biased: the gradient of E[exp R]",
        lambda x: jnp.sum(jnp.exp(jnp.sum(x.logprobs, -1) + x.scores)),
        loss=token.awr,
        advantage=whole,
    ),
    Row(
        "`likelihood` alone",
        "biased: the gradient of the chance that R > 0",
        chance,
        loss=lambda lp, old, a, mask, key: (token.likelihood(lp, a[:, 0], mask), {}),
        advantage=whole,
    ),
    Row(
        "`top_entropy`, half of the tokens",
        "biased: the other tokens are left out",
        kept_by_entropy,
        advantage=top_half,
    ),
    # baselines
    Row("whole return", "exact", advantage=whole),
    *(
        Row("`gae`, λ = 1 or .5, exact critic", "exact", advantage=gae(lam, 0.0))
        for lam in (1.0, LAM)
    ),
    Row("`gae`, λ = 1, wrong critic", "exact", advantage=gae(1.0, 1.0)),
    Row("`remax`", "exact", advantage=lambda b: advantages.remax(b.rewards, b.greedy, b.mask)),
    *(
        Row(
            "`rloo`, G = 2 or 3", "exact", advantage=grouped(advantages.rloo, group_size=g), batch=g
        )
        for g in (2, 3)
    ),
    Row(
        "`returns_to_go`, γ = .5",
        "biased: the policy gradient with Q discounted, but not how often states are met",
        lambda x: improvement(x, x.new, 0.5),
        advantage=lambda b: advantages.returns_to_go(b.rewards, b.mask, gamma=0.5),
    ),
    Row(
        "`gae`, λ = .5, wrong critic",
        "biased: the critic's errors at later states, times 1 − λ",
        wrong_critic,
        advantage=gae(LAM, 1.0),
    ),
    Row(
        "`group` without std, G = 2",
        "1/2 times: (G − 1)/G, its mean has the sample itself in it",
        times(1 / 2),
        advantage=grouped(ungrouped, group_size=2),
        batch=2,
    ),
    Row(
        "less the mean of a batch of 2",
        "1/2 times: (G − 1)/G, its mean has the sample itself in it",
        times(1 / 2),
        advantage=less_batch_mean,
        batch=2,
    ),
    Row(
        "`group` without std, G = 3",
        "2/3 times: (G − 1)/G",
        times(2 / 3),
        advantage=grouped(ungrouped, group_size=3),
        batch=3,
    ),
    Row(
        "`gpg`, two groups of 2",
        "(1 + p) (G − 1)/G times: p the chance that a group has equal scores",
        lambda x: (1 + jnp.sum(x.prob**2)) / 2 * true(x, 0.0),
        advantage=grouped(advantages.gpg, group_size=2),
        batch=4,
    ),
    Row(
        "`group` with std, G = 2",
        "biased: √½ (chance to win − chance to lose) against a second sample, held fixed",
        lambda x: score(x, pairs(x, sign)),
        advantage=grouped(advantages.group, group_size=2),
        batch=2,
    ),
    Row(
        "`group_over_batch`, two groups of 2",
        "biased: half the difference to a second sample, over the batch's deviation, held fixed",
        lambda x: score(x, over_batch(x)),
        advantage=grouped(advantages.group_over_batch, group_size=2),
        batch=4,
    ),
    Row(
        "`pass_at_k` without std, k = 2",
        "biased: half the gradient of E[max R]",
        lambda x: best(x, jnp.maximum) / 2,
        advantage=grouped(advantages.pass_at_k, group_size=2, normalise_std=False),
        batch=2,
    ),
    Row(
        "`pass_at_k`, k = 2",
        "biased: √2 times the chance to win against a second sample, held fixed",
        lambda x: score(x, pairs(x, lambda r, s, *_: jnp.maximum(sign(r, s), 0) * 2)),
        advantage=grouped(advantages.pass_at_k, group_size=2),
        batch=2,
    ),
    *(
        Row(
            f"`max_rl`, G = {g}",
            f"biased: the gradient of {text}, p the chance that R > 0",
            lambda x, g=g: -sum((1 - chance(x)) ** k / k for k in range(1, g)),
            advantage=right,
            batch=g,
        )
        for g, text in ((2, "p"), (3, "p − (1 − p)²/2"))
    ),
    Row(
        "`opo`, G = 2",
        "biased: the sample itself is in the baseline, the more the longer it is",
        lambda x: score(x, pairs(x, lambda r, s, n, m: (r - s) * m / (n + m))),
        advantage=opo,
        batch=2,
    ),
    Row(
        "`reinforce_plus_plus`, batch of 2",
        "biased: mean and deviation depend on the sample itself",
        advantage=lambda b: advantages.reinforce_plus_plus(b.rewards, b.mask, gamma=1.0),
        batch=2,
    ),
    Row(
        "`gdpo`, two rewards, two groups of 2",
        "biased: rewards won less rewards lost, over the batch's deviation, held fixed",
        lambda x: score(x, wins(x)),
        advantage=gdpo,
        batch=4,
    ),
    # aggregation
    Row("whole return", EVERY, per_token, advantage=whole, aggregate="sequence_mean"),
    Row(
        "whole return, batch of 2",
        "biased: the share of a token depends on the lengths of all",
        lambda x: score(x, pairs(x, lambda r, s, n, m: 2 * r / (n + m))),
        advantage=whole,
        aggregate="token_mean",
        batch=2,
    ),
    Row(
        "whole return",
        "1/3 times: over the constant",
        times(1 / 3),
        advantage=whole,
        aggregate="constant(3)",
    ),
    Row(
        "whole return, batch of 2",
        "2 times: the rows are added up",
        times(2),
        advantage=whole,
        aggregate="token_sum",
        batch=2,
    ),
    Row(
        "`group` without std, G = 2 (Dr. GRPO)",
        "1/6 times: (G − 1)/G over the constant",
        times(1 / 6),
        advantage=grouped(ungrouped, group_size=2),
        aggregate="constant(3)",
        batch=2,
    ),
    # KL in the reward
    Row(REINFORCE, "exact", kl="k1", in_reward=token_kl(kl.k1)),
    Row("whole return", "exact", kl="k1", in_reward=token_kl(kl.k1), advantage=whole),
    Row(
        "`rloo`, G = 2",
        "exact",
        kl="k1",
        in_reward=token_kl(kl.k1),
        advantage=grouped(advantages.rloo, group_size=2),
        batch=2,
    ),
    Row(
        "`clip`, `gae`, λ = 1, wrong critic",
        "exact",
        kl="k1",
        in_reward=token_kl(kl.k1),
        loss=token.clip,
        advantage=gae(1.0, 1.0),
    ),
    Row(REINFORCE, "exact", kl="k1 with k2's gradient", in_reward=plus(kl.k1)),
    Row(
        "each token only its own KL",
        STATES_FIXED,
        held_fixed(reverse),
        kl="k1",
        in_reward=token_kl(kl.k1),
        advantage=own,
    ),
    Row(
        REINFORCE,
        "biased: E[k2] is another divergence, its own slope left out",
        lambda x: less_kl(x, x.x**2 / 2),
        kl="k2",
        in_reward=token_kl(kl.k2),
    ),
    Row(
        REINFORCE,
        "biased: E[abs x] is another divergence, its own slope left out",
        lambda x: less_kl(x, jnp.abs(x.x)),
        kl="absolute",
        in_reward=token_kl(kl.absolute),
    ),
    Row(
        REINFORCE,
        "biased: lacks the slope of each state's forward KL, states held fixed",
        held_fixed(forward, BETA, BETA),
        kl="k3",
        in_reward=token_kl(kl.k3),
    ),
    Row(
        REINFORCE,
        "biased: lacks the slope of each state's KL, states held fixed",
        held_fixed(reverse, BETA, BETA),
        kl="full",
        in_reward=full,
    ),
    # KL in the loss
    Row(
        REINFORCE,
        "biased: no KL at all, the gradient of E[R]",
        times(1),
        kl="k1",
        in_loss=token_kl(kl.k1),
    ),
    *(
        Row(REINFORCE, STATES_FIXED, held_fixed(reverse), kl=label, in_loss=f)
        for label, f in (
            ("full", full),
            ("k2", token_kl(kl.k2)),
            ("k1 or k3 with k2's gradient", plus(kl.k1)),
            ("k1 or k3 with k2's gradient", plus(kl.k3)),
            ("k1 or k3 × token ratio", token_ratio(kl.k1)),
            ("k1 or k3 × token ratio", token_ratio(kl.k3)),
        )
    ),
    *(
        Row(
            REINFORCE,
            "biased: the slope of each state's forward KL, states held fixed",
            held_fixed(forward),
            kl=label,
            in_loss=f,
        )
        for label, f in (("k3", token_kl(kl.k3)), ("`forward`", lambda b: b.forward))
    ),
    Row(
        REINFORCE,
        "biased: the slope of each state's Jensen-Shannon divergence, states held fixed",
        held_fixed(jensen_shannon),
        kl="`jensen_shannon`, β = .3",
        in_loss=lambda b: b.jsd,
    ),
    Row(
        REINFORCE,
        "biased: twice the slope of each state's total variation, states held fixed",
        held_fixed(variation),
        kl="absolute",
        in_loss=token_kl(kl.absolute),
    ),
    *(
        Row(REINFORCE, "exact", kl="k1 or k3 × sequence ratio", in_loss=sequence_ratio(f))
        for f in (kl.k1, kl.k3)
    ),
    Row(REINFORCE, "exact", kl="k2 of the whole sequence", in_loss=over_sequence(kl.k2)),
    Row(REINFORCE, "exact", kl="k3", in_reward=token_kl(kl.k3), in_loss=token_kl(kl.k3)),
    Row(REINFORCE, "exact", kl="full", in_reward=full, in_loss=full),
    Row(REINFORCE, "exact", kl="full, k2", in_reward=full, in_loss=token_kl(kl.k2)),
    Row(
        "`group` with std, G = 2 (GRPO)",
        "biased: `group`'s, k3's and 1/n together",
        lambda x: score(x, (pairs(x, sign) + BETA * jnp.expm1(-x.x)) / x.length[:, None]),
        kl="k3",
        in_loss=token_kl(kl.k3),
        advantage=grouped(advantages.group, group_size=2),
        aggregate="sequence_mean",
        batch=2,
    ),
    # samples of an older policy
    Row(
        "`clip` without bounds, one token, old samples",
        "exact",
        loss=no_clip,
        length=1,
        off_policy=True,
    ),
    Row(
        "`clip` without bounds, a sequence as one token, old samples",
        "exact",
        loss=one_action(no_clip),
        advantage=whole,
        off_policy=True,
    ),
    Row(f"{IMPORTANCE}, on policy", "exact", loss=corrected()),
    Row(
        f"{IMPORTANCE} without bounds, one token, old samples",
        "exact",
        loss=corrected(high=jnp.inf),
        length=1,
        off_policy=True,
    ),
    Row(
        f"{IMPORTANCE} without bounds, a sequence as one token, old samples",
        "exact",
        loss=one_action(corrected(high=jnp.inf)),
        advantage=whole,
        off_policy=True,
    ),
    Row(
        "`clip`, one token, old samples",
        "biased: no gradient beyond the bounds",
        kept_by_clip,
        loss=token.clip,
        length=1,
        off_policy=True,
    ),
    Row(
        f"{IMPORTANCE}, one token, old samples",
        "biased: ratios held at most at 2",
        lambda x: score(x, x.to_go * jnp.minimum(x.ratio, 2)),
        loss=corrected(),
        length=1,
        off_policy=True,
    ),
    Row(
        f"{IMPORTANCE}, a sequence as one token, old samples",
        "biased: ratios held at most at 2",
        lambda x: score(x, (x.scores * jnp.minimum(jnp.prod(x.ratio, -1), 2))[:, None]),
        loss=one_action(corrected()),
        advantage=whole,
        off_policy=True,
    ),
    *(
        Row(
            f"{name} without bounds, old samples",
            OLD_STATES,
            lambda x: improvement(x, x.old),
            loss=loss,
            off_policy=True,
        )
        for name, loss in (("`clip`", no_clip), (IMPORTANCE, corrected(high=jnp.inf)))
    ),
    Row(
        "`clip`, old samples",
        "biased: TRPO's surrogate, and no gradient beyond the bounds",
        kept_by_clip,
        loss=token.clip,
        off_policy=True,
    ),
    Row(
        f"{IMPORTANCE} of sequences without bounds, old samples",
        "exact",
        loss=corrected(level="sequence", high=jnp.inf),
        advantage=whole,
        off_policy=True,
    ),
    Row(
        f"{IMPORTANCE} of sequences, old samples",
        "biased: the product of a sequence's ratios held at most at 2",
        lambda x: score(x, jnp.minimum(sequence_product(x), 2) * x.scores[:, None]),
        loss=corrected(level="sequence"),
        advantage=whole,
        off_policy=True,
    ),
    Row(
        f"{IMPORTANCE} of sequences, masked, old samples",
        "biased: sequences with a product outside of .5 to 2 are left out",
        lambda x: score(x, product_within(x) * sequence_product(x) * x.scores[:, None]),
        loss=corrected(level="sequence", rule="mask", low=0.5),
        advantage=whole,
        off_policy=True,
    ),
    Row(
        f"{IMPORTANCE} of sequences, normalised, batch of 2, old samples",
        "biased: the mean of the weights is a ratio of two estimates",
        lambda x: score(x, normalised(x) * x.scores[:, None]),
        loss=corrected(level="sequence", high=jnp.inf, normalise=True),
        advantage=whole,
        batch=2,
        off_policy=True,
    ),
    Row(
        f"{IMPORTANCE}, geometric, without bounds, old samples",
        "biased: the ratios' geometric mean for their product",
        lambda x: score(x, sequence_mean_ratio(x) * x.scores[:, None]),
        loss=corrected(level="geometric", high=jnp.inf),
        advantage=whole,
        off_policy=True,
    ),
    Row(
        f"{IMPORTANCE}, masked, old samples",
        "biased: TRPO's surrogate, ratios outside of .5 to 2 are 0",
        lambda x: score(x, x.to_go * jnp.where((x.ratio < 0.5) | (x.ratio > 2), 0, x.ratio)),
        loss=corrected(rule="mask", low=0.5),
        off_policy=True,
    ),
    Row(
        "`rejection` by the sum of k1, old samples",
        "biased: no weights, sequences with a product outside of .5 to 2 are left out",
        lambda x: score(x, product_within(x) * x.scores[:, None]),
        loss=times_mask(partial(correction.rejection, over="row_sum", low=0.5, high=2.0)),
        advantage=whole,
        off_policy=True,
    ),
    Row(
        "`off_policy_mask`, old samples",
        "biased: no weights, bad sequences are left out that have become rarer",
        kept_near,
        loss=near,
        advantage=whole,
        off_policy=True,
    ),
    Row(
        "`cispo`, old samples",
        "biased: TRPO's surrogate, ratios held at most at 1.28",
        lambda x: score(x, x.to_go * jnp.minimum(x.ratio, 1.28)),
        loss=token.cispo,
        off_policy=True,
    ),
    Row(
        "`two_sided`, ε = .5, old samples",
        "biased: TRPO's surrogate, ratios outside of .5 to 1.5 are 0",
        lambda x: score(x, x.to_go * jnp.where(jnp.abs(x.ratio - 1) > 0.5, 0, x.ratio)),
        loss=partial(token.two_sided, low=0.5, high=0.5),
        off_policy=True,
    ),
    Row(
        f"{IMPORTANCE}, old samples",
        "biased: TRPO's surrogate, ratios held at most at 2",
        lambda x: score(x, x.to_go * jnp.minimum(x.ratio, 2)),
        loss=corrected(),
        off_policy=True,
    ),
    *(
        Row(
            f"`{f.__name__}` without bounds, old samples",
            "biased: the ratios' geometric mean for their product",
            lambda x: score(x, sequence_mean_ratio(x) * x.scores[:, None]),
            loss=partial(f, low=jnp.inf, high=jnp.inf),
            advantage=whole,
            off_policy=True,
        )
        for f in ON_SEQUENCES
    ),
    Row(
        "`rloo_clip` without bounds, old samples",
        "exact",
        loss=partial(sequence.rloo_clip, low=1.0, high=jnp.inf),
        advantage=whole,
        aggregate="sequence_mean",
        off_policy=True,
    ),
    Row(
        "`rloo_clip`, old samples",
        "biased: no gradient beyond the bounds",
        kept_by_rloo_clip,
        loss=sequence.rloo_clip,
        advantage=whole,
        aggregate="sequence_mean",
        off_policy=True,
    ),
    Row(
        "`vespo`, old samples",
        "biased: Wᵏ exp(λ (1 − W)) for the product W of a sequence's ratios",
        weighed_by_vespo,
        loss=sequence.vespo,
        advantage=whole,
        off_policy=True,
    ),
    Row(
        "`gspo`, old samples",
        "biased: the ratios' geometric mean, and no gradient beyond the bounds",
        kept_by_gspo,
        loss=sequence.gspo,
        advantage=whole,
        off_policy=True,
    ),
    Row(
        "`reinforce`, old samples",
        "biased: as if the new policy had drawn them",
        lambda x: score(x, x.to_go),
        off_policy=True,
    ),
)


def logprobs(logits):
    return jax.nn.log_softmax(logits)


@cache
def free_logits():
    """(policy, parameters): a logit for every token after every prefix."""
    return logprobs, jnp.asarray(LOGITS)


def pull(policy, params, tables) -> list:
    """Gradients with respect to the table as flat gradients with respect to the parameters, by the
    chain rule.
    """
    leaves, tree = jax.tree.flatten(tables)
    return jax.tree.unflatten(tree, list(np.asarray(_pull(policy, params, np.stack(leaves)))))


@partial(jax.jit, static_argnums=0)
def _pull(policy, params, tables):
    with jax.numpy_dtype_promotion("standard"):  # the models have float32 constants
        _, back = jax.vjp(policy, params)
        return jax.vmap(
            lambda x: jnp.concatenate([jnp.ravel(g) for g in jax.tree.leaves(back(x))])
        )(tables)


def bias(estimate: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """(size relative to the truth's, angle between the two in degrees)."""
    norm = np.linalg.norm
    cos = estimate @ truth / norm(estimate) / norm(truth)
    return norm(estimate - truth) / norm(truth), np.degrees(np.arccos(np.clip(cos, -1, 1)))


def table() -> str:
    """The rows as Markdown, those that differ only in their name on one line."""
    policy, params = free_logits()
    lines = [
        "| estimator | KL | place | aggregation | expectation | size of the bias in this example |",
        "| --- " * 6 + "|",
    ]

    found = gradients(ROWS, policy(params), logprobs(OLD), logprobs(REF))

    def cells(row_and_gradients):
        row, (estimate, truth, _) = row_and_gradients
        size, angle = bias(estimate, truth)
        size = "0" if row.kind == "exact" else f"{size:.2g}, {angle:.0f}°".removeprefix("0")
        return row.kl or "none", row.place or "–", row.aggregate, row.claim, size

    for rest, rows in groupby(zip(ROWS, pull(policy, params, found), strict=True), cells):
        lines.append(
            "| " + " | ".join(["; ".join(dict.fromkeys(row.name for row, _ in rows)), *rest]) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    with jax.enable_x64(True):
        print(table())
