"""The train step with its options: groups, greedy baselines, masks, shaping, KL elsewhere.
`test_ppo.py` has the plain one.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo import kl, policy, ppo, sampling
from jaxppo.errors import UserError
from jaxppo.models import int8, lora
from jaxppo.rewards.in_program import count_token
from jaxppo.types import Rollout

SETTINGS = replace(toys.SETTINGS, layout="dense")  # `test_layouts.py` has packed rows
PROMPTS = toys.prompts()


class Seen(NamedTuple):
    """What the advantage estimator was given and gave."""

    rewards: jax.Array
    scores: jax.Array
    rollout: Rollout
    learn: jax.Array
    advantages: jax.Array


def watched(toy, settings, *, reward=None, **changes):
    """A compiled step whose estimator leaves what it saw among the statistics: no callback, so the
    program can be cached.
    """
    changes |= {"reward": reward} if reward else {}
    inner = toys.parts(settings, **changes).advantage

    def advantage(rewards, scores, rollout, *, valid, statistics, axis_name):
        adv, returns, statistics = inner(
            rewards, scores, rollout, valid=valid, statistics=statistics, axis_name=axis_name
        )
        return adv, returns, {**statistics, "seen": Seen(rewards, scores, rollout, valid, adv)}

    step = toys.step(toy, settings, **changes, advantage=advantage)

    def run(state, prompts=PROMPTS):
        state, metrics = step(state, prompts)
        return state.statistics["seen"], state, metrics

    return run


def other(toy):
    return {"base": {}, "reference": toys.random_params(toy.model, seed=5), "reward": {}}


@pytest.mark.ci
def test_remax_rolls_out_greedily_in_the_same_program(llama):
    settings = replace(SETTINGS, advantage="remax", value_loss="none", kl_coef=0.0)
    (_, scores, rolled, _, adv), _, _ = watched(llama, settings)(toys.state(llama, settings))
    greedy = toys.roll(llama, PROMPTS, settings, greedy=True)
    want = ((greedy.response == 3) * greedy.mask).sum(1)
    np.testing.assert_allclose(rolled.extra["greedy_scores"], want)
    np.testing.assert_allclose(
        adv, (scores - want)[:, None] * rolled.mask, atol=1e-6
    )  # the score comes last: to-go is all of it


def even_prompts_are_alike(params, rollout):
    """Groups of prompts with an even last token cannot differ: their reward is 1 for all. Others
    have a sum of token ids.
    """
    even = rollout.tokens[:, 3] % 2 == 0
    total = (rollout.response * (rollout.mask > 0)).sum(1).astype(jnp.float32)
    return jnp.where(even, 1.0, total), jnp.ones(even.shape, bool)


def grouped(rows):
    """Groups of two copies of prompts whose last token counts up."""
    last = 2 + jnp.arange(rows // 2, dtype=jnp.int32).repeat(2) % 8
    tokens = jnp.concatenate([jnp.full((rows, 3), 2, jnp.int32), last[:, None]], 1)
    return PROMPTS.replace(tokens=tokens, mask=tokens > 0, index=jnp.arange(rows, dtype=jnp.int32))


GROUPED = replace(
    SETTINGS, advantage="group", group_size=2, value_loss="none", filter_groups=True, kl_coef=0.0
)


@pytest.mark.ci
def test_groups_that_teach_nothing_leave_the_loss_and_its_denominators(llama):
    # dense: a loss sees the mask of the whole minibatch
    settings = replace(GROUPED, epochs=1, minibatches=1, layout="dense")

    def policy_loss(logprobs, old_logprobs, advantages, mask, *, key=None):
        return 0 * logprobs, {"tokens": jnp.broadcast_to(mask.sum(), mask.shape)}

    step = watched(llama, settings, reward=even_prompts_are_alike, policy_loss=policy_loss)
    (_, scores, rolled, learn, adv), state, metrics = step(toys.state(llama, settings), grouped(8))
    differ = np.repeat(scores[0::2] != scores[1::2], 2)
    assert 0 < differ.sum() < 8
    np.testing.assert_array_equal(learn, differ)
    assert float(metrics["informative"]) == pytest.approx(differ.mean())
    assert not adv[~differ].any()
    assert float(metrics["tokens"]) == float(
        (rolled.mask * differ[:, None]).sum()
    )  # the loss's mask, and so its weights
    assert float(metrics["reward"]) == pytest.approx(float(scores.mean()))  # of all rollouts
    assert int(state.cursor) == 4
    assert int(state.counters["invalid_rows"]) == 0  # they are not faulty


@pytest.mark.ci
def test_oversampling_keeps_the_first_informative_groups(llama):
    """Prompts with an even last token teach nothing; of 8 groups the kept 4 begin with those that
    do, in their order.
    """
    settings = replace(GROUPED, oversample=2)
    assert settings.rows == 16
    step = watched(llama, settings, reward=even_prompts_are_alike)
    (_, scores, rolled, learn, _), state, metrics = step(toys.state(llama, settings), grouped(16))
    assert rolled.tokens.shape[0] == 8
    useful = scores[0::2] != scores[1::2]
    assert useful[0]
    np.testing.assert_array_equal(np.sort(useful)[::-1], useful)
    np.testing.assert_array_equal(learn, np.repeat(useful, 2))
    last = rolled.tokens[0::2, 3]
    assert (last[useful] % 2 == 1).all()
    assert (np.diff(last[useful]) > 0).all()  # the prompts count up
    assert float(metrics["informative"]) * 8 >= useful.sum()  # the share among all that were made
    assert int(state.cursor) == 8  # prompts are consumed twice as fast


@pytest.mark.ci
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="critic"),
        pytest.param(
            {"value_loss": "none", "advantage": "rloo", "group_size": 2},
            id="none",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_bad_minibatch_of_two_makes_no_barren_step(llama, changes):
    """Whether there is a critic or not. Row 0 is in one of two minibatches."""
    settings = replace(SETTINGS, **changes, epochs=1, minibatches=2)
    reward = lambda params, rolled: (jnp.arange(8.0), jnp.ones(8, bool))
    inner = toys.parts(settings, reward=reward).advantage

    def advantage(*args, **options):
        adv, returns, statistics = inner(*args, **options)
        return adv.at[0].set(jnp.nan), returns, statistics

    state, metrics = toys.step(llama, settings, reward=reward, advantage=advantage)(
        toys.state(llama, settings), PROMPTS
    )
    assert float(metrics["skipped"]) == 1 and int(state.counters["barren_steps"]) == 0
    assert "updates" not in metrics
    every = lambda *args, **options: (
        inner(*args, **options)[0] * jnp.nan,
        *inner(*args, **options)[1:],
    )
    state, metrics = toys.step(llama, settings, reward=reward, advantage=every)(
        toys.state(llama, settings), PROMPTS
    )
    assert float(metrics["skipped"]) == 2 and int(state.counters["barren_steps"]) == 1


@pytest.mark.ci
def test_remax_compares_on_one_scale(llama):
    """With the scores' deviation 1 / s: advantages are s times those without; each with a scale of
    its own would not be.
    """
    settings = replace(SETTINGS, advantage="remax", value_loss="none", kl_coef=0.0)
    seen = {}
    for norm in ("none", "batch"):
        own = replace(settings, reward_norm=norm)
        seen[norm], _, _ = watched(llama, own)(toys.state(llama, own))
    plain, scaled = seen["none"], seen["batch"]
    spread = float(np.asarray(plain.scores).std())
    np.testing.assert_allclose(scaled.advantages * spread, plain.advantages, atol=1e-4)


@pytest.mark.ci
def test_invalid_rewards_are_counted_before_groups_are_chosen(llama):
    """Of 8 groups the first 4 have a row that is invalid; the 4 that are kept have none."""
    settings = replace(GROUPED, oversample=2)

    def reward(params, rolled):
        number = jnp.arange(16)
        return (number % 2).astype(jnp.float32), ~((number < 8) & (number % 2 == 0))

    step = watched(llama, settings, reward=reward)
    (_, _, _, learn, _), state, metrics = step(toys.state(llama, settings), grouped(16))
    assert learn.all() and float(metrics["invalid_rows"]) == 4 == int(
        state.counters["invalid_rows"]
    )


@pytest.mark.ci
def test_groups_that_are_filtered_stay_where_they_are(llama):
    """So that minibatches hold the same rows on any number of devices."""
    plain, _, _ = watched(
        llama, replace(GROUPED, filter_groups=False), reward=even_prompts_are_alike
    )(toys.state(llama, GROUPED), grouped(8))
    left, _, _ = watched(llama, GROUPED, reward=even_prompts_are_alike)(
        toys.state(llama, GROUPED), grouped(8)
    )
    np.testing.assert_array_equal(left.rollout.tokens, plain.rollout.tokens)
    assert not left.learn.all() and plain.learn.all()


EIGHT = replace(SETTINGS, old_logprobs="scorer", decode_dtype="int8", epochs=1, minibatches=1)


@pytest.mark.ci
def test_what_int8_decoding_gives_to_the_step(llama):
    """The KL of rewards, of the controller and the values are the policy's; the first update's
    ratio is 1, and `first_ratio_off` says how far the sampler was.
    """
    state = toys.state(llama, EIGHT).replace(frozen=other(llama))
    before = toys.copied(state.params)
    (rewards, scores, rolled, _, _), _, metrics = watched(llama, EIGHT)(state)
    own = toys.score(llama, rolled, EIGHT, before)
    mask = np.asarray(rolled.mask)
    np.testing.assert_allclose(rolled.raw_logprobs, own.raw_logprobs * mask, atol=1e-5)
    np.testing.assert_allclose(rolled.values, own.values * mask, atol=1e-5)
    kl = ((own.raw_logprobs - rolled.ref_logprobs) * mask).sum(1)
    np.testing.assert_allclose(rewards.sum(1), scores - 0.1 * kl, atol=1e-4)
    assert float(metrics["kl"]) == pytest.approx(float(kl.mean()), rel=1e-4)
    assert float(metrics["approx_kl"]) == pytest.approx(0, abs=1e-6)
    off = np.abs(np.expm1(own.logprobs - rolled.logprobs) * mask).max()
    assert float(metrics["first_ratio_off"]) == pytest.approx(off, rel=1e-3) and off > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"correction": "truncated", "off_policy_threshold": 0.1}, marks=pytest.mark.ci
        ),
        pytest.param(
            {"rejection": "row_mean_k1", "rejection_high": 1.001, "top_entropy": 0.5},
            marks=pytest.mark.ci,
        ),
        pytest.param({"advantage": "remax", "value_loss": "none"}, marks=pytest.mark.slow),
        pytest.param({"update": "trpo", "value_loss": "mse"}, marks=pytest.mark.slow),
        pytest.param({"mask_top_p": 0.5}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_int8_decoding_with_other_parts(llama, changes):
    """Weights and masks compare the sampler with the scorer: they are neither 1 nor all."""
    settings = replace(EIGHT, **changes)
    seen, _, metrics = watched(llama, settings)(toys.state(llama, settings))
    assert all(np.isfinite(x) for x in metrics.values()) and float(metrics["skipped"]) == 0
    if "correction" in changes:
        rolled = seen.rollout
        weights = np.exp(rolled.old_logprobs - rolled.logprobs)[rolled.mask > 0]
        assert float(metrics["weight"]) == pytest.approx(weights.mean(), abs=1e-5)
        assert np.abs(weights - 1).max() > 1e-3
    if "rejection" in changes:
        assert 0 < float(metrics["rejected"]) < 1
    if "advantage" in changes:
        small = int8.sampling_weights(llama.params, alpha=1.0)
        small = llama._replace(params=lora.fold(small, alpha=1.0))
        greedy = toys.roll(small, PROMPTS, settings, reference=llama.params, greedy=True)
        want = ((greedy.response == 3) * greedy.mask).sum(1)
        np.testing.assert_allclose(seen.rollout.extra["greedy_scores"], want)


@pytest.mark.ci
def test_int8_decoding_of_a_policy_in_16_bits():
    """The scorer's log-probs before and in the update are the same, not rounded to bfloat16, and
    the sampler's are off. Parameters stay in float32.
    """
    toy, settings = toys.llama("bfloat16"), replace(EIGHT, dtype="bfloat16")
    seen, state, metrics = watched(toy, settings)(toys.state(toy, settings))
    rolled = seen.rollout
    assert all(np.isfinite(x) for x in metrics.values()) and float(metrics["skipped"]) == 0
    assert rolled.logprobs.dtype == rolled.old_logprobs.dtype == jnp.float32
    off = np.abs(np.expm1(rolled.old_logprobs - rolled.logprobs))[rolled.mask > 0].max()
    assert float(metrics["first_ratio_off"]) == pytest.approx(off, rel=1e-3) and off > 0.01
    assert float(metrics["approx_kl"]) == pytest.approx(0, abs=1e-6)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))


def test_int8_decoding_is_for_transformers(llama):
    other = llama.model._replace(packs=False)
    with pytest.raises(UserError, match="--decode-dtype int8 needs a transformer"):
        ppo.make_train_step(other, toys.parts(EIGHT), EIGHT)


@pytest.mark.ci
def test_the_scorers_old_log_probs(llama):
    """They are the ratio's denominator; a step of the same sampler is that without them."""
    settings = replace(EIGHT, decode_dtype="same")
    seen, state, metrics = watched(llama, settings)(toys.state(llama, settings))
    own = toys.score(llama, seen.rollout, settings).logprobs * seen.rollout.mask
    np.testing.assert_allclose(seen.rollout.old_logprobs, own, atol=1e-5)
    plain = replace(settings, old_logprobs="sampler")
    seen, want, _ = watched(llama, plain)(toys.state(llama, plain))
    assert seen.rollout.old_logprobs is None
    toys.assert_close(state.params, want.params, atol=1e-5)
    assert float(metrics["first_ratio_off"]) < 1e-4


NLPO = replace(SETTINGS, mask_top_p=0.5, mask_every=2, lr=0.05)


@pytest.mark.ci
def test_nlpo_samples_from_the_lagged_nucleus_only(llama):
    """The lagged policy is another one, so its nucleus is not the policy's own. Both are
    tempered.
    """
    settings = replace(NLPO, temperature=0.5)
    lagged = toys.random_params(llama.model, seed=6)
    state = toys.state(llama, settings).replace(step=jnp.int32(1))  # not a step that copies
    state = state.replace(statistics={**state.statistics, "lagged": toys.copied(lagged)})
    (_, _, rolled, _, _), new, metrics = watched(llama, settings)(state)
    hidden = policy.states_before_tokens(llama.model, lagged, rolled)
    logits = llama.model.logits(lagged, hidden).reshape(40, -1) / 0.5
    allowed = np.isfinite(sampling.keep_set(logits, top_p=0.5)).reshape(8, 5, -1)
    chosen = np.take_along_axis(allowed, rolled.response[..., None], 2)[..., 0]
    assert chosen[rolled.mask > 0].all()
    assert float(metrics["first_ratio_off"]) < 1e-4
    assert "outside_fraction" in metrics
    toys.assert_same(new.statistics["lagged"], lagged)
    # the ratio's log-probs are renormalised over the allowed tokens, the KL's are not
    plain = jax.nn.log_softmax(
        llama.model.logits(
            llama.params, policy.states_before_tokens(llama.model, llama.params, rolled)
        )
        / 0.5
    )
    inside = jax.nn.logsumexp(jnp.where(allowed, plain, -jnp.inf), -1)
    raw = jnp.take_along_axis(plain, rolled.response[..., None], 2)[..., 0]
    np.testing.assert_allclose(rolled.logprobs, (raw - inside) * rolled.mask, atol=1e-4)
    np.testing.assert_allclose(rolled.raw_logprobs, raw * rolled.mask, atol=1e-4)


@pytest.mark.ci
def test_the_lagged_policy_is_copied_every_so_many_steps(llama):
    step, state = toys.step(llama, NLPO), toys.state(llama, NLPO)
    copies = []
    for _ in range(4):
        before = jax.device_get(state.params["value"]["kernel"])
        state, _ = step(state, PROMPTS)
        copies.append((before, jax.device_get(state.statistics["lagged"]["value"]["kernel"])))
    for number, (before, lagged) in enumerate(copies):
        current = copies[number // 2 * 2][0]
        np.testing.assert_array_equal(lagged, current)  # that of steps 0, 0, 2, 2
        assert (number % 2 == 0) == np.array_equal(lagged, before)


@pytest.mark.ci
def test_rl4lms_form_leaves_log_probs_as_they_are(llama):
    settings = replace(NLPO, mask_renormalise=False)
    (_, _, rolled, _, _), _, metrics = watched(llama, settings)(toys.state(llama, settings))
    np.testing.assert_allclose(rolled.logprobs, rolled.raw_logprobs, atol=1e-6)
    assert float(metrics["first_ratio_off"]) < 1e-4


@pytest.mark.ci
def test_kl_in_the_loss_is_not_in_the_reward(llama):
    settings = replace(SETTINGS, kl_place="loss", kl="k3", kl_coef=0.5)
    seen, _, metrics = watched(llama, settings)(
        toys.state(llama, settings).replace(frozen=other(llama))
    )
    rewards, scores, rolled, *_ = seen
    np.testing.assert_allclose(rewards.sum(1), scores, atol=1e-5)
    assert float(metrics["kl_loss"]) > 0
    measured = ((rolled.raw_logprobs - rolled.ref_logprobs) * rolled.mask).sum(1).mean()
    assert float(metrics["kl"]) == pytest.approx(float(measured), rel=1e-4)


@pytest.mark.ci
def test_full_kl_in_the_reward(llama):
    """Between the tempered distributions, from which the policy samples."""
    settings = replace(SETTINGS, kl="full", kl_coef=0.5, temperature=0.5)
    frozen = other(llama)
    (rewards, scores, rolled, *_), _, _ = watched(llama, settings)(
        toys.state(llama, settings).replace(frozen=frozen)
    )
    logits = lambda params: (
        llama.model.logits(params, policy.states_before_tokens(llama.model, params, rolled)) / 0.5
    )
    exact = kl.full(logits(llama.params), logits(frozen["reference"])) * rolled.mask
    np.testing.assert_allclose(rewards.sum(1), scores - 0.5 * exact.sum(1), atol=1e-4)


@pytest.mark.ci
def test_several_rewards(llama):
    """Columns go to the estimator as they are; the tokens' rewards have their sum."""
    settings = replace(GROUPED, advantage="gdpo", filter_groups=False)

    def reward(params, rollout):
        hits = lambda token: (
            ((rollout.response == token) & (rollout.mask > 0)).sum(1).astype(jnp.float32)
        )
        return jnp.stack([hits(3), hits(4)], 1), rollout.tokens[:, 3] > 0

    names = (("threes", 1.0), ("fours", 0.5))
    (rewards, scores, *_), _, metrics = watched(
        llama, settings, reward=reward, score_weights=names
    )(toys.state(llama, settings), grouped(8))
    assert scores.shape == (8, 2)
    np.testing.assert_allclose(rewards.sum(1), scores.sum(1), atol=1e-6)
    assert float(metrics["reward"]) == pytest.approx(float(scores.sum(1).mean()))
    assert float(metrics["reward_std"]) == pytest.approx(float(scores.sum(1).std()))
    assert float(metrics["score_threes"]) == pytest.approx(float(scores[:, 0].mean()))
    assert float(metrics["score_fours"]) == pytest.approx(2 * float(scores[:, 1].mean()))
    assert float(metrics["score_fours"]) > 0


@pytest.mark.ci
def test_each_task_has_its_reward(llama):
    """Of three tasks the last has no rows; scores are whitened within each, the metrics are as the
    reward gave them.
    """
    settings = replace(SETTINGS, num_tasks=3, reward_norm="task", kl_coef=0.0)
    task = jnp.array([0, 0, 0, 1, 1, 1, 1, 1])
    prompts = PROMPTS.replace(extra={"task": task})

    def reward(params, rollout):
        total = (rollout.response * (rollout.mask > 0)).sum(1).astype(jnp.float32)
        return jnp.where(rollout.extra["task"] == 0, 100 * total, total), rollout.index != 1

    (_, scores, rolled, *_), _, metrics = watched(llama, settings, reward=reward)(
        toys.state(llama, settings), prompts
    )
    total = np.asarray((rolled.response * rolled.mask).sum(1))
    rows = [np.array([0, 2]), np.arange(3, 8)]  # row 1 is invalid
    assert float(metrics["reward_0"]) == pytest.approx(100 * total[rows[0]].mean())
    assert float(metrics["reward_1"]) == pytest.approx(total[rows[1]].mean())
    assert float(metrics["reward_2"]) == 0
    want = np.zeros(8)
    for part in rows:
        want[part] = (total[part] - total[part].mean()) / total[part].std()
    np.testing.assert_allclose(scores, want, atol=1e-4)
    usual = ppo.make_train_step(llama.model, toys.parts(SETTINGS), SETTINGS)
    assert "reward_0" not in jax.eval_shape(usual, toys.state(llama), PROMPTS)[1]


@pytest.mark.ci
def test_the_running_scale_lives_in_the_state(llama):
    settings = replace(SETTINGS, reward_norm="running")
    step, state = toys.step(llama, settings), toys.state(llama, settings)
    for count in (8, 16):
        state, _ = step(state, toys.prompts(seed=count))
        assert float(state.statistics["reward"].count) == count


@pytest.mark.ci
def test_whitened_rewards_keep_their_mean(llama):
    """Those of valid rows; row 3 is not."""

    def reward(params, rolled):
        return count_token(3)(params, rolled)[0], rolled.index != 3

    acting = {}
    for whiten in (True, False):
        settings = replace(SETTINGS, whiten_rewards=whiten)
        seen, _, _ = watched(llama, settings, reward=reward)(
            toys.state(llama, settings).replace(frozen=other(llama))
        )
        valid = np.asarray(seen.rollout.mask) * np.asarray(seen.learn)[:, None] > 0
        acting[whiten] = np.asarray(seen.rewards)[valid]
    assert acting[True].var() == pytest.approx(1, rel=1e-3)
    assert acting[True].mean() == pytest.approx(acting[False].mean(), rel=1e-3)
    assert abs(acting[False].var() - 1) > 0.1


@pytest.mark.ci
def test_beta_is_steered_by_how_far_the_step_went(llama):
    settings = replace(SETTINGS, loss="kl_penalty", beta=1.0, beta_target=1e-9, lr=0.01)
    state, metrics = toys.step(llama, settings)(toys.state(llama, settings), PROMPTS)
    assert float(metrics["last_approx_kl"]) > 1.5e-9
    assert float(state.controller["beta"]) == 2.0


@pytest.mark.ci
def test_a_separate_critic_learns_in_the_step():
    one = toys.llama()
    model = toys.models.with_critic(one.model, one.model, width=one.config.width)
    toy = toys.Toy(one.config, model, toys.random_params(model, seed=2))
    settings = replace(SETTINGS, critic="separate", critic_lr=0.01, critic_warmup=1)
    state, metrics = toys.step(toy, settings)(toys.state(toy, settings), PROMPTS)
    pairs = lambda name: zip(
        jax.tree.leaves(state.params[name]), jax.tree.leaves(toy.params[name]), strict=True
    )
    changed = lambda name: any((a != b).any() for a, b in pairs(name))
    assert changed("critic") and not changed("embed")  # the first step is a warm-up
    assert float(metrics["first_ratio_off"]) < 1e-4
    state, _ = toys.step(toy, settings)(state, PROMPTS)
    assert changed("embed")


@pytest.mark.ci
@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 3},
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ({}, {"mask_top_p": 0.5}, {"mask_top_p": 0.5, "mask_renormalise": False})
        ),
    ],
    ids=str,
)
def test_the_first_ratio_is_one_with_min_tokens(llama, changes):
    """Entropy and KL are those of all tokens."""
    settings = replace(SETTINGS, min_tokens=3, minibatches=1, epochs=1, **changes)
    state = toys.state(llama, settings)
    before = toys.copied(state.params)
    (_, _, rolled, _, _), _, metrics = watched(llama, settings)(state)
    assert (rolled.mask.sum(1) > 3).all()
    assert float(metrics["first_ratio_off"]) < 1e-4
    scored = toys.score(llama, rolled, SETTINGS, before)
    assert float(metrics["entropy"]) == pytest.approx(
        float((scored.entropy * rolled.mask).sum() / rolled.mask.sum()), rel=1e-4
    )
