"""Every estimator's expected gradient against the true one, to 1e-8 in float64: see `oracle`."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import BETA, END, ROWS, VOCAB
from toys import random_params

from jaxppo import advantages, config, models, policy
from jaxppo.losses import token
from jaxppo.models import shapes
from jaxppo.types import Rollout

TOLERANCE = 1e-8
# what is called biased is off by this part of the true gradient and by these degrees
LEAST, LEAST_ANGLE = (0.02, 1.0)
PAGE = Path(__file__).parents[1] / "docs" / "estimators.md"
SHAPE = shapes.llama(
    vocab_size=VOCAB, width=8, num_layers=1, num_heads=2, num_kv_heads=1, max_length=4
)


class Tiny(NamedTuple):
    """A policy: the table of log-probs as a function of parameters; and the table there, an older
    one and the reference.
    """

    table: Callable
    params: dict | jax.Array
    tables: tuple[jax.Array, jax.Array, jax.Array]


@cache
def free_logits() -> Tiny:
    table, params = oracle.free_logits()
    return Tiny(
        table, params, (table(params), oracle.logprobs(oracle.OLD), oracle.logprobs(oracle.REF))
    )


@cache
def model():
    return models.make(SHAPE, dtype="float64")


@cache
def transformer() -> Tiny:
    """One layer; the prompt is the token END."""
    # models have float32 constants
    rng, standard = (np.random.default_rng(0), partial(jax.numpy_dtype_promotion, "standard"))
    with standard():
        noisy = lambda x: jnp.asarray(
            np.asarray(x, np.float64) + 0.5 * rng.standard_normal(x.shape)
        )
        params = jax.tree.map(noisy, random_params(model()))

    def table(params):
        # Rows of prompt, a, b: the states are those after the prompt, after a and after b.
        tokens = jnp.array([[END, a, b] for a in (0, 1) for b in (0, 1)], jnp.int32)
        with standard():
            # A model reads its embedding in float32, so no gradient goes there: it would be rounded
            # to 1e-7.
            held = {**params, "embed": jax.lax.stop_gradient(params["embed"])}
            hidden, _ = model().apply(held, tokens, jnp.ones(tokens.shape, bool))
            logits = model().logits(params, hidden)
        return oracle.logprobs(jnp.concatenate([logits[:1, 0], logits[::2, 1], logits[:, 2]]))

    return Tiny(table, params, (jax.jit(table)(params), *free_logits().tables[1:]))


both = pytest.mark.parametrize("tiny", [free_logits, transformer], ids=lambda f: f.__name__)


def measure(rows, tiny) -> list[list[np.ndarray]]:
    """For each row the estimator's expected gradient, the true one and the formula's, if there is
    one, in the parameters.
    """
    found = oracle.pull(tiny.table, tiny.params, oracle.gradients(rows, *tiny.tables))
    return [[g for g in gradients if g is not None] for gradients in found]


@cache
def measured(policy) -> dict:
    return dict(zip(ROWS, measure(ROWS, policy()), strict=True))


def check(row, estimate, truth, formula=None):
    if formula is not None:
        np.testing.assert_allclose(estimate, formula, rtol=0, atol=TOLERANCE)
    if row.kind == "exact":
        np.testing.assert_allclose(estimate, truth, rtol=0, atol=TOLERANCE)
    elif row.kind == "times":
        factor = estimate @ truth / (truth @ truth)
        np.testing.assert_allclose(estimate, factor * truth, rtol=0, atol=TOLERANCE)
        assert abs(factor - 1) > LEAST
    else:
        size, angle = oracle.bias(estimate, truth)
        assert row.kind == "biased" and size > LEAST and angle > LEAST_ANGLE


@pytest.mark.ci
@both
@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"{row.name}-{row.kl}-{row.place}-{row.aggregate}".replace("`", "")
)
def test_claim(row, tiny, x64):
    check(row, *measured(tiny)[row])


def test_every_claim_has_its_formula():
    """Only whitening has none but its definition."""
    assert [row.name for row in ROWS if row.kind != "exact" and row.expected is None] == [
        "`reinforce_plus_plus`, batch of 2"
    ]


@pytest.mark.ci
def test_a_false_claim_fails(x64):
    named = {(row.name, row.kl, row.place): row for row in ROWS}
    exact, scaled = named["`rloo`, G = 2 or 3", "", ""], named["`group` without std, G = 2", "", ""]
    biased = named["`reinforce`", "k3", "loss"]
    corrected = named["`importance` without bounds, one token, old samples", "", ""]
    discounted = named["`returns_to_go`, γ = .5", "", ""]
    # forgets the token's own reward
    late = lambda b: advantages.returns_to_go(b.rewards, b.mask, gamma=1.0) - b.rewards
    wrong_formula = lambda x: oracle.true(x, BETA) + 1e-6 * oracle.held(x, oracle.forward)
    false = (
        exact._replace(claim="2 times: no"),
        exact._replace(claim="biased: no"),
        scaled._replace(claim="exact"),
        scaled._replace(expected=oracle.times(0.51)),
        biased._replace(claim="exact"),
        biased._replace(claim="2 times: no"),
        biased._replace(expected=wrong_formula),
        corrected._replace(loss=oracle.corrected()),  # a cap that binds
        corrected._replace(length=3),
        discounted._replace(expected=lambda x: oracle.improvement(x, x.new, 0.51)),
        ROWS[0]._replace(advantage=late),
        ROWS[0]._replace(in_loss=oracle.full),
    )
    for row, gradients in zip(false, measure(false, free_logits()), strict=True):
        with pytest.raises(AssertionError):
            check(row, *gradients)


def test_the_world():
    w = oracle.world()
    assert len(w.tokens) == 15 and sorted(w.mask.sum(1)) == [1] + [2] * 2 + [3] * 12
    last = w.mask.sum(1) - 1
    ends = w.tokens[np.arange(15), last] == END
    assert (ends | (last == 2)).all() and ((w.tokens == END) * w.mask).sum() == ends.sum() == 7
    assert set(w.states[w.mask == 1]) == set(range(7))


@both
def test_the_truth(tiny, x64):
    """The sum over sequences, which is differentiated, equals the value by backward induction minus
    the expected divergence.
    """
    table, params, (new, old, ref) = tiny()
    objective = lambda new: oracle.true(oracle.exact(new, old, ref), BETA)

    @jax.jit
    def both_ways(new):
        kl_met = jnp.sum(oracle.visits(new) * oracle.reverse(new, ref))
        return objective(new), oracle.state_values(new)[0] - BETA * kl_met, jax.grad(objective)(new)

    forth, back, gradient = both_ways(new)
    np.testing.assert_allclose(forth, back, rtol=1e-12)
    # Its gradient through the table is the gradient in the parameters.
    gradient = oracle.pull(table, params, [gradient])[0]
    direct = jax.jit(jax.grad(lambda params: objective(table(params))))
    with jax.numpy_dtype_promotion("standard"):
        leaves = jax.tree.leaves(direct(params))
    np.testing.assert_allclose(
        gradient, np.concatenate([np.ravel(x) for x in leaves]), rtol=0, atol=1e-12
    )


def test_the_truth_by_central_differences(x64):
    table, logits, (new, old, ref) = free_logits()
    value = lambda step: oracle.true(oracle.exact(table(logits + step), old, ref), BETA)
    steps = 1e-5 * np.eye(logits.size).reshape(-1, *logits.shape)
    up, down, gradient = jax.jit(
        lambda h: (jax.vmap(value)(h), jax.vmap(value)(-h), jax.grad(value)(0 * h[0]))
    )(steps)
    np.testing.assert_allclose(gradient.reshape(-1), (up - down) / 2e-5, rtol=0, atol=TOLERANCE)


def test_the_scorer_has_the_same_log_probs(x64):
    """`policy.response_logprobs` of all sequences equals the transformer's table."""
    tiny, w = transformer(), oracle.world()
    mask = jnp.asarray(w.mask, jnp.float64)
    prompt = jnp.full((len(w.tokens), 1), END, jnp.int32)
    tokens = jnp.concatenate([prompt, jnp.asarray(w.tokens, jnp.int32)], 1)
    attend = jnp.concatenate([prompt == END, mask == 1], 1)
    rollout = Rollout(tokens, attend, mask, jnp.ones(len(tokens), bool), mask, mask, mask, mask)
    with jax.numpy_dtype_promotion("standard"):
        scores = jax.jit(
            partial(policy.response_logprobs, model(), config=config.Config(), with_values=False)
        )(tiny.params, rollout)
    expected = tiny.tables[0][w.states, w.tokens]
    np.testing.assert_allclose(scores.logprobs * mask, expected * mask, rtol=1e-12)


@pytest.mark.parametrize("loss", [token.reinforce, token.clip])
@pytest.mark.parametrize("baseline", [False, True])
def test_two_states_two_actions_by_hand(loss, baseline, x64):
    """∂J/∂z(s, a) = d(s) π(a|s) (Q(s, a) − V(s)), with V as baseline or without."""
    p, q = jnp.array([[0.6, 0.4], [0.5, 0.5]]), jnp.array([[0.8, 0.3], [0.4, 0.4]])
    # V = .6 · .8 + .4 · .3 = .6 and .5 · .4 + .5 · .4 = .4; d = .5 for both
    #   .5 · .6 · (.8 − .6) = .06    .5 · .4 · (.3 − .6) = −.06    .5 · .5 · (.4 − .4) = 0, twice
    expected = [[0.06, -0.06], [0.0, 0.0]]
    a = q - jnp.sum(p * q, -1, keepdims=True) if baseline else q
    prob = 0.5 * p  # of each state and action, a constant

    def objective(logits):
        logprobs = jax.nn.log_softmax(logits)
        per_token, _ = loss(logprobs, jax.lax.stop_gradient(logprobs), a, jnp.ones_like(a))
        return -jnp.sum(prob * per_token)

    # J itself, Q held fixed: ½ Σ π Q
    value = lambda logits: jnp.sum(0.5 * jax.nn.softmax(logits) * q)
    found = jax.jit(lambda z: (jax.grad(objective)(z), jax.grad(value)(z)))(jnp.log(p))
    np.testing.assert_allclose(found, [expected, expected], atol=1e-15)


def test_the_documentation_has_the_table(x64):
    text = PAGE.read_text(encoding="utf-8")
    found = text.partition("<!-- oracle -->")[2].partition("<!-- /oracle -->")[0]
    assert found.strip() == oracle.table(), "run `python tests/oracle.py` and paste"
