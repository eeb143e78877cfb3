"""The rewards of the tasks, by name: metrics in the program, judges of decoded text on
the host.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxppo.errors import UserError
from jaxppo.rewards import in_program, text
from jaxppo.rewards import metrics as token_metrics
from jaxppo.rewards.host import on_host
from jaxppo.rollout import reference_params
from jaxppo.run import load
from jaxppo.run.load import Policy
from jaxppo.tasks import TaskConfig, get_task, metrics
from jaxppo.types import RewardFn


class Reward(NamedTuple):
    """A reward and the parameters that it is called with."""

    fn: RewardFn
    params: Any = None


def _on_tokens(name: str) -> Callable[[TaskConfig, Policy], Reward]:
    """A metric of `rewards.metrics` on token ids, in the program."""

    def make(options: TaskConfig, policy: Policy) -> Reward:

        table: dict[str, token_metrics.Metric] = {
            "bleu": token_metrics.bleu,
            "rouge_l": token_metrics.rouge_l,
            "token_f1": token_metrics.token_f1,
            "exact": token_metrics.exact_match,
            "edit": lambda found, wanted: -token_metrics.error_rate(found, wanted),
        }
        return Reward(token_metrics.as_reward(table[name], eos=policy.tokenizer.eos_id), {})

    return make


def _on_text(
    judge: Callable[[], Callable[[str, str], float]],
) -> Callable[[TaskConfig, Policy], Reward]:
    """A judge of decoded response and reference, on the host; space around them does
    not count.
    """

    def make(options: TaskConfig, policy: Policy) -> Reward:

        score = judge()
        call = lambda prompt, response, reference: score(response.strip(), reference.strip())
        return Reward(on_host(call, policy.tokenizer.decode_batch, references=True), {})

    return make


def _text(name: str, *options: str, sign: float = 1.0) -> Callable[[], Callable[[str, str], float]]:
    """The judge of that name in `rewards.text`."""

    def make():

        judge = getattr(text, name)(*options)
        return lambda response, reference: sign * judge(response, reference)

    return make


def _of_counts(
    name: str, score: Callable[[float, float], float]
) -> Callable[[], Callable[[str, str], float]]:
    """A score of a row's counts by the metric of that name: (2 · common, found +
    wanted).
    """

    def make():

        rows = metrics.METRICS[name].rows
        return lambda response, reference: float(score(*rows(response, reference)))

    return make


def _f1(common: float, both: float) -> float:
    """A row's own F1; 1 where neither has an entity."""
    return common / both if both else 1.0


def _gain(reached: float) -> Callable[[float, float], float]:
    """A row's part in raising the F1 of all rows above the one reached: 2 · common -
    reached · (found + wanted).

    The row's own F1 says something else: where there is no entity, it rewards silence
    with all there is. With this one, naming an entity pays when it is right with a
    probability above reached / 2, which is when it raises the F1 of all rows (Lipton et
    al. 2014, https://arxiv.org/abs/1402.1892).
    """
    return lambda common, both: common - reached * both


def _trained(options: TaskConfig, policy: Policy) -> Reward:
    """A reward model's score, in the program."""

    model, params = load.load_reward_model(options, policy.tokenizer)
    return Reward(in_program.reward_model(model), params)


def _fluency(options: TaskConfig, policy: Policy) -> Reward:
    """Minus the log perplexity of the response for the policy as it was when the run
    began, in the program; at worst -10.
    """

    return Reward(
        in_program.fluency(policy.model, options, cap=10.0),
        reference_params(policy.params, policy.frozen),
    )


def _clean() -> Callable[[str, str], float]:
    """Minus the probability that the response is profane."""

    judge = text.profanity()
    return lambda response, reference: -judge(response)


def _vader() -> Callable[[str, str], float]:
    """VADER's sentiment of the response alone."""

    judge = text.vader()
    return lambda response, reference: judge(response)


REWARDS: dict[str, Callable[[TaskConfig, Policy], Reward]] = {
    **{name: _on_tokens(name) for name in ("bleu", "rouge_l", "token_f1", "exact", "edit")},
    "text_bleu": _on_text(_text("sentence_bleu")),
    "text_chrf": _on_text(_text("chrf")),
    "text_rouge_l": _on_text(_text("rouge", "rougeL")),
    "text_wer": _on_text(_text("word_error_rate", sign=-1.0)),
    "vader": _on_text(_vader),
    "clean": _on_text(_clean),
    "fluency": _fluency,
    "model": _trained,
    "entity_f1": _on_text(_of_counts("entity_f1", _f1)),
    "named_f1": _on_text(_of_counts("named_f1", _f1)),
    # about what a small model reaches
    "named_gain": _on_text(_of_counts("named_f1", _gain(0.2))),
}


def reward_name(options: TaskConfig) -> str:
    """The name of the reward in the options, or else of the task's own. Raises
    UserError for one that is not in the table.
    """
    name = options.reward or get_task(options).reward
    if name not in REWARDS:
        raise UserError(f"--reward {name!r}: choose one of {', '.join(REWARDS)}")
    if name == "model" and not options.reward_model:
        raise UserError(
            "--reward model needs --reward-model RUN, the folder of a run of experiments/reward_model.py"
        )
    return name


def make_reward(options: TaskConfig, policy: Policy) -> Reward:
    """The reward that the options name, or the task's own. Raises UserError for a name
    that is not in the table.
    """
    return REWARDS[reward_name(options)](options, policy)
