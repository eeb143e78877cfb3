"""Walk through a small maze to the goal.

The prompt is the grid, a line for each row: "#" wall, "." free, "G" goal. Below it, and
in every answer, stands where the policy is (column as a letter, row as a number) and
what it sees to the north, east, south and west: "b3.#G#". The outside is a wall.

A turn is a direction on a line, as a word or its first letter. A turn against a wall,
or one that is no direction, leaves the policy where it is. At the goal the episode ends
with the reward D / M: the length of the shortest path, by the number of moves. So the
best return is 1, on every instance; the rewards of other turns are 0.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxppo.environments import strings
from jaxppo.environments.text import Answer, Game, TextEnvironment, from_rows

WORDS = ("north", "east", "south", "west")
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # (row, column)
FREE, WALL, GOAL = 0, 1, 2
SIGNS = ".#G"


def make_environment(size: int, moves: int) -> TextEnvironment:
    """The game on instances {"grid": Int[B size size], "start": Int[B 2], "shortest":
    Int[B]}.
    """
    step_of = jnp.array([*MOVES, (0, 0)], jnp.int32)

    def step(state: dict[str, Array], text: strings.String, key: Array, turn: Array):
        line = strings.first_line(text)
        direction = jnp.maximum(strings.find(line, WORDS), strings.find(line, [*"nesw"]))
        grid = jnp.pad(state["grid"], 1, constant_values=WALL)
        target = state["start"] + step_of[jnp.where(direction >= 0, direction, 4)]
        look = lambda place: grid[place[0] + 1, place[1] + 1]
        place = jnp.where(look(target) == WALL, state["start"], target)
        around = jnp.stack([look(place + step_of[i]) for i in range(4)])
        shown = jnp.stack([ord("a") + place[1], ord("1") + place[0]]).astype(jnp.uint8)
        seen = jnp.frombuffer(SIGNS.encode(), np.uint8)[around]
        letters = jnp.concatenate([shown, seen, jnp.array([ord("\n")], jnp.uint8)])
        arrived = look(place) == GOAL
        reward = jnp.where(arrived, state["shortest"] / (turn + 1), 0.0)
        answer = Answer(strings.String(letters, jnp.int32(7)), reward, arrived)
        return state | {"start": place}, answer

    return from_rows(
        lambda instance: {name: instance[name] for name in ("grid", "start", "shortest")},
        step,
        max_turns=moves,
        turn_length=len("north\n"),
        reply_length=len("b3.#G#\n"),
        alphabet=(SIGNS + "\n" + "abcdefghi"[:size] + "123456789"[:size]).encode(),
    )


def distances(grid: np.ndarray) -> np.ndarray:
    """The length of the shortest path from each square to the goal, by breadth-first
    search; -1 where there is none.
    """
    found = np.full(grid.shape, -1)
    row, column = np.argwhere(grid == GOAL)[0]
    goal = (int(row), int(column))
    found[goal], queue = 0, deque([goal])
    while queue:
        here = queue.popleft()
        for _, there in neighbours(grid, here):
            if found[there] < 0:
                found[there] = found[here] + 1
                queue.append(there)
    return found


def neighbours(grid: np.ndarray, place: tuple[int, int]) -> list[tuple[int, tuple[int, int]]]:
    """(the number of the direction, the square) of each square one move away."""
    squares = [(i, (place[0] + down, place[1] + right)) for i, (down, right) in enumerate(MOVES)]
    inside = lambda square: min(square) >= 0 and max(square) < len(grid)
    return [(i, square) for i, square in squares if inside(square) and grid[square] != WALL]


def look_around(grid: np.ndarray, place: tuple[int, int]) -> str:
    """The line that says where the policy is and what it sees."""
    seen = {i: SIGNS[grid[square]] for i, square in neighbours(grid, place)}
    around = "".join(seen.get(i, SIGNS[WALL]) for i in range(4))
    return f"{chr(ord('a') + place[1])}{place[0] + 1}{around}\n"


def make_instance(rng: np.random.Generator, size: int, moves: int, walls: float) -> dict[str, Any]:
    """A maze in which a path of 1 to `moves` steps leads to the goal."""
    while True:
        grid = np.where(rng.random((size, size)) < walls, WALL, FREE).astype(np.int32)
        grid[tuple(rng.integers(0, size, 2))] = GOAL
        found = distances(grid)
        starts = np.argwhere((found >= 1) & (found <= moves))
        if len(starts):
            start = starts[rng.integers(len(starts))].astype(np.int32)
            rows = "".join("".join(SIGNS[x] for x in row) + "\n" for row in grid)
            place = (int(start[0]), int(start[1]))
            shortest = np.int32(found[place])
            prompt = rows + look_around(grid, place)
            return {"prompt": prompt, "grid": grid, "start": start, "shortest": shortest}


def make(size: int = 4, moves: int = 8, walls: float = 0.25) -> Game:
    """The game on grids of `size` × `size` (at most 9), with this share of walls.

    The script walks on a shortest path.
    """

    def instances(number: int, seed: int) -> list[dict[str, Any]]:
        rng = np.random.default_rng(seed)
        return [make_instance(rng, size, moves, walls) for _ in range(number)]

    def script(instance: Mapping[str, Any], replies: Sequence[str], rng: np.random.Generator):
        line = (replies[-1] if replies else instance["prompt"]).splitlines()[-1]
        place = (int(line[1]) - 1, ord(line[0]) - ord("a"))
        found = distances(instance["grid"])
        near = neighbours(instance["grid"], place)
        return WORDS[min(near, key=lambda pair: found[pair[1]])[0]] + "\n"

    def random(instance: Mapping[str, Any], replies: Sequence[str], rng: np.random.Generator):
        return f"{rng.choice(WORDS)}\n"

    return Game(make_environment(size, moves), instances, script, random, 1.0)
