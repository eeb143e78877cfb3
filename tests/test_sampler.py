from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from runs import RUN, TEXTS

from jaxppo import assemble, ppo, sampler


@pytest.fixture(scope="module")
def loaded():
    return assemble.load_policy(RUN)


@pytest.fixture(scope="module")
def prompts(loaded):
    return sampler.encode(TEXTS, loaded[1].tokenizer, 4, too_long="last")


def test_batches_are_a_function_of_seed_and_cursor(prompts):
    one, same, next_one = (prompts.batch(RUN, cursor) for cursor in (0, 0, 4))
    toys.assert_same(one, same)
    assert (one.tokens != next_one.tokens).any()
    assert (prompts.batch(replace(RUN, seed=1), 0).tokens != one.tokens).any()
    assert one.index.tolist() == [0, 1, 2, 3]
    together = np.concatenate([prompts.batch(RUN, cursor).tokens for cursor in range(0, 28, 4)])
    found = np.unique(together, axis=0, return_counts=True)
    assert found[1].tolist() == [4] * 7  # 28 rows are 4 epochs of 7 prompts


def test_prompts_that_are_left_out_are_counted(loaded, capsys):
    found = sampler.encode(["ab", "abcdef", "abc"], loaded[1].tokenizer, 4)
    assert len(found.tokens) == 2
    assert capsys.readouterr().out == "1 of 3 prompts are longer than 4 tokens and were left out\n"


def test_copies_of_a_prompt_are_neighbours(prompts):
    batch = prompts.batch(replace(RUN, batch_size=8, group_size=4), 0)
    assert batch.tokens.shape == (8, 4)
    for group in (batch.tokens[:4], batch.tokens[4:]):
        assert (group == group[0]).all()
    single = prompts.batch(replace(RUN, batch_size=2), 0)
    np.testing.assert_array_equal(batch.tokens[::4], single.tokens)
    assert batch.index.tolist() == list(range(8))  # each copy has noise of its own


def test_what_belongs_to_a_prompt_goes_with_it(loaded):
    """References, here the number of the text; the second text is too long and is dropped."""
    some = sampler.encode(["ab", "abcdefg", "cd", "ef"], loaded[1].tokenizer, 4, extra={"number": np.arange(4)})
    assert some.extra["number"].tolist() == [0, 2, 3]
    batch = some.batch(replace(RUN, batch_size=6, group_size=2), 0)
    found = [loaded[1].tokenizer.decode(row[kept]) for row, kept in zip(batch.tokens, batch.mask, strict=True)]
    assert [{"ab": 0, "cd": 2, "ef": 3}[word] for word in found] == batch.extra["number"].tolist()
    stacked = some.call(replace(RUN, steps_per_call=2, batch_size=2), 0)
    assert stacked.extra["number"].shape == (2, 2)


def test_several_batches_of_one_call(prompts):
    config = replace(RUN, steps_per_call=3, batch_size=4, group_size=2)
    stacked = prompts.call(config, 2)
    assert isinstance(stacked.tokens, np.ndarray)  # the step puts them where it wants them
    for k in range(3):
        want = prompts.batch(config, 2 + 2 * k)  # two prompts a step
        toys.assert_same(jax.tree.map(lambda x: x[k], stacked), jax.tree.map(jnp.asarray, want))


@pytest.fixture(scope="module")
def read(loaded):
    config, policy = loaded
    return sampler.Sampler(config, policy, rows=4)


@pytest.fixture(scope="module")
def moved(loaded):
    """A state whose adapters are no longer zero."""
    config, policy = loaded
    params = jax.tree.map(lambda x: x + 0.1, policy.params)
    return ppo.init_state(config, params, policy.frozen, jax.random.key(0))


def test_sampler_takes_any_number_of_prompts(read, moved, prompts):
    seven = read(moved, prompts, seed=0)
    assert [sample.prompt for sample in seven] == ["one", "two", "four", "x", "even", "it", "ab"]
    assert all(1 <= len(sample.tokens) <= 3 for sample in seven)
    five = read(moved, sampler.PromptSet(prompts.tokens[:5], prompts.mask[:5]), seed=0)
    assert five == seven[:5]  # what fills up the last part changes nothing
    assert read(moved, prompts, seed=0) == seven
    assert read(moved, prompts, seed=1) != seven


def test_kl_of_samples_is_to_the_base(read, moved, prompts, loaded):
    assert any(abs(sample.kl) > 1e-4 for sample in read(moved, prompts, seed=0))
    fresh = moved.replace(params=loaded[1].params)  # adapters as they were made: nothing added
    assert all(abs(sample.kl) < 1e-4 for sample in read(fresh, prompts, seed=0))
