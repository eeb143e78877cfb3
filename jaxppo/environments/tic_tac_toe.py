"""Tic-tac-toe against a random or a perfect opponent.

A turn is the number of a free square on a line, 1 to 9 in reading order:

    1 2 3
    4 5 6
    7 8 9

The answer is the board after the opponent's move, nine letters: "x" the policy's, "o"
the opponent's, "." free. A win has the reward 1, a draw 0.5, a loss 0; the rewards of
other turns are 0. A turn that is no free square loses the game.

The random opponent moves uniformly, the perfect one uniformly among the moves that are
best against a perfect player. The optimum is the value of the best policy: expectimax
over all boards (https://en.wikipedia.org/wiki/Expectiminimax).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxppo.environments import strings
from jaxppo.environments.text import Answer, Game, TextEnvironment, from_rows

LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
FREE, MINE, THEIRS = 0, 1, 2
POWERS = 3 ** np.arange(9)  # a board as a number
Opponent = Literal["random", "perfect"]
Board = tuple[int, ...]


def winner(board: Board) -> int:
    """MINE or THEIRS, if one of them has a line; otherwise FREE."""
    owners = (board[a] for a, b, c in LINES if board[a] == board[b] == board[c] != FREE)
    return next(owners, FREE)


def moves(board: Board) -> list[int]:
    """The free squares."""
    return [square for square, owner in enumerate(board) if owner == FREE]


def put(board: Board, square: int, player: int) -> Board:
    """The board after a move."""
    return (*board[:square], player, *board[square + 1 :])


@functools.cache
def value(board: Board, player: int, opponent: Opponent) -> float:
    """The policy's expected score if it plays its best from here; `player` moves next.

    >>> value((0,) * 9, MINE, "perfect")
    0.5
    """
    if (owner := winner(board)) != FREE or not moves(board):
        return {MINE: 1.0, THEIRS: 0.0, FREE: 0.5}[owner]
    following = [value(put(board, m, player), 3 - player, opponent) for m in moves(board)]
    if player == MINE:
        return max(following)
    return min(following) if opponent == "perfect" else sum(following) / len(following)


def best_moves(board: Board, opponent: Opponent) -> list[int]:
    """The policy's moves that have the largest value."""
    values = {m: value(put(board, m, MINE), THEIRS, opponent) for m in moves(board)}
    return [m for m, x in values.items() if x == max(values.values())]


@functools.cache
def perfect_replies() -> np.ndarray:
    """The opponent's best moves Bool[3⁹ 9] on each board, numbered in base 3."""
    table = np.zeros((3**9, 9), bool)
    seen: set[tuple[Board, int]] = set()  # who moves depends on who was first

    def visit(board: Board, player: int) -> None:
        if (board, player) in seen or winner(board) != FREE or not moves(board):
            return
        seen.add((board, player))
        if player == THEIRS:
            values = {m: value(put(board, m, THEIRS), MINE, "perfect") for m in moves(board)}
            row = int(np.dot(board, POWERS))
            table[row, [m for m, x in values.items() if x == min(values.values())]] = True
        for m in moves(board):
            visit(put(board, m, player), 3 - player)

    visit((FREE,) * 9, MINE)
    visit((FREE,) * 9, THEIRS)
    return table


def make_environment(opponent: Opponent, first: bool) -> TextEnvironment:
    """The game on instances {"board": Int[B 9]}, the policy to move."""
    lines = jnp.array(LINES)
    has_line = lambda board, player: (board[lines] == player).all(1).any()
    replies, powers = jnp.asarray(perfect_replies()), jnp.array(POWERS, jnp.int32)

    def step(board: Array, text: strings.String, key: Array, turn: Array):
        square = strings.find(strings.first_line(text), [str(i + 1) for i in range(9)])
        legal = (square >= 0) & (board[square] == FREE)
        board = board.at[jnp.where(legal, square, 9)].set(MINE, mode="drop")
        won, full = has_line(board, MINE), (board != FREE).all()
        allowed = board == FREE
        if opponent == "perfect":
            allowed &= replies[(board * powers).sum()]
        noise = jnp.where(allowed, jax.random.uniform(key, (9,)), -1.0)
        moves = legal & ~won & ~full
        board = board.at[jnp.where(moves, jnp.argmax(noise), 9)].set(THEIRS, mode="drop")
        lost = has_line(board, THEIRS) | ~legal
        done = won | lost | (board != FREE).all()
        reward = jnp.where(won, 1.0, jnp.where(done & ~lost, 0.5, 0.0))
        shown = jnp.concatenate(
            [jnp.frombuffer(b".xo", np.uint8)[board], jnp.array([10], np.uint8)]
        )
        return board, Answer(strings.String(shown, jnp.int32(10)), reward, done)

    return from_rows(
        lambda instance: instance["board"],
        step,
        max_turns=5 if first else 4,
        turn_length=2,
        reply_length=10,
        alphabet=b".xo\n",
    )


def make(opponent: Opponent = "random", first: bool = True) -> Game:
    """The game; `first`: the policy moves first, otherwise the opponent has moved.

    The script plays a best move at random.
    """

    def instances(number: int, seed: int) -> list[dict[str, Any]]:
        boards = np.zeros((number, 9), np.int32)
        if not first:  # all openings are best ones
            opened = np.random.default_rng(seed).integers(0, 9, number)
            boards[np.arange(number), opened] = THEIRS
        return [{"prompt": show(board), "board": board} for board in boards]

    def board_of(instance: Mapping[str, Any], replies: Sequence[str]) -> Board:
        shown = replies[-1] if replies else instance["prompt"]
        return tuple(".xo".index(letter) for letter in shown.strip())

    def script(instance: Mapping[str, Any], replies: Sequence[str], rng: np.random.Generator):
        return f"{rng.choice(best_moves(board_of(instance, replies), opponent)) + 1}\n"

    def random(instance: Mapping[str, Any], replies: Sequence[str], rng: np.random.Generator):
        return f"{rng.choice(moves(board_of(instance, replies))) + 1}\n"

    start = (FREE,) * 9
    opened = [start] if first else [put(start, square, THEIRS) for square in range(9)]
    optimum = sum(value(board, MINE, opponent) for board in opened) / len(opened)
    return Game(make_environment(opponent, first), instances, script, random, optimum)


def show(board: np.ndarray) -> str:
    """A board as the replies have it."""
    return "".join(".xo"[owner] for owner in board) + "\n"
