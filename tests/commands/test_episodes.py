"""Episodes at the terminal."""

import json
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from runs import RUN, a_run

from jaxppo import commands
from jaxppo.commands import episodes
from jaxppo.environments import guess
from jaxppo.environments.play import Episode
from jaxppo.errors import UserError
from jaxppo.run import load
from jaxppo.run.checkpoint import Checkpoints
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


@pytest.fixture(scope="module")
def run(tmp_path_factory, moved):
    """A run that was saved before its first step. Its responses have the bandit's 2 · (1 + 1)
    slots.
    """
    config = replace(RUN, response_length=4)
    folder = a_run(tmp_path_factory.mktemp("runs") / "bandit", config)
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(moved, score=None)
    checkpoints.close()
    return folder


@pytest.mark.ci
def test_a_run_plays(run, monkeypatch, capsys):
    """Two episodes, the same ones with the same seed. Greedy ones begin alike, for their prompts
    are the same.
    """

    def play(*words):
        named = ("--environment", "bandit_with_memory", "--episodes", "2", "--seed", "3")
        assert not sampled(monkeypatch, str(run), *named, *words)
        return capsys.readouterr().out

    monkeypatch.setattr(load, "restore", cache(load.restore))  # once for three commands
    said = play("--json")
    one, other = (json.loads(line)["turns"] for line in said.splitlines())
    assert len(one) == len(other) == 2 and one[0] != other[0]
    assert play("--json") == said
    lines = play("--temperature", "0").splitlines()
    assert [line for line in lines if line.startswith("episode")] == ["episode 1", "episode 2"]
    assert lines[1] == "  prompt  ab" and "the optimum is 0.75 on average" in lines[-1]
    first = [line.split("  ->")[0] for line in lines if line.startswith("  turn 1  ")]
    assert len(first) == 2 and first[0] == first[1]
