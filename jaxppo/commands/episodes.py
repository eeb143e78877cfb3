"""Episodes at the terminal: a person, or a run's policy, plays an environment."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxppo.data import table
from jaxppo.environments import play
from jaxppo.environments.play import Episode
from jaxppo.environments.text import Game
from jaxppo.run import episodes, files, load
from jaxppo.run.files import printable, printable_lines
from jaxppo.tasks.episodes import EpisodeConfig, make_game

Write = Callable[[str], Any]


def find_game(run: Path | None, environment: str, game: Sequence[str]) -> Game | None:
    """The game of these names, or else that of the run's task; None if it has none."""
    options = EpisodeConfig(environment=environment, game=tuple(game))
    if run is not None and not environment:
        stored = json.loads((run / "config.json").read_text())
        if not stored.get("environment"):
            return None
        named = stored["environment"], tuple(game) or tuple(stored.get("game", ()))
        options = EpisodeConfig(environment=named[0], game=named[1])
    return make_game(options)


def play_run(
    run: Path, game: Game, *, number: int, seed: int, temperature: float | None, **which: Any
) -> list[Episode]:
    """What the run's policy plays on new instances. `which`: checkpoint, raw."""
    config, policy, state = load.restore(run, **which)
    config = dataclasses.replace(config, temperature=temperature or config.temperature)
    columns = table.read_columns(game.instances(number, seed))
    prompts = episodes.encode(config, policy, columns, game)
    world = episodes.on_tokens(game, policy)
    own = (config, policy, world, state, prompts)
    return episodes.play(*own, seed=seed, greedy=temperature == 0)


def play_person(game: Game, typed: Iterator[str], write: Write, *, seed: int) -> Iterator[Episode]:
    """Let a person play, a typed line a turn. Yields each finished episode, until there
    are no more lines.
    """

    def player(instance: Mapping[str, Any], replies: Sequence[str], rng: np.random.Generator):
        write(printable_lines(replies[-1] if replies else instance["prompt"]).removesuffix("\n"))
        if (line := next(typed, None)) is None:
            raise EOFError
        return f"{line}\n"

    for number in itertools.count(seed):
        try:
            (episode,) = play.play(game, game.instances(1, number), player, seed=number)
        except EOFError:
            return
        if episode.replies[-1]:
            write(printable_lines(episode.replies[-1]).removesuffix("\n"))
        yield episode


def lines(episode: Episode, game: Game) -> list[str]:
    """An episode, a line a turn, and its score."""
    shown = [f"  {'prompt':8}{printable(episode.instance['prompt'])}"]
    turns = zip(episode.turns, episode.replies, episode.rewards, strict=True)
    for number, (turn, reply, reward) in enumerate(turns, 1):
        answer = f" -> {printable(reply)}" if reply else ""
        shown.append(f"  {f'turn {number}':8}{printable(turn)}{answer}  (reward {reward:.3g})")
    return [*shown, score(episode, game)]


def score(episode: Episode, game: Game) -> str:
    """The score of an episode beside the optimum.

    >>> game = Game(None, None, None, None, 0.75)
    >>> score(Episode({}, ["1", "2"], ["higher", "right"], [0.0, 1.0], True), game)
    'score 1 (rewards 0, 1); the optimum is 0.75 on average'
    """
    rewards = ", ".join(f"{x:.3g}" for x in episode.rewards)
    ended = "" if episode.done else "; it did not end"
    best = f"the optimum is {game.optimum:.3g} on average"
    return f"score {episode.score:.3g} (rewards {rewards}){ended}; {best}"


def as_json(episode: Episode) -> str:
    """An episode as a JSON object in one line."""
    names = {"prompt": episode.instance["prompt"], "turns": episode.turns}
    names |= {"replies": episode.replies, "rewards": episode.rewards}
    return json.dumps(files.json_safe({**names, "score": episode.score, "done": episode.done}))
