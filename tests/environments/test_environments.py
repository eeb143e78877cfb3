"""What holds for every game: scripts reach the optimum, rows are independent, and no text breaks
anything.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxppo.environments import ENVIRONMENTS
from jaxppo.environments.play import play
from jaxppo.environments.text import make_tables, on_bytes, stack
from jaxppo.pretrained.tiny import byte_tokenizer
from jaxppo.types import Turn

# small ones; the tests of each game have the others
OPTIONS = {"wordle": {"words": 40}}
NAMES = sorted(ENVIRONMENTS)
ROWS = 64
# letters that these games read, so that some turns are moves
LETTERS = np.frombuffer(b"0123456789abcdenswrth=+-* \n\0\xff", np.uint8)


@functools.cache
def make(name: str):
    return ENVIRONMENTS[name](**OPTIONS.get(name, {}))


@functools.cache
def compiled(name: str):
    world = make(name).environment
    return jax.jit(world.reset), jax.jit(world.step)


def keys(rows: int, seed: int = 0):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))


def random_turns(world, turns: int, rows: int = ROWS, seed: int = 0):
    """(bytes [turns rows W], lengths, some of which are impossible)."""
    rng = np.random.default_rng(seed)
    text = rng.choice(LETTERS, (turns, rows, world.turn_length))
    text[:, ::3, 1:] = ord("\n")  # one letter
    return jnp.asarray(text), jnp.asarray(rng.integers(-1, world.turn_length + 2, (turns, rows)))


@functools.cache
def fuzzed(name: str):
    """(instances, texts, replies [turns rows ...], states) over two turns more than there are; a
    scan also demands that the state keeps its types.
    """
    game = make(name)
    world, instances = game.environment, game.instances(ROWS, 3)
    said = random_turns(world, world.max_turns + 2)

    @jax.jit
    def run(arrays, keys):
        def body(state, turn):
            state, reply = world.step(state, *turn)
            return state, (reply, jax.tree.map(jnp.asarray, state.own))

        return jax.lax.scan(body, world.reset(arrays, keys), said)[1]

    return stack(instances), said, *jax.device_get(run(stack(instances), keys(ROWS)))


@pytest.mark.parametrize("name", NAMES)
def test_the_script_reaches_the_optimum(name):
    """On average, within four standard errors; and it is never unreadable."""
    game = make(name)
    played = play(game, game.instances(300, 0))
    scores = np.array([x.score for x in played])
    assert abs(scores.mean() - game.optimum) <= 4 * scores.std() / np.sqrt(300) + 1e-6
    assert all(x.done and "?\n" not in x.replies for x in played)


@pytest.mark.parametrize("name", NAMES)
def test_instances_depend_on_the_seed_alone(name):
    game = make(name)
    first, again, other = game.instances(30, 5), game.instances(30, 5), game.instances(30, 6)
    same = lambda x, y: all(np.array_equal(x[key], y[key]) for key in x)
    assert len(first) == 30 and all(map(same, first, again))
    assert name == "tic_tac_toe" or not all(map(same, first, other))  # there is one board
    assert all(type(x["prompt"]) is str and x["prompt"].isascii() for x in first)


@pytest.mark.ci
@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_are_answered(name):
    world = make(name).environment
    _, _, reply, _ = fuzzed(name)
    assert reply.text.shape[2] == world.reply_length
    assert (reply.length >= 0).all() and (reply.length <= world.reply_length).all()
    shown = reply.text[np.arange(world.reply_length)[None, None] < reply.length[..., None]]
    assert set(shown.tolist()) <= set(world.alphabet)
    assert np.isfinite(reply.reward).all()
    assert (reply.reward.sum(0) <= 1 + 1e-6).all() and (reply.reward >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_an_episode_ends_and_stays_ended(name):
    world = make(name).environment
    _, _, reply, own = fuzzed(name)
    assert reply.done[world.max_turns - 1].all()
    over = np.concatenate([np.zeros((1, ROWS), bool), reply.done[:-1]])
    assert reply.done[over].all()
    assert (reply.length[over] == 0).all() and (reply.reward[over] == 0).all()
    for x in jax.tree.leaves(own):
        np.testing.assert_array_equal(x[-1], x[-2])


@pytest.mark.ci
@pytest.mark.parametrize("name", NAMES)
def test_a_row_alone_is_what_it_is_in_a_batch(name):
    world = make(name).environment
    arrays, (text, length), reply, _ = fuzzed(name)
    reset, step = compiled(name)
    for row in (0, 7):
        one = slice(row, row + 1)
        state = reset(jax.tree.map(lambda x: x[one], arrays), keys(ROWS)[one])
        for turn in range(world.max_turns):
            state, own = step(state, text[turn, one], length[turn, one])
            for x, y in zip(jax.tree.leaves(own), jax.tree.leaves(reply), strict=True):
                np.testing.assert_array_equal(x[0], y[turn, row])


@pytest.mark.ci
@pytest.mark.parametrize("name", NAMES)
def test_several_seeds_under_vmap(name):
    """The second seed alone has the same episodes."""
    world = make(name).environment
    arrays, (text, length), _, _ = fuzzed(name)
    few = jax.tree.map(lambda x: x[:8], arrays)

    def run(keys):
        return world.step(world.reset(few, keys), text[0, :8], length[0, :8])[1]

    both = jnp.stack([keys(8, 0), keys(8, 1)])
    many, one = jax.jit(jax.vmap(run))(both), jax.jit(run)(both[1])
    for x, y in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(x[1], y)


@pytest.mark.ci
@pytest.mark.parametrize("name", NAMES)
def test_on_tokens_it_is_the_same_game(name):
    """Tokens of bytes, the end of text behind them."""
    game = make(name)
    tokenizer = byte_tokenizer()
    world = on_bytes(
        game.environment, make_tables(tokenizer), turn_length=game.environment.turn_length + 1
    )
    instances = game.instances(8, 0)
    played = play(game, instances, seed=4)
    state = jax.jit(world.reset)(stack(instances), keys(8, 4))
    step = jax.jit(world.step)
    for turn in range(max(len(x.turns) for x in played)):
        said = [x.turns[turn] if turn < len(x.turns) else "" for x in played]
        tokens = np.full((8, world.turn_length), tokenizer.eos_id, np.int32)
        for row, text in zip(tokens, said, strict=True):
            row[: len(text)] = tokenizer.encode(text)
        size = jnp.array([len(text) + 1 for text in said])
        state, seen = step(state, Turn(jnp.asarray(tokens), size))
        assert seen.tokens.shape == (8, world.observation_length)
        for row, x in enumerate(played):
            if turn < len(x.turns):
                ids = np.asarray(seen.tokens)[
                    row, world.observation_length - int(seen.length[row]) :
                ]
                last = turn == len(x.turns) - 1
                assert tokenizer.decode(ids) == ("" if last else x.replies[turn])
                assert seen.reward[row] == x.rewards[turn] and seen.done[row] == last


@pytest.mark.ci
@pytest.mark.parametrize("name", NAMES)
def test_types_do_not_change_unasked(name, x64):
    """Not in float64 either, in which estimators are compared with exact gradients."""
    game = make(name)
    world = on_bytes(game.environment, make_tables(byte_tokenizer()))
    arrays = stack(game.instances(2, 0))
    turn = Turn(jnp.zeros((2, world.turn_length), jnp.int32), jnp.ones(2, jnp.int32))
    state = jax.eval_shape(world.reset, arrays, keys(2))
    after, seen = jax.eval_shape(world.step, state, turn)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    found = [x.dtype for x in (seen.tokens, seen.length, seen.reward, seen.done)]
    assert found == [jnp.int32, jnp.int32, jnp.float32, jnp.bool_]
