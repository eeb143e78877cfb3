"""The games of the ladder: their vocabularies and lengths, and that play is what they say."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxppo.ablation import games
from jaxppo.config import validate_run
from jaxppo.environments import play, text
from jaxppo.rewards import in_program
from jaxppo.rollout import sample_responses
from jaxppo.types import Turn

# (bytes and the end of text, prompt, response = turns · (2 + the longest answer))
SIZES = {
    "bandit_with_memory": (7, 4, 3 * (2 + 1)),  # abcd . newline
    "guess": (20, 4, 3 * (2 + 7)),  # 1-7 - ? newline, and the nine letters of higher, lower, right
    "maze": (15, 19, 4 * (2 + 7)),  # abc 123 .#G newline nesw; 3 lines of 4, then "b3.#G#\n"
}


@pytest.mark.parametrize("name", games.GAMES)
def test_settings_of_a_game(name):
    found = games.settings(name)
    vocabulary, prompt, response = SIZES[name]
    assert games.tokenizer(name).vocab_size == vocabulary
    assert (found["prompt_length"], found["response_length"]) == (prompt, response)
    assert found["eos"] == found["pad"] == vocabulary - 1
    validate_run(replace(games.GameConfig(), **found))


@pytest.mark.ci
@pytest.mark.parametrize("name", games.GAMES)
def test_the_script_reaches_the_optimum_in_turns_of_two_tokens(name):
    """On the tokens of the vocabulary, if its words are cut to what fits: "north" to "n"."""
    game, world, known = games.GAMES[name].game, games.environment(name), games.tokenizer(name)
    drawn = game.instances(64, 1)
    played = play.play(game, drawn)
    state = world.reset(text.stack(drawn), jax.random.split(jax.random.key(0), 64))
    total, step = np.zeros(64), jax.jit(world.step)
    for turn in range(world.max_turns):
        said = [x.turns[turn][0] if turn < len(x.turns) else "" for x in played]
        ids = [known.encode(x + "\n" * bool(x)) for x in said]
        tokens = np.full((64, games.TURN), known.eos_id, np.int32)
        for row, own in zip(tokens, ids):
            row[: len(own)] = own
        state, seen = step(state, Turn(jnp.asarray(tokens), jnp.array([*map(len, ids)])))
        total += np.asarray(seen.reward)
    np.testing.assert_allclose(total, [x.score for x in played], rtol=1e-6)
    assert np.asarray(seen.done).all()
    # the bandit's first pull is by chance: 2/3, or 1 if it is right
    assert total.mean() == pytest.approx(games.GAMES[name].game.optimum, abs=0.06)


@pytest.mark.ci
def test_a_new_network_writes_the_bytes_of_its_turns_alone():
    """Seven numbers, the newline and the end of text; and its score is that of the turns."""
    config = replace(games.GameConfig(), **games.settings("guess"), batch_size=64)
    policy, known = games.load(config), games.tokenizer("guess")
    other = games.load(replace(config, seed=1))
    assert not np.array_equal(*(jax.tree.leaves(x.params)[0] for x in (policy, other)))
    batch = jax.tree.map(jnp.asarray, games.instances("guess").batches(config, 0))
    sample = partial(sample_responses, environment=games.environment("guess"))
    program = jax.jit(
        lambda params, frozen, batch: sample(
            config, policy.model, params, frozen, batch, jax.random.key(0)
        )
    )
    done = program(policy.params, policy.frozen, batch)
    own = set(np.asarray(done.response)[np.asarray(done.mask) > 0].tolist())
    assert own == {known.eos_id, *known.encode("1234567\n")}
    parts = games.make_parts(config, in_program.episode_score)
    assert parts.environment is games.environment("guess")
    scores, valid = parts.reward({}, done)
    assert valid.all() and set(np.unique(scores)) <= {0, 1}


def test_a_group_plays_one_instance():
    config = replace(games.GameConfig(), **games.settings("guess"), group_size=8)
    number = games.instances("guess").batches(config, 0).extra["number"].reshape(-1, 8)
    assert (number == number[:, :1]).all() and len(np.unique(number)) > 1
    assert set(games.instances("guess").extra["number"]) == set(range(1, 8))
