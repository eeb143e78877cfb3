"""Train a policy in an environment: a supervised stage on scripted play, then the
policy gradient on episodes of its own.

The folder has the same form as that of a task (`stages.py`). result.json has the mean
score of greedy and of sampled episodes on newly drawn instances, of both stages, and
that of the game's script. A small game has few instances: training has seen them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxppo import algorithms
from jaxppo.ablation.statistics import mean_interval
from jaxppo.data import prompts
from jaxppo.data.prompts import PromptSet
from jaxppo.data.rows import Rows, from_ids
from jaxppo.environments import ENVIRONMENTS, play, text
from jaxppo.environments.text import Game, Player, Tables
from jaxppo.errors import UserError
from jaxppo.parallel import processes
from jaxppo.pretrained.tiny import byte_tokenizer
from jaxppo.rewards import in_program
from jaxppo.run import episodes, files, load, log, validation
from jaxppo.run.policy import Policy
from jaxppo.tasks import Task, TaskConfig, stages
from jaxppo.tasks.optimisation import train_and_measure
from jaxppo.tasks.rewards import Reward
from jaxppo.types import Environment, TrainState

TASK = Task("", "", ("score",))
SHOWN = 5  # episodes in result.json


@dataclass(frozen=True)
class EpisodeConfig(TaskConfig):
    """Settings of a policy in an environment."""

    RANGES: ClassVar = {
        "script_share": "[0, 1]",
        **dict.fromkeys(("sft_steps", "sft_episodes", "instances"), "(0, inf)"),
    }
    UNREAD: ClassVar = {
        **dict.fromkeys(
            ("reward", "data", "tokens", "prompt_length", "response_length", "prompt_format"),
            "the environment has its own",
        ),
        "sft_examples": "use --sft-episodes",
        "policy_examples": "use --instances",
    }

    environment: str = "guess"
    """name of an environment (`jaxppo.environments.ENVIRONMENTS`)"""
    game: tuple[str, ...] = ()
    """options of the environment, such as n=20"""
    script_share: float = 0.0
    """share of the turns that the script plays in the supervised stage's episodes; the
    others are random
    """
    sft_episodes: int = 2000
    """episodes of the supervised stage"""
    instances: int = 4096
    """instances that the policy is trained on; others are drawn for the test"""


def make_game(options: EpisodeConfig) -> Game:
    """The game that the settings name. Raises UserError for unknown ones."""
    make = algorithms.look_up(ENVIRONMENTS, "environment", options.environment)
    given: dict[str, Any] = {}
    for pair in options.game:
        name, _, value = pair.partition("=")
        numbers = [int(x) for x in value.split("-") if x.isdigit()]
        known = {"True": True, "False": False} | {str(x): x for x in numbers}
        given[name] = known.get(value, tuple(numbers) if len(numbers) == 2 else value)
    try:
        return make(**given)
    except (TypeError, ValueError) as error:
        raise UserError(f"--game {' '.join(options.game)}: {error}") from None


def run(options: EpisodeConfig) -> dict[str, Any]:
    """Run both stages, measure them and return the contents of result.json. A finished
    stage is not run again.
    """
    game = make_game(options)
    if options.tiny:
        options = dataclasses.replace(stages.tiny_options(options), sft_episodes=16, instances=64)
    number = (options.instances, options.test_rows, options.test_rows)
    drawn = [game.instances(n, options.seed + k) for n, k in zip(number, (0, 10**6, 10**7))]
    options = dataclasses.replace(
        options,
        task="episodes",
        response_length=episodes.response_length(game),
        prompt_length=max(len(x["prompt"].encode()) for part in drawn for x in part),
    )
    root = stages.check(options)
    stages.check_resumed(options, TASK, root)
    load.use_compilation_cache()
    if not options.model and not (root / "start").exists() and processes.is_main():
        stages.save_new_network(options, root, byte_tokenizer())
    processes.wait_for_all("start")
    stages.train_supervised(
        options, TASK, root, lambda config, policy: scripted_rows(config, policy, game)
    )
    result = optimise(options, root, game, drawn)
    if processes.is_main():
        result |= stages.run_info(options, root)
        stages.write_result(options, root, result)
        show(result, root)
    return result


def mixed(game: Game, share: float) -> Player:
    """A player whose turns are the script's with this probability, else random."""

    def player(instance: Mapping[str, Any], replies: Sequence[str], rng: np.random.Generator):
        chosen = game.script if rng.random() < share else game.random
        return chosen(instance, replies, rng)

    return player


def scripted_rows(config: EpisodeConfig, policy: Policy, game: Game) -> tuple[Rows, Rows]:
    """Rows of scripted episodes, for training and validation. What the policy would
    have written weighs 1, the prompt and the answers 0.
    """
    player, tables = mixed(game, config.script_share), episodes.tables_of(policy)

    def rows(number: int, seed: int) -> Rows:
        played = play.play(game, game.instances(number, seed), player, seed=seed)
        pairs = [episode_ids(x, policy, tables) for x in played]
        found = from_ids([ids for ids, _ in pairs], config.length)
        weight = np.zeros_like(found.extra["weight"])
        for row, (_, own) in zip(weight, pairs, strict=True):
            row[-len(own) :] = own
        return dataclasses.replace(found, extra={"weight": weight})

    seed = 10**8 + 2 * config.seed
    return rows(config.sft_episodes, seed), rows(config.test_rows, seed + 1)


def episode_ids(
    episode: play.Episode, policy: Policy, tables: Tables
) -> tuple[list[int], list[float]]:
    """(token ids as a rollout has them, whether the policy wrote each)."""
    encode = policy.tokenizer.encode
    ids = encode(episode.instance["prompt"])
    own = [0.0] * len(ids)
    token = np.asarray(tables.token)
    for number, (turn, reply) in enumerate(zip(episode.turns, episode.replies, strict=True)):
        written = encode(turn)
        last = number + 1 == len(episode.turns)
        answer = [] if last else token[list(reply.encode())].tolist()
        ids += written + answer
        own += [1.0] * len(written) + [0.0] * len(answer)
    return ids, own


def optimise(
    options: EpisodeConfig, root: Path, game: Game, drawn: Sequence[list[dict[str, Any]]]
) -> dict[str, Any]:
    """Optimise the policy in the environment, and measure it before and after. `drawn`:
    instances for training, validation and test.
    """
    settings, policy = load.load_policy(stages.policy_config(options, TASK, root))
    environment = episodes.on_tokens(game, policy)
    parts = algorithms.make_parts(settings, in_program.episode_score)
    parts = parts._replace(environment=environment)
    training, held_out, test = (encode(settings, policy, part) for part in drawn)
    place = files.run_folder(root, "policy", resume=settings.resume)
    before, after, best = train_and_measure(
        settings,
        policy,
        Reward(in_program.episode_score),
        training,
        folder=place,
        measure=lambda state: measure(settings, policy, environment, state, test),
        evaluate=validation.make_reward_validation(
            dataclasses.replace(settings, eval_samples=1), policy, parts, held_out
        ),
        validation=held_out,
        environment=environment,
    )
    load.save_model(settings, policy, best, place / "model")
    gain = {name: [*mean_interval(after[name] - before[name])] for name in ("score", "sampled")}
    return {
        "environment": options.environment,
        "game": list(options.game),
        "optimum": game.optimum,
        "script": float(np.mean([x.score for x in play.play(game, drawn[-1])])),
        "supervised": means(before),
        "policy": means(after),
        "gain": gain,
        "test_rows": len(after["score"]),
        "best_step": int(best.step),
        "curve": [round(row["reward"], 4) for row in files.read_metrics(place)],
        "samples": after["episodes"],
    }


def encode(config: EpisodeConfig, policy: Policy, instances: list[dict[str, Any]]) -> PromptSet:
    """The prompts of instances, with their arrays as `extra`."""
    texts = [x["prompt"] for x in instances]
    length, extra = config.prompt_length, text.stack(instances)
    return prompts.encode(texts, policy.tokenizer, length, extra=extra, too_long="error")


def measure(
    config: EpisodeConfig,
    policy: Policy,
    environment: Environment,
    state: TrainState,
    instances: PromptSet,
) -> dict[str, Any]:
    """The score of a greedy and of a sampled episode on each instance, and texts of the
    first greedy ones.
    """
    found: dict[str, Any] = {"episodes": []}
    for name, greedy in (("score", True), ("sampled", False)):
        scores, seed = [], validation.SEED
        own = (config, policy, environment, state, instances)
        for done in episodes.rollouts(*own, seed=seed, greedy=greedy):
            scores.append(done.rewards.sum(1))
            if greedy and not found["episodes"]:
                texts = episodes.as_texts(done, environment, policy.tokenizer.decode_batch)
                found["episodes"] = [shown(episode) for episode in texts[:SHOWN]]
        found[name] = np.concatenate(scores)[: len(instances.tokens)]
    return found


def shown(episode: play.Episode) -> dict[str, Any]:
    """An episode as text, with the answers in ⟦ ⟧, and its score."""
    pairs = zip(episode.turns, episode.replies, strict=True)
    told = "".join(turn + (f"⟦{reply}⟧" if reply else "") for turn, reply in pairs)
    return {"prompt": episode.instance["prompt"], "response": told, "score": episode.score}


def means(found: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(np.mean(found[name])) for name in ("score", "sampled")}


def show(result: Mapping[str, Any], root: Path) -> None:
    """Print some episodes and the gain."""
    cells = [[row["prompt"], row["response"], f"{row['score']:.3g}"] for row in result["samples"]]
    log.print_table("test episodes", ["prompt", "episode", "score"], cells)
    gain, low, high = result["gain"]["score"]
    before, after = (result[stage]["score"] for stage in ("supervised", "policy"))
    print(
        f"score of greedy episodes: {before:.3f} -> {after:.3f} (gain {gain:+.3f}, 95 % interval "
        f"{low:+.3f} to {high:+.3f} over {result['test_rows']} instances); "
        f"script {result['script']:.3f}"
    )
    print(f"written: {root / 'result.json'}")
