"""Tic-tac-toe, its opponents and the values of its boards."""

import functools

import numpy as np
import pytest

from jaxppo.environments import tic_tac_toe
from jaxppo.environments.play import play
from jaxppo.environments.tic_tac_toe import FREE, MINE, THEIRS

EMPTY = (FREE,) * 9
make = functools.cache(tic_tac_toe.make)


def board(text: str) -> np.ndarray:
    return np.array([".xo".index(x) for x in text.replace(" ", "")], np.int32)


def start(text: str) -> dict:
    return {"prompt": tic_tac_toe.show(board(text)), "board": board(text)}


def episode(text: str, *turns: str, opponent="random", seed: int = 0):
    said = iter(turns)
    return play(make(opponent), [start(text)], lambda *_: next(said), seed=seed)[0]


def negamax(squares: list[str], player: str) -> int:
    """1 if the player to move wins, 0 a draw, -1 a loss: another program of the same game."""
    other = "xo"[player == "x"]
    if any({squares[i] for i in line} == {other} for line in tic_tac_toe.LINES):
        return -1
    free = [i for i in range(9) if squares[i] == "."]
    found = []
    for i in free:
        squares[i] = player
        found.append(-negamax(squares, other))
        squares[i] = "."
    return max(found, default=0)


@pytest.mark.parametrize("text", ["xo. ... ...", "x.o .o. ..x", "xx. oo. ...", "o.x .x. o.."])
def test_values_against_a_perfect_opponent(text):
    squares = [*text.replace(" ", "")]
    expected = (negamax(squares, "x") + 1) / 2
    position = tuple(board(text).tolist())
    assert tic_tac_toe.value(position, MINE, "perfect") == expected
    # against a random one no position is worth less
    assert tic_tac_toe.value(position, MINE, "random") >= expected


def test_optima():
    """The first player wins 191 of 192 games against a random opponent and draws the other; the
    second does not win against a perfect one.
    """
    assert make("perfect", True).optimum == make("perfect", False).optimum == 0.5
    assert make("random", True).optimum == pytest.approx(1 - 0.5 / 192)
    assert 0.9 < make("random", False).optimum < make("random", True).optimum


def test_a_value_by_hand():
    """x to move on "xo. xo. ..." wins at once; after "x.x oo. ..." nothing else than 3 is best
    against a perfect opponent.
    """
    assert tic_tac_toe.best_moves(tuple(board("xo. xo. ...").tolist()), "perfect") == [6]
    last = tuple(board("xox oxo ox.").tolist())
    assert tic_tac_toe.value(last, MINE, "random") == 1.0  # 1, 5 and 9
    two = tuple(board("xoo oxx x.. ").tolist()[:9])
    assert tic_tac_toe.value(two, THEIRS, "random") == 0.75  # o on 8: x wins on 9; on 9: a draw


@pytest.mark.ci
@pytest.mark.parametrize("opponent", ["random", "perfect"])
@pytest.mark.parametrize("first", [True, False])
def test_the_script_has_the_value(opponent, first):
    game = make(opponent, first)
    scores = np.array([x.score for x in play(game, game.instances(400, 1), seed=2)])
    assert abs(scores.mean() - game.optimum) <= 4 * scores.std() / 20 + 1e-6
    assert set(scores) <= ({0.5} if opponent == "perfect" else {0.0, 0.5, 1.0})


def random_player(instance, replies, rng):
    shown = (replies[-1] if replies else instance["prompt"]).strip()
    return f"{rng.choice([i for i in range(9) if shown[i] == '.']) + 1}\n"


def test_a_random_player_against_the_random_opponent():
    """The first player wins .585 of such games and draws .127: the score is .648."""
    game = make("random", True)
    scores = np.array([x.score for x in play(game, game.instances(2000, 0), random_player)])
    assert abs(scores.mean() - 0.6485) < 4 * scores.std() / np.sqrt(2000)


@pytest.mark.ci
def test_the_perfect_opponent_never_loses():
    """It prevents a win, and takes one that is the only best move."""
    game = make("perfect", True)
    scores = [x.score for x in play(game, game.instances(500, 0), random_player)]
    assert set(scores) == {0.0, 0.5}
    taken = episode("xox oo. x..", "9\n", opponent="perfect")
    assert set(taken.replies) <= {"xoxooox.x\n", "xoxoo.xox\n"}
    assert taken.rewards == [0] and taken.done
    kept = episode("x.. .o. ...", "3\n", "1\n", opponent="perfect")
    assert kept.replies[0] == "xox.o....\n"


def test_moves_of_the_random_opponent_are_uniform():
    """Eight squares are free; 800 games, 100 each with a deviation of 9.4."""
    game = make("random", True)
    played = play(game, game.instances(800, 0), lambda x, replies, rng: "1\n")
    count = np.bincount([x.replies[0].index("o") for x in played], minlength=9)
    assert count[0] == 0 and (abs(count[1:] - 100) < 40).all()


def test_a_win_ends_the_game():
    found = episode("xx. oo. ...", "3\n")
    assert found.replies == ["xxxoo....\n"] and found.rewards == [1] and found.done


def test_a_full_board_is_a_draw():
    found = episode("xox xoo ox.", "9\n")
    assert found.rewards == [0.5] and found.done


def test_the_last_square_may_win():
    assert episode("xox oxo ox.", "9\n").rewards == [1]


@pytest.mark.parametrize("turn", ["1\n", "0\n", "", "x\n", "22", "10\n"])
def test_no_free_square_loses(turn):
    found = episode("x.. .o. ...", turn)
    assert found.replies == ["x...o....\n"] and found.rewards == [0] and found.done
