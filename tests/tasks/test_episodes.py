import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from jaxppo.environments import ENVIRONMENTS, play, text
from jaxppo.errors import UserError
from jaxppo.pretrained.tiny import byte_tokenizer
from jaxppo.tasks import episodes
from jaxppo.tasks.episodes import EpisodeConfig

POLICY = SimpleNamespace(tokenizer=byte_tokenizer(), shape=SimpleNamespace(vocab_size=257))


def test_options_of_the_game():
    make = lambda *options: episodes.make_game(EpisodeConfig(game=options))
    assert make("n=7", "guesses=3").optimum == 1.0
    assert make("n=14", "guesses=3").optimum == 0.5
    calculator = EpisodeConfig(environment="calculator", game=("digits=1-2", "tool=False"))
    prompts = [x["prompt"] for x in episodes.make_game(calculator).instances(20, 0)]
    assert max(map(len, prompts)) <= len("99*99=")
    for wrong in ("size=3", "n=many"):
        with pytest.raises(UserError, match="--game"):
            make(wrong)
    with pytest.raises(UserError, match="guess"):
        episodes.make_game(EpisodeConfig(environment="chess"))


def test_what_the_policy_would_have_written_weighs_one():
    """ "1-7", a line end, "4", a line end, the answer, "6", a line end: nothing is read after the
    last turn.
    """
    episode = play.Episode(
        {"prompt": "1-7\n"}, ["4\n", "6\n"], ["higher\n", "right\n"], [0, 1], True
    )
    ids, own = episodes.episode_ids(episode, POLICY, text.make_tables(POLICY.tokenizer))
    assert POLICY.tokenizer.decode_batch([ids])[0] == "1-7\n4\nhigher\n6\n"
    assert own == [0.0] * 4 + [1.0] * 2 + [0.0] * 7 + [1.0] * 2


def test_a_share_of_the_turns_is_scripted():
    """Of 4,000 turns of the bandit, whose script is right in the second turn and random in the
    first: .3 + .7 / 2 = .65 right in the second.
    """
    game = ENVIRONMENTS["bandit_with_memory"]()
    played = play.play(game, game.instances(2000, 0), episodes.mixed(game, 0.3))
    second = np.mean([x.rewards[1] > 0 for x in played])
    assert second == pytest.approx(0.65, abs=0.04)
    assert np.mean([x.rewards[0] > 0 for x in played]) == pytest.approx(0.5, abs=0.04)


@pytest.mark.ci
def test_both_stages(tmp_path):
    options = EpisodeConfig(
        environment="bandit_with_memory", tiny=True, name="bandit", runs=str(tmp_path),
        tokens="bytes", steps=2, sft_steps=2, eval_every=1, save_every=1, lora=0,
        results=str(tmp_path / "results"),
    )  # fmt: skip
    found = episodes.run(options)
    assert found["optimum"] == 0.75 and 0 <= found["policy"]["score"] <= 1
    assert found["script"] == pytest.approx(0.75, abs=0.3)  # of 8 instances
    saved = json.loads((tmp_path / "bandit" / "result.json").read_text())
    assert saved["gain"] == found["gain"] and len(saved["samples"]) == 5
    again = episodes.run(replace(options, resume=True))
    assert again["policy"] == found["policy"]
