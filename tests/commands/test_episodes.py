"""Episodes at the terminal."""

import json
import sys

import numpy as np
import pytest
from runs import a_run

from jaxppo import commands
from jaxppo.commands import episodes
from jaxppo.environments import guess
from jaxppo.environments.play import Episode
from jaxppo.errors import UserError
from jaxppo.tasks.episodes import EpisodeConfig

GAME = guess.make(n=10, guesses=2)
EPISODE = Episode({"prompt": "1-10\n"}, ["5\n", "x\x1b"], ["lower\n", ""], [0.0, np.nan], False)


def test_a_person_plays(monkeypatch):
    """Two episodes, and the beginning of a third."""
    numbers = iter([3, 9, 9])
    instances = lambda number, seed: [{"prompt": "1-10\n", "number": np.int32(next(numbers))}]
    said: list[str] = []
    typed = iter(["5", "3", "1", "2", "7"])
    game = GAME._replace(instances=instances)
    first, second = episodes.play_person(game, typed, said.append, seed=0)
    assert said == ["1-10", "lower", "right", "1-10", "higher", "higher", "1-10", "higher"]
    assert (first.turns, first.rewards) == (["5\n", "3\n"], [0.0, 1.0])
    assert second.score == 0
    # (2² − 1) / 10 numbers are found
    assert episodes.score(first, game) == "score 1 (rewards 0, 1); the optimum is 0.3 on average"


def test_an_episode_in_lines():
    assert episodes.lines(EPISODE, GAME) == [
        "  prompt  1-10 ",
        "  turn 1  5  -> lower   (reward 0)",
        "  turn 2  x\\x1b  (reward nan)",
        "score nan (rewards 0, nan); it did not end; the optimum is 0.3 on average",
    ]
    found = json.loads(episodes.as_json(EPISODE))
    assert found["turns"] == ["5\n", "x\x1b"] and found["rewards"] == [0.0, None]


def test_the_game_of_a_run(tmp_path):
    task = a_run(tmp_path / "task", EpisodeConfig(environment="guess", game=("n=7", "guesses=2")))
    optimum = lambda *given: episodes.find_game(*given).optimum
    assert optimum(task, "", ()) == 3 / 7
    assert optimum(task, "", ("n=3", "guesses=1")) == 1 / 3
    assert optimum(task, "bandit_with_memory", ()) == 0.75
    assert optimum(None, "guess", ("n=5", "guesses=1")) == 0.2
    assert episodes.find_game(a_run(tmp_path / "other"), "", ()) is None
    with pytest.raises(UserError, match="unknown environment 'chess'"):
        episodes.find_game(None, "chess", ())


def sampled(monkeypatch, *words: str) -> int | None:
    monkeypatch.setattr(sys, "argv", ["jaxppo", "sample", *words])
    try:
        commands.main()
    except SystemExit as stop:
        return stop.code


def test_the_command(tmp_path, monkeypatch, capsys):
    lines = iter(["a", "b"])
    monkeypatch.setattr(
        "builtins.input", lambda prompt: next(lines, None) or (_ for _ in ()).throw(EOFError)
    )
    sampled(monkeypatch, "--environment", "bandit_with_memory", "--game", "arms=2")
    said = capsys.readouterr().out
    assert "\nscore " in said and "the optimum is 0.75 on average" in said
    run = str(a_run(tmp_path / "run"))
    for words, problem in (
        ([], "no run; give its folder, or --environment"),
        ([run, "--game", "n=3"], "name it with --environment"),
        (["--environment", "guess", "--chat"], "leave out --chat"),
        ([run, "a", "--environment", "guess"], "leave out PROMPT"),
        (["--environment", "guess", "--game", "m=3"], "--game m=3: "),
    ):
        assert sampled(monkeypatch, *words) == 2
        assert problem in capsys.readouterr().err
