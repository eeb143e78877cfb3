from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
import toys

from jaxppo import ppo, types
from jaxppo.errors import UserError
from jaxppo.losses import token
from jaxppo.types import Rollout


def test_check_accepts_what_the_design_says():
    types.check_prompts(toys.prompts(), prompt_length=4)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("tokens", jnp.zeros((8, 4), jnp.float32), ["prompts.tokens", "float32"]),
        ("mask", jnp.zeros((8, 4), jnp.float32), ["prompts.mask", "float32"]),
        ("mask", jnp.zeros((8, 3), bool), ["prompts.mask", "[8, 4]", "[8, 3]"]),
        ("index", jnp.zeros((7,), jnp.int32), ["prompts.index", "[8]", "[7]"]),
    ],
)
def test_check_names_the_field_and_both_shapes(name, value, words):
    with pytest.raises(ValueError) as caught:
        types.check_prompts(toys.prompts().replace(**{name: value}), prompt_length=4)
    for word in words:
        assert word in str(caught.value)


def test_check_of_another_prompt_length():
    with pytest.raises(ValueError, match=r"\[8, 6\].*\[8, 4\]"):
        types.check_prompts(toys.prompts(), prompt_length=6)


def test_check_works_while_tracing():
    def program(prompts):
        types.check_prompts(prompts, prompt_length=4)
        return prompts.tokens

    jax.eval_shape(program, toys.prompts())
    jax.vmap(program)(jax.tree.map(lambda x: jnp.stack([x, x]), toys.prompts()))


def test_response_is_the_end_of_the_row():
    zeros = jnp.zeros((1, 2))
    tokens = jnp.array([[5, 6, 7, 8, 9]])
    rollout = Rollout(tokens, tokens > 0, zeros, jnp.array([False]), zeros, zeros, zeros, zeros)
    assert rollout.response.tolist() == [[8, 9]]  # the mask says: 2 of 5


def test_structs_are_trees():
    prompts = toys.prompts().replace(extra={"label": jnp.arange(8)})
    toys.assert_same(jax.jit(lambda x: x)(prompts), prompts)
    assert len(jax.tree.leaves(prompts)) == 4
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), prompts)
    assert jax.vmap(lambda p: p.extra["label"])(stacked).shape == (2, 8)


# Parts of users: 8 rows of 5 tokens, in two minibatches


def scalar_loss(logprobs, old_logprobs, advantages, mask, *, key=None):
    return -(jnp.exp(logprobs - old_logprobs) * advantages * mask).mean(), {}


def loss_alone(*arrays, key=None):
    return token.clip(*arrays)[0]


def mean_diagnostic(*arrays, key=None):
    per_token, _ = token.clip(*arrays)
    return per_token, {"mine": per_token.mean()}


def of_rows(rewards, scores, rollout, *, valid, statistics, axis_name):
    return scores, scores, statistics


def without_statistics(rewards, scores, rollout, *, valid, statistics, axis_name):
    return rewards, rewards, {}


PARTS = {
    "a loss that is reduced": (
        {"policy_loss": scalar_loss},
        "the part policy_loss must return (per_token [B T], a dict of diagnostics [B T]), here of "
        "the shape [4, 5], but it returns (float32[], {})",
    ),
    "a loss without diagnostics": ({"policy_loss": loss_alone}, "but it returns float32[4, 5]"),
    "a reduced diagnostic": (
        {"policy_loss": mean_diagnostic},
        "but it returns (float32[4, 5], {mine: float32[]})",
    ),
    "a loss without a key": (
        {"policy_loss": lambda logprobs, old_logprobs, advantages, mask: None},
        "the part policy_loss is called as policy_loss(logprobs, old_logprobs, advantages, mask, "
        "*, key), which it does not take: got an unexpected keyword argument 'key'",
    ),
    "a penalised loss without beta": (
        {"policy_loss": token.clip, "penalty": True},
        "policy_loss(logprobs, old_logprobs, advantages, mask, *, key, beta), which it does not "
        "take: got an unexpected keyword argument 'beta'",
    ),
    "advantages of rows": (
        {"advantage": of_rows},
        "the part advantage must return (advantages [B T], returns [B T], statistics as given), "
        "here of the shape [8, 5], but it returns (float32[8], float32[8], {",
    ),
    "lost statistics": (
        {"advantage": without_statistics},
        "but it returns (float32[8, 5], float32[8, 5], {})",
    ),
    "a weight for each row": (
        {"aggregate": lambda mask, *, axis_name: mask.sum(1)},
        "the part aggregate must return weights [B T], here of the shape [4, 5], but it returns "
        "float32[4]",
    ),
    "an aggregate of one device": (
        {"aggregate": lambda mask: mask},
        "aggregate(mask, *, axis_name), which it does not take: got an unexpected keyword",
    ),
    "a reduced value loss": (
        {"value_loss": lambda values, old, returns: jnp.square(values - returns).mean()},
        "the part value_loss must return losses [B T], here of the shape [4, 5], but it returns "
        "float32[]",
    ),
    "a value loss of two": (
        {"value_loss": lambda values, returns: values - returns},
        "value_loss(values, old_values, returns), which it does not take: too many positional",
    ),
    "a KL of rows": (
        {"kl": lambda x, ref: (x - ref).sum(-1)},
        "the part kl must return an array like each of them, here of the shape [8, 5], but it "
        "returns float32[8]",
    ),
    "rewards of rows": (
        {"token_rewards": lambda scores, rollout, *, kl_coef, kl: scores},
        "the part token_rewards must return rewards [B T], here of the shape [8, 5], but it "
        "returns float32[8]",
    ),
    "a correction of rows": (
        {"correction": lambda old, sampler, mask, *, axis_name: mask.sum(1)},
        "the part correction must return weights [B T], here of the shape [8, 5], but it returns "
        "float32[8]",
    ),
    "scores alone": (
        {"reward": lambda params, rollout: rollout.mask.sum(1)},
        "the part reward must return (scores [B] or [B R], valid Bool[B]), here of the shape [8], "
        "but it returns float32[8]",
    ),
    "a score for each token": (
        {"reward": lambda params, rollout: (rollout.mask, rollout.finished)},
        "but it returns (float32[8, 5], bool[8])",
    ),
    "numbers for valid": (
        {"reward": lambda params, rollout: (rollout.mask.sum(1), rollout.mask.sum(1))},
        "but it returns (float32[8], float32[8])",
    ),
    "a reward with another signature": (
        {"reward": lambda prompt, response, answer: 0.0},
        "reward(params, rollout), which it does not take: missing a required argument: 'answer'",
    ),
}


@pytest.mark.parametrize(("changes", "words"), PARTS.values(), ids=PARTS)
def test_a_wrong_part_is_one_line_while_tracing(changes, words):
    toy, prompts = toys.llama(), toys.prompts()
    if changes.get("reward") and "float32[8, 5]" in words:
        changes = {**changes, "score_weights": (("a", 1.0), ("b", 1.0))}
    step = ppo.make_train_step(toy.model, toys.parts(**changes), toys.SETTINGS)
    with pytest.raises(UserError) as caught:
        jax.eval_shape(step, toys.state(toy), prompts)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_parts_with_several_scores_and_a_full_kl_pass():
    settings = replace(toys.SETTINGS, kl="full", correction="truncated", old_logprobs="scorer")
    two = lambda params, rollout: (jnp.ones((8, 2)), rollout.finished)
    named = toys.parts(settings, reward=two, score_weights=(("a", 1.0), ("b", 1.0)))
    step = ppo.make_train_step(toys.llama().model, named, settings)
    _, metrics = jax.eval_shape(step, toys.state(toys.llama(), settings), toys.prompts())
    assert metrics["score_b"].shape == ()


def test_checks_add_nothing_to_the_program():
    parts, arrays = toys.parts(), (jnp.zeros((8, 5)), jnp.zeros((8, 5)), jnp.ones((8, 5)))
    of = lambda fn: str(jax.make_jaxpr(lambda *x: fn(*x, jnp.ones((8, 5)), key=None))(*arrays))
    assert of(types.checked(parts).policy_loss) == of(parts.policy_loss)
    assert types.checked(parts._replace(value_loss=None)).value_loss is None
