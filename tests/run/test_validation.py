from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from runs import RUN, TEXTS

from jaxppo import ppo, supervised
from jaxppo.data import rows
from jaxppo.data.prompts import PromptSet
from jaxppo.parallel import sharding
from jaxppo.run import load, validation


@pytest.mark.ci
def test_means_over_all_rows():
    """7 texts in batches of 4 and 3: the mean is that of all tokens, not of the two batches."""
    config, policy = load.load_policy(replace(RUN, lora=0))
    ids = [[*policy.tokenizer.encode(text), policy.tokenizer.eos_id][:6] for text in TEXTS]
    texts = rows.from_ids(ids, 6)
    objective = supervised.language_model(policy.model, config)
    state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(0))
    found = validation.make_validation(config, policy, objective, texts)(state)
    sums, weight = jax.jit(supervised.make_evaluation(policy.model, objective))(
        state.params, state.frozen, texts.all()
    )
    assert found["loss"] == pytest.approx(float(sums["loss"] / weight), rel=1e-5)
    assert (
        found["perplexity"] == pytest.approx(np.exp(found["loss"]))
        and found["score"] == -found["loss"]
    )
    assert 5 < found["loss"] < 6  # random weights: log 257 = 5.55


def test_pairs_have_an_accuracy():
    config, policy = load.load_policy(replace(RUN, lora=0))
    pairs = rows.preferences(
        [("a", "b", "c")] * 3, policy.tokenizer.encode, 6, eos=policy.tokenizer.eos_id
    )
    state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(0))
    found = validation.make_validation(
        config, policy, supervised.bradley_terry(policy.model), pairs
    )(state)
    assert found["loss"] == pytest.approx(
        np.log(2), rel=1e-5
    )  # the value head starts at 0: no opinion
    assert found["accuracy"] == found["score"] == 0.0


@pytest.mark.ci
def test_each_held_out_prompt_counts_once(monkeypatch):
    """Of 3 prompts in batches of 2, rows 0, 1 and 2 in the noise: the fourth row is a copy, and row
    0 has no reward. Columns are weighted with 2 and 1.
    """
    monkeypatch.setattr(validation, "ROWS", 2)
    config, policy = load.load_policy(replace(RUN, lora=0))
    state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(0))
    prompts = PromptSet(np.full((3, 4), 65, np.int32), np.ones((3, 4), bool))

    def reward(params, rolled):
        return jnp.stack([rolled.index * 1.0, jnp.full(2, 0.25)], 1), rolled.index != 0

    parts = toys.parts(config, reward=reward, score_weights=(("row", 2.0), ("fixed", 1.0)))
    found = validation.make_reward_validation(config, policy, parts, prompts)(state)
    # (2 · 1 + .25 + 2 · 2 + .25) / 2
    assert found["score"] == found["reward"] == 3.25
    assert (found["score_row"], found["score_fixed"]) == (1.5, 0.25)


def reward_of_row(params, rolled):
    return rolled.index * 1.0, rolled.index != 5


@pytest.mark.ci
def test_several_samples_of_a_prompt(monkeypatch):
    """3 prompts, 2 samples each, 2 prompts at a time: rows 0 to 5 have the scores 0 to 5, and row 5
    is invalid, so prompt 2 has no pass@k. The text of both samples is made the same, so the first
    is the majority.
    """
    monkeypatch.setattr(validation, "ROWS", 4)
    texts = lambda tokenizer, done: ([], ["same"] * len(done.tokens), [])
    monkeypatch.setattr(validation, "decode_rollout", texts)
    config, policy = load.load_policy(replace(RUN, lora=0, eval_samples=2, eval_right=2.0))
    state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(0))
    prompts = PromptSet(np.array([[65] * 4, [66] * 4, [67] * 4], np.int32), np.ones((3, 4), bool))
    found = {}
    for layout in ("packed", "dense"):  # packed rows share their prompt's prefill
        config = replace(config, layout=layout)
        parts = toys.parts(config, reward=reward_of_row)
        found[layout] = validation.make_reward_validation(config, policy, parts, prompts)(state)
    # the policy is its own reference: rounding, which layouts do not share
    assert [x.pop("kl") for x in found.values()] == pytest.approx([0, 0], abs=1e-6)
    assert found["packed"] == pytest.approx(found["dense"], rel=1e-5)
    got = found["packed"]
    assert got["reward"] == got["score"] == 2  # (0 + 1 + 2 + 3 + 4) / 5
    assert {name: x for name, x in got.items() if "@" in name} == {
        "avg@2": 1.5,  # (0 + 1 + 2 + 3) / 4
        "maj@2": 0.5,  # row 2 is right, row 0 is not
        "pass@2": 0.5,
        "pass@1": 0.5,  # rows 2 and 3 of 4
    }
    more = validation.add_samples(lambda state: {"score": 7.0}, config, policy, parts, prompts)
    assert more(state) == {"score": 7.0} | {name: x for name, x in got.items() if "@" in name}
    one = replace(config, eval_samples=1)
    evaluate = lambda state: {"score": 7.0}
    assert validation.add_samples(evaluate, one, policy, parts, prompts) is evaluate


@pytest.mark.ci
@pytest.mark.parametrize("samples", [1, 2])
def test_prompts_that_do_not_divide_among_the_devices(samples):
    """3 prompts on 2 devices: with 2 samples each the 6 rows would, but their groups do not."""
    config = replace(RUN, lora=0, eval_samples=samples)
    found = []
    for mesh in (None, sharding.make_mesh("data=2", jax.devices()[:2])):
        _, policy = load.load_policy(config, mesh=mesh)
        state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(0))
        prompts = PromptSet(
            np.array([[65] * 4, [66] * 4, [67] * 4], np.int32), np.ones((3, 4), bool)
        )
        last = lambda params, rolled: (rolled.tokens[:, -1] % 2.0, rolled.finished | True)
        parts = toys.parts(config, reward=last)
        found.append(validation.make_reward_validation(config, policy, parts, prompts)(state))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
