"""Mazes and their shortest paths."""

import functools
import itertools

import numpy as np
import pytest

from jaxppo.environments import maze
from jaxppo.environments.play import play

#     a b c
#   1 . # G
#   2 . # .
#   3 . . .
GRID = np.array([[0, 1, 2], [0, 1, 0], [0, 0, 0]], np.int32)
GAME = maze.make(size=3, moves=8)
INSTANCE = {"prompt": "", "grid": GRID, "start": np.array([0, 0], np.int32)}
INSTANCE["shortest"] = np.int32(6)


def episode(*turns: str):
    """An episode with these turns; then it waits."""
    said = itertools.chain(turns, itertools.repeat("wait\n"))
    return play(GAME, [INSTANCE], lambda *_: next(said))[0]


def test_distances():
    assert maze.distances(GRID).tolist() == [[6, -1, 0], [5, -1, 1], [4, 3, 2]]


@functools.cache
def brute_force(grid: bytes, size: int, place: tuple[int, int], left: int) -> int:
    """The fewest moves to the goal, of all sequences of `left` moves; 99 = none arrives."""
    squares = np.frombuffer(grid, np.int32).reshape(size, size)
    if squares[place] == maze.GOAL:
        return 0
    if not left:
        return 99
    near = maze.neighbours(squares, place)
    return 1 + min((brute_force(grid, size, x, left - 1) for _, x in near), default=99)


def test_the_shortest_path_of_generated_mazes():
    """The search, the instance and the script's walk agree with all sequences of moves."""
    game = maze.make(size=4, moves=6, walls=0.3)
    instances = game.instances(40, 0)
    for x, played in zip(instances, play(game, instances), strict=True):
        place = (int(x["start"][0]), int(x["start"][1]))
        assert x["shortest"] == brute_force(x["grid"].tobytes(), 4, place, 6) <= 6
        assert (len(played.turns), played.score) == (x["shortest"], 1.0)
        rows = x["prompt"].splitlines()
        assert [len(row) for row in rows] == [4, 4, 4, 4, 6] and "".join(rows).count("G") in (1, 2)
        assert rows[4] + "\n" == maze.look_around(x["grid"], place)


def test_what_the_policy_sees():
    """Column and row, and the squares to the north, east, south and west; walls hold it."""
    found = episode("south\n", "s\n", "east\n", "north\n", "e\n", "n\n", "n\n")
    assert found.replies == [
        "a2.#.#\n", "a3..##\n", "b3#.#.\n", "b3#.#.\n", "c3.##.\n", "c2G#.#\n", "c1##.#\n",
    ]  # fmt: skip
    assert found.rewards == pytest.approx([0] * 6 + [6 / 7]) and found.done  # a move too many


@pytest.mark.parametrize("turn", ["", "\n", "up\n", "S\n", "southh\n", "s e", "ss\n"])
def test_a_turn_that_is_no_direction(turn):
    found = episode(turn)
    assert found.replies[0] == "a1##.#\n" and found.rewards == [0] * 8 and found.done


def test_replies_are_what_the_host_says():
    found = episode("s\n", "s\n", "e\n", "e\n", "n\n", "n\n")
    walk = [(1, 0), (2, 0), (2, 1), (2, 2), (1, 2), (0, 2)]
    assert found.replies == [maze.look_around(GRID, place) for place in walk]
    assert found.score == 1
