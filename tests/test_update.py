from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from toys import SETTINGS

from jaxppo import aggregate, algorithms, kl, ppo, update
from jaxppo.errors import UserError
from jaxppo.losses import correction, token
from jaxppo.losses.value import value_clipped
from jaxppo.types import Batch

KEY = jax.random.key(3)


# Dealing rows to minibatches


@pytest.mark.parametrize(("minibatches", "blocks"), [(1, 1), (1, 4), (4, 1), (3, 5)])
def test_deal_is_fair(minibatches, blocks):
    units = minibatches * blocks
    for dealt in jax.vmap(lambda key: update.minibatch_units(key, units, minibatches))(
        jax.random.split(KEY, 20)
    ):
        assert dealt.shape == (minibatches, blocks)
        assert sorted(dealt.ravel().tolist()) == list(range(units))  # every unit once
        assert (
            dealt // minibatches == jnp.arange(blocks)[None]
        ).all()  # one of each block to each minibatch


def test_deal_is_the_same_on_one_device_and_on_two():
    whole = update.minibatch_units(KEY, 24, 4)
    halves = [update.minibatch_units(KEY, 12, 4, first_block=3 * d) + 12 * d for d in range(2)]
    np.testing.assert_array_equal(whole, jnp.concatenate(halves, 1))


def test_deal_differs_between_epochs():
    one, other = (update.minibatch_units(key, 24, 4) for key in jax.random.split(KEY))
    assert (one != other).any()


def test_deal_differs_between_blocks():
    offsets = np.asarray(update.minibatch_units(KEY, 60, 6)) % 6
    assert len({tuple(column) for column in offsets.T}) > 1


# The loss


@pytest.fixture(scope="module")
def batch(llama):
    """Rollouts of another policy, so that ratios and clipped values are not 1 and 0; rows 2 is
    invalid.
    """
    behaviour = llama._replace(params=toys.random_params(llama.model, seed=4))
    rolled = toys.roll(behaviour, toys.prompts())
    rng = np.random.default_rng(0)
    valid = jnp.arange(8) != 2
    random = lambda: jnp.asarray(rng.standard_normal((8, 5)), jnp.float32)
    return Batch(
        rolled, rolled.mask * valid[:, None], rolled.logprobs, random(), rolled.values + random()
    )


def loss_of(llama, settings=SETTINGS, **changes):
    loss = one_loss(llama, settings, **changes)
    return jax.jit(lambda params, batch: jax.value_and_grad(loss, has_aux=True)(params, batch))


def one_loss(llama, settings, **changes):
    """loss(params, batch) of one whole minibatch, with the means of its metrics."""
    parts = toys.parts(settings, **changes)
    loss = update.make_loss(llama.model, parts, settings)

    def run(params, batch, fixed=None):
        fixed = fixed or update.LossConstants({})
        total, (sums, logprobs) = loss(params, fixed, parts.aggregate(batch.mask), batch, KEY)
        return total, update.token_means(sums, logprobs, batch, settings, None)

    return run


@pytest.fixture(scope="module")
def loss(llama):
    return loss_of(llama)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"entropy_coef": 0.3, "value_coef": 0.7}, {}),
        (
            {"aggregate": "sequence_mean", "value_loss": "none", "off_policy_threshold": 0.4},
            {"correction": correction.importance},
        ),
    ],
)
def test_loss_is_the_sum_of_its_parts(llama, batch, changes, parts):
    settings = replace(SETTINGS, **changes)
    scores = toys.score(llama, batch.rollout)
    mask = batch.mask
    per_token, _ = token.clip(scores.logprobs, batch.old_logprobs, batch.advantages, mask)
    if parts:
        # old_logprobs are the sampler's own: the correction is 1 unless they differ
        batch = batch.replace(rollout=batch.rollout.replace(logprobs=batch.old_logprobs + 0.5))
        batch = update.weigh(batch, toys.parts(settings, **parts), settings, None)
        near = correction.off_policy_mask(
            scores.logprobs, batch.rollout.logprobs, batch.advantages, mask, threshold=0.4
        )
        assert 0 < near.sum() < mask.sum()
        per_token = per_token * np.exp(-0.5) * near
    weights = getattr(aggregate, settings.aggregate)(mask)
    want = (weights * (per_token - settings.entropy_coef * scores.entropy)).sum()
    if settings.value_loss != "none":
        value = value_clipped(scores.values, batch.rollout.values, batch.returns, eps=0.2)
        want += settings.value_coef * (weights * value).sum()
    (got, metrics), _ = loss_of(llama, settings, **parts)(llama.params, batch)
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    assert ("weight" in metrics) == bool(parts)
    assert ("value_loss" in metrics) == (settings.value_loss != "none")
    assert float(metrics["entropy"]) == pytest.approx(
        float((scores.entropy * mask).sum() / mask.sum()), rel=1e-5
    )


def test_what_is_masked_changes_nothing(llama, batch, loss):
    """An invalid row and all padding hold other tokens, NaN and large numbers: loss, metrics and
    gradients stay.
    """
    off = batch.mask == 0
    rolled = batch.rollout
    tokens = rolled.tokens.at[2, 4:].set(jnp.array([9, 2, 9, 2, 9]))
    other = batch.replace(
        rollout=rolled.replace(tokens=tokens, values=jnp.where(off, 1e3, rolled.values)),
        old_logprobs=jnp.where(off, jnp.nan, batch.old_logprobs),
        advantages=jnp.where(off, jnp.nan, batch.advantages),
        returns=jnp.where(off, -1e3, batch.returns),
    )
    toys.assert_close(loss(llama.params, other), loss(llama.params, batch), atol=1e-6)


def test_a_masked_row_is_as_good_as_none(llama, batch, loss):
    keep = jnp.array([0, 1, 3, 4, 5, 6, 7])
    without = jax.tree.map(lambda x: x[keep], batch)
    toys.assert_close(loss(llama.params, without), loss(llama.params, batch), atol=1e-6)


def test_an_empty_batch_has_no_loss_and_no_gradient(llama, batch, loss):
    (total, metrics), grads = loss(llama.params, batch.replace(mask=jnp.zeros_like(batch.mask)))
    assert float(total) == 0
    assert all(float(x) == 0 for x in jax.tree.leaves(metrics))
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads))


def test_gradient_of_the_loss_against_differences(llama, batch, loss):
    """Along the gradient with some noise, by central differences."""
    (_, _), grads = loss(llama.params, batch)
    rng = np.random.default_rng(1)
    norm = float(optax.tree.norm(grads))
    direction = jax.tree.map(
        lambda g: g / norm + jnp.asarray(0.01 * rng.standard_normal(g.shape), jnp.float32), grads
    )
    at = lambda e: float(
        loss(jax.tree.map(lambda x, d: x + e * d, llama.params, direction), batch)[0][0]
    )
    slope = sum(
        float((g * d).sum())
        for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True)
    )
    assert (at(2e-3) - at(-2e-3)) / 4e-3 == pytest.approx(slope, rel=0.01)


@pytest.mark.ci
def test_a_batch_is_weighed_once(batch):
    """Tokens beyond the bounds leave the mask; importance weights times the mask of the highest
    entropies, both of what is left.
    """
    settings = replace(SETTINGS, top_entropy=0.5, correction="truncated", rejection="token_k1")
    settings = replace(settings, rejection_high=1.5)
    entropy, even = jnp.arange(40.0).reshape(8, 5), jnp.arange(5)[None] % 2 == 0
    sampler = batch.old_logprobs + jnp.where(even, -0.3, -0.6)
    rolled = batch.rollout.replace(entropy=entropy, logprobs=sampler)
    found = update.weigh(batch.replace(rollout=rolled), toys.parts(settings), settings, None)
    kept = batch.mask * even  # e^.3 = 1.35, e^.6 = 1.82
    np.testing.assert_array_equal(found.mask, kept)
    top = kept * (entropy >= jnp.median(entropy[kept > 0]))
    np.testing.assert_allclose(found.weights, top * np.exp(0.3), rtol=1e-5)
    # statistics of the whole batch, on any number of devices
    settings = replace(settings, correction_normalise=True)
    run = lambda axis_name: lambda b: update.weigh(b, toys.parts(settings), settings, axis_name)
    rows = batch.replace(rollout=rolled)
    halves = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), rows)
    halves = jax.vmap(run("d"), axis_name="d")(halves)
    toys.assert_close(halves.weights.reshape(8, 5), run(None)(rows).weights, rtol=1e-5)
    plain = update.weigh(batch, toys.parts(), SETTINGS, None)
    assert plain.weights is None and plain.mask is batch.mask


@pytest.mark.ci
def test_tokens_are_left_out_in_either_layout(llama, state, batch):
    """A response with gaps in its mask is scored whole."""
    settings = replace(SETTINGS, rejection="token_k1", rejection_low=0.7, rejection_high=1.4)
    sampler = batch.old_logprobs + jnp.where(jnp.arange(5)[None] == 1, 1.0, 0.1)
    rows = batch.replace(rollout=batch.rollout.replace(logprobs=sampler))
    kept = update.weigh(rows, toys.parts(settings), settings, None).mask
    gaps = (kept[:, :-2] > 0) & (kept[:, 1:-1] == 0) & (kept[:, 2:] > 0)
    assert gaps.any()
    rejected = float(1 - kept.sum() / rows.mask.sum())
    found = []
    for layout in ("packed", "dense"):
        own = replace(settings, layout=layout)
        run = jax.jit(update.make_update(llama.model, toys.parts(own), own))
        new, metrics = run(state, rows, KEY)
        found.append((new.params, metrics))
        assert float(metrics["rejected"]) == pytest.approx(rejected, abs=1e-6)
    toys.assert_close(*found, atol=1e-5, rtol=1e-4)


# The whole update


@pytest.fixture(scope="module")
def run(llama):
    return jax.jit(update.make_update(llama.model, toys.parts(), SETTINGS))


@pytest.fixture(scope="module")
def state(llama):
    return ppo.init_state(
        SETTINGS, llama.params, {"base": {}, "reference": None, "reward": {}}, jax.random.key(0)
    )


def adam(state):
    return next(
        x
        for x in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(x, "mu")
    )


def test_update_makes_epochs_times_minibatches_steps(run, state, batch):
    new, metrics = run(state, batch, KEY)
    assert int(adam(new).count) == 4  # 2 epochs of 2
    assert float(metrics["skipped"]) == 0
    assert all(np.isfinite(x) for x in metrics.values())
    toys.assert_same(run(state, batch, KEY), (new, metrics))
    other, _ = run(state, batch, jax.random.key(4))
    assert (
        other.params["value"]["kernel"] != new.params["value"]["kernel"]
    ).any()  # dealt in another way


def test_first_ratio_off_is_that_of_the_first_minibatch(run, state, batch, llama):
    """Old log-probs that are .1 lower everywhere: e^.1 − 1 on the first minibatch, whatever comes
    later.
    """
    own = batch.replace(old_logprobs=toys.score(llama, batch.rollout).logprobs)
    assert float(run(state, own, KEY)[1]["first_ratio_off"]) < 1e-4
    lower = own.replace(old_logprobs=own.old_logprobs - 0.1)
    assert float(run(state, lower, KEY)[1]["first_ratio_off"]) == pytest.approx(
        np.expm1(0.1), rel=1e-3
    )


def test_one_non_finite_minibatch_is_skipped(run, state, batch):
    """Row 0 is in one of two minibatches of each epoch."""
    bad = batch.replace(advantages=batch.advantages.at[0].set(jnp.inf))
    new, metrics = run(state, bad, KEY)
    assert float(metrics["skipped"]) == 2
    assert int(adam(new).count) == 2
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(toys.numbers((new, metrics))))
    assert (
        new.params["value"]["kernel"] != state.params["value"]["kernel"]
    ).any()  # the good ones counted


def test_all_non_finite_changes_nothing(run, state, batch):
    new, metrics = run(state, batch.replace(advantages=jnp.full((8, 5), jnp.nan)), KEY)
    toys.assert_same(new, state)
    assert float(metrics["skipped"]) == 4
    assert all(np.isfinite(x) for x in metrics.values())


def test_a_minibatch_without_rows_changes_nothing(run, state, batch):
    """Every reward invalid: the gradient is 0, but the moments of earlier updates would move the
    parameters yet.
    """
    moving, metrics = run(state, batch, KEY)
    assert float(metrics["empty"]) == 0
    new, metrics = run(moving, batch.replace(mask=jnp.zeros_like(batch.mask)), KEY)
    toys.assert_same(new, moving)
    assert float(metrics["empty"]) == 4 and float(metrics["skipped"]) == 0
    assert all(np.isfinite(x) for x in metrics.values())


@pytest.mark.ci
def test_a_non_finite_gradient_of_a_finite_loss_is_skipped(llama, state, batch):
    """d √x / dx at 0 is infinite."""

    def policy_loss(logprobs, old_logprobs, advantages, mask, *, key=None):
        return jnp.sqrt(0 * logprobs), {}

    settings = replace(SETTINGS, epochs=1, minibatches=1)
    run = jax.jit(
        update.make_update(llama.model, toys.parts(settings, policy_loss=policy_loss), settings)
    )
    new, metrics = run(state, batch, KEY)
    assert float(metrics["skipped"]) == 1
    toys.assert_same(new, state)


@pytest.mark.ci
def test_a_non_finite_loss_with_a_finite_gradient_is_skipped(llama, state, batch):
    def policy_loss(logprobs, old_logprobs, advantages, mask, *, key=None):
        return 0 * logprobs + jnp.inf, {}

    settings = replace(SETTINGS, epochs=1, minibatches=1)
    parts = toys.parts(settings, policy_loss=policy_loss)
    new, metrics = jax.jit(update.make_update(llama.model, parts, settings))(state, batch, KEY)
    assert float(metrics["skipped"]) == 1 and np.isfinite(metrics["grad_norm"])
    toys.assert_same(new, state)


@pytest.mark.ci
def test_two_devices_equal_one(llama, run, state, batch):
    """Halves of the batch under an axis: gradients are summed, weights know the global count, rows
    are dealt alike. And with no row of the second half to learn from.
    """
    parallel = update.make_update(llama.model, toys.parts(), SETTINGS, axis_name="devices")
    split = jax.jit(jax.vmap(lambda b: parallel(state, b, KEY), axis_name="devices"))
    for mask in (batch.mask, batch.mask.at[4:].set(0.0)):
        whole = batch.replace(mask=mask)
        two, metrics = split(jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), whole))
        one, want = run(state, whole, KEY)
        for d in range(2):
            toys.assert_close(jax.tree.map(lambda x: x[d], two.params), one.params, atol=2e-6)
            toys.assert_close({k: x[d] for k, x in metrics.items()}, want, atol=1e-5, rtol=1e-4)


@pytest.mark.ci
def test_the_likelihood_term_is_a_mean_over_right_answers(llama, state, batch):
    """Of all devices, and whatever the number of parts: rows 1, 3 and 6 have a score above .5 (so
    has row 2, which is invalid).
    """
    settings = replace(SETTINGS, epochs=1, minibatches=1, microbatches=2, lr=0.0)
    scores = jnp.array([0.0, 1.0, 1.0, 0.6, 0.5, -1.0, 2.0, 0.4])
    rows = batch.replace(scores=scores)
    with_term = replace(settings, likelihood_coef=0.3, likelihood_threshold=0.5)

    def loss(settings, axis_name=None):
        run = update.make_update(llama.model, toys.parts(settings), settings, axis_name=axis_name)
        if axis_name is None:
            return jax.jit(lambda b: run(state, b, KEY)[1]["loss"])(rows)
        halves = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), rows)
        return jax.jit(jax.vmap(lambda b: run(state, b, KEY)[1]["loss"], axis_name="d"))(halves)[0]

    logprobs, right = (
        toys.score(llama, batch.rollout).logprobs,
        batch.mask * (scores > 0.5)[:, None],
    )
    assert right[jnp.array([1, 3, 6])].any(1).all() and not right[2].any()
    want = loss(settings) - 0.3 * (right * logprobs).sum() / right.sum()
    np.testing.assert_allclose(loss(with_term), want, rtol=1e-5)
    np.testing.assert_allclose(loss(with_term, "d"), want, rtol=1e-5)


@pytest.mark.ci
def test_groups_stay_together(llama, state, batch):
    """Each row's advantage is its group's number; in a minibatch neighbours have the same."""
    settings = replace(SETTINGS, group_size=2, epochs=1)
    groups = jnp.broadcast_to((jnp.arange(8) // 2)[:, None], (8, 5)).astype(jnp.float32)

    def policy_loss(logprobs, old_logprobs, advantages, mask, *, key=None):
        apart = (advantages[0::2] != advantages[1::2]).repeat(2, 0).astype(jnp.float32)
        return 0 * logprobs, {"apart": apart, "number": advantages}

    run = jax.jit(
        update.make_update(llama.model, toys.parts(settings, policy_loss=policy_loss), settings)
    )
    _, metrics = run(state, batch.replace(advantages=groups, mask=jnp.ones((8, 5))), KEY)
    assert float(metrics["apart"]) == 0
    assert float(metrics["number"]) == pytest.approx(1.5)  # every group came once


@pytest.mark.ci
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"group_size": 2, "aggregate": "sequence_mean"},
        {"group_size": 4, "layout": "dense"},  # two rows each, of groups of four
    ],
    ids=str,
)
def test_microbatches_change_nothing(llama, state, batch, changes):
    """Rows of different lengths in each: a mean of means would differ."""
    one, four = (replace(SETTINGS, minibatches=1, microbatches=n, **changes) for n in (1, 4))
    runs = [
        jax.jit(update.make_update(llama.model, toys.parts(c), c))(state, batch, KEY)
        for c in (one, four)
    ]
    toys.assert_close(runs[0][0].params, runs[1][0].params, atol=2e-6)
    toys.assert_close(runs[0][1], runs[1][1], atol=1e-5, rtol=1e-4)


def test_dense_microbatches_are_equally_large(llama, state, batch):
    """`validate` does not know which networks pack their rows. Minibatches have 4 rows."""
    settings = replace(SETTINGS, microbatches=3, layout="dense")
    step = update.make_update(llama.model, toys.parts(settings), settings)
    with pytest.raises(UserError, match="--microbatches 3 does not divide the 4 rows"):
        jax.eval_shape(step, state, batch, KEY)


@pytest.mark.ci
def test_each_microbatch_has_its_own_noise(llama, state, batch):
    """A loss that draws one number: of four microbatches there are four, so they have a
    variance.
    """
    settings = replace(SETTINGS, epochs=1, minibatches=1, microbatches=4, layout="dense")

    def policy_loss(logprobs, old_logprobs, advantages, mask, *, key=None):
        drawn = jnp.full_like(mask, jax.random.uniform(key))
        return 0 * logprobs, {"drawn": drawn, "square": drawn**2}

    parts = toys.parts(settings, policy_loss=policy_loss)
    _, metrics = jax.jit(update.make_update(llama.model, parts, settings))(state, batch, KEY)
    assert float(metrics["square"]) - float(metrics["drawn"]) ** 2 > 0.001


# The KL in the loss


KL_SETTINGS = replace(SETTINGS, kl_place="loss", kl="k3", value_loss="none", kl_coef=0.3)


@pytest.mark.ci
@pytest.mark.parametrize("importance", [False, True])
def test_kl_in_the_loss(llama, batch, importance):
    """Σ w (per_token + β k3), and with importance k3 times the ratio."""
    settings = replace(KL_SETTINGS, kl_importance=importance)
    ref = batch.rollout.raw_logprobs - 0.2
    batch = batch.replace(rollout=batch.rollout.replace(ref_logprobs=ref))
    make = one_loss(llama, settings)
    total, metrics = make(llama.params, batch, update.LossConstants({}, kl_coef=0.3))
    scores, mask = toys.score(llama, batch.rollout), batch.mask
    term = kl.k3(scores.raw_logprobs, ref) * (
        jnp.exp(scores.logprobs - batch.old_logprobs) if importance else 1.0
    )
    per_token, _ = token.clip(scores.logprobs, batch.old_logprobs, batch.advantages, mask)
    want = (aggregate.token_mean(mask) * (per_token + 0.3 * term)).sum()
    assert float(total) == pytest.approx(float(want), rel=1e-5)
    assert float(metrics["kl_loss"]) == pytest.approx(
        float((term * mask).sum() / mask.sum()), rel=1e-5
    )


def test_full_kl_in_the_loss_is_exact(llama, batch):
    settings = replace(KL_SETTINGS, kl="full")
    other = toys.random_params(llama.model, seed=8)
    make = one_loss(llama, settings)
    _, metrics = make(llama.params, batch, update.LossConstants({}, reference=other, kl_coef=0.3))

    def logits(params):
        hidden, _ = llama.model.apply(params, batch.rollout.tokens, batch.rollout.attend)
        return llama.model.logits(params, hidden[:, 3:-1])

    want = kl.full(logits(llama.params), logits(other)) * batch.mask
    assert float(metrics["kl_loss"]) == pytest.approx(
        float(want.sum() / batch.mask.sum()), rel=1e-5
    )
    zero = make(llama.params, batch, update.LossConstants({}, reference=llama.params, kl_coef=0.3))[
        1
    ]
    assert float(zero["kl_loss"]) == pytest.approx(0, abs=1e-6)


def test_beta_comes_from_the_controller(llama, batch):
    settings = replace(SETTINGS, loss="kl_penalty", value_loss="none")
    make = one_loss(llama, settings)
    at = lambda beta: float(make(llama.params, batch, update.LossConstants({}, beta=beta))[0])
    scores = toys.score(llama, batch.rollout)
    d = scores.logprobs - batch.old_logprobs
    pull = (aggregate.token_mean(batch.mask) * (jnp.expm1(d) - d)).sum()
    assert at(2.0) - at(0.5) == pytest.approx(1.5 * float(pull), rel=1e-4)


# Early stop and the critic alone


@pytest.mark.ci
def test_kl_stop_leaves_out_the_rest(llama, state, batch):
    """A large rate: after the first minibatch the policy is far off, so the other three of two
    epochs are left out.
    """
    settings = replace(SETTINGS, lr=0.1, lr_schedule="constant", kl_stop=0.01, layout="dense")
    own = batch.replace(old_logprobs=toys.score(llama, batch.rollout).logprobs)
    fresh = ppo.init_state(settings, llama.params, state.frozen, jax.random.key(0))
    watched = jax.jit(update.make_update(llama.model, toys.parts(settings), settings))
    stopped, metrics = watched(fresh, own, KEY)
    assert float(metrics["stopped"]) == 3
    assert int(adam(stopped).count) == 1
    assert float(metrics["skipped"]) == 0
    # it is the state after one minibatch: a bound that is never reached goes on from there
    free = replace(settings, kl_stop=1e9, lr=0.01)  # two programs, whose rounding Adam scales
    on, metrics = jax.jit(update.make_update(llama.model, toys.parts(free), free))(fresh, own, KEY)
    assert float(metrics["stopped"]) == 0
    assert int(adam(on).count) == 4
    assert (on.params["value"]["kernel"] != stopped.params["value"]["kernel"]).any()
    never = replace(free, kl_stop=0.0)
    plain, _ = jax.jit(update.make_update(llama.model, toys.parts(never), never))(fresh, own, KEY)
    toys.assert_close(plain.params, on.params, atol=1e-6)


@pytest.mark.ci
def test_how_far_the_step_went_includes_what_stopped_it(llama, state, batch):
    """All of the second epoch is left out, and half of the first: the minibatch that tripped is the
    last that was measured.
    """
    settings = replace(SETTINGS, lr=0.1, lr_schedule="constant", kl_stop=0.01)
    own = batch.replace(old_logprobs=toys.score(llama, batch.rollout).logprobs)
    fresh = ppo.init_state(settings, llama.params, state.frozen, jax.random.key(0))
    _, metrics = jax.jit(update.make_update(llama.model, toys.parts(settings), settings))(
        fresh, own, KEY
    )
    assert (
        float(metrics["stopped"]) == 3 and float(metrics["last_approx_kl"]) > 0.005
    )  # the mean with the first, which is at 0


def test_how_far_the_step_went_leaves_out_what_was_empty():
    """.2 of the last epoch, whose other minibatch had no rows."""
    zero = jnp.zeros((2, 2))
    found = {"approx_kl": jnp.array([[0.4, 0.4], [0.2, 0.0]]), "skipped": zero, "stopped": zero}
    found |= {"empty": zero.at[1, 1].set(1.0)}
    assert float(update._last_approx_kl(found)) == pytest.approx(0.2)


def test_an_update_says_how_many_updates_it_was(run, state, batch):
    assert float(run(state, batch, KEY)[1]["updates"]) == SETTINGS.epochs * SETTINGS.minibatches


@pytest.mark.ci
def test_in_the_warm_up_the_critic_alone_learns(llama, state, batch):
    settings = replace(SETTINGS, critic_warmup=3, optimizer="adamw", weight_decay=0.5)
    run = jax.jit(update.make_update(llama.model, toys.parts(settings), settings))
    fresh = ppo.init_state(settings, llama.params, state.frozen, jax.random.key(0))
    for step, moves in ((2, {"value"}), (3, set(llama.params))):
        new, _ = run(fresh.replace(step=jnp.int32(step)), batch, KEY)
        changed = {
            name
            for name, x in new.params.items()
            if any(
                (a != b).any()
                for a, b in zip(
                    jax.tree.leaves(x), jax.tree.leaves(llama.params[name]), strict=True
                )
            )
        }
        assert changed == moves
        moments = {
            path[0].key for path, x in jax.tree_util.tree_leaves_with_path(adam(new).mu) if x.any()
        }
        assert moments == moves  # nothing of the policy's gradients waits in the optimizer


@pytest.mark.slow  # every preset's loss runs in test_presets.py
@pytest.mark.parametrize("name", algorithms.POLICY_LOSSES)
def test_every_policy_loss_goes_through_the_update(llama, state, batch, name):
    settings = replace(SETTINGS, loss=name, epochs=1)
    new, metrics = jax.jit(update.make_update(llama.model, toys.parts(settings), settings))(
        state, batch, KEY
    )
    assert float(metrics["skipped"]) == 0
    assert (new.params["embed"]["embedding"] != state.params["embed"]["embedding"]).any()


@pytest.mark.ci
def test_an_update_that_is_not_finite_is_skipped_though_its_gradient_is(llama):
    """Adam with eps 0 divides the gradient of an unused value head, 0, by its moment, 0."""
    settings = replace(toys.SETTINGS, adam_eps=0.0, value_loss="none", advantage="returns")
    state = toys.state(llama, settings)
    before = toys.copied(state.params)
    new, metrics = toys.step(llama, settings)(state, toys.prompts())
    assert float(metrics["skipped"]) == 4  # every minibatch: 2 epochs of 2
    toys.assert_same(new.params, before)
