"""Rewards of the tasks by name: metrics in the program, judges of text on the host."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxppo.config import RunConfig
from jaxppo.data.examples import Split
from jaxppo.data.sentiment import Reviews
from jaxppo.errors import UserError
from jaxppo.models import text_classifier
from jaxppo.parallel import processes
from jaxppo.rewards import answers, classifier, in_program, text
from jaxppo.rewards import metrics as token_metrics
from jaxppo.rewards.function import Weights
from jaxppo.rewards.host import on_host
from jaxppo.rollout import reference_params
from jaxppo.run import checkpoint, load
from jaxppo.run.policy import Policy
from jaxppo.tasks import TaskConfig, get_task, metrics
from jaxppo.types import RewardFn


class Reward(NamedTuple):
    """A reward function and its parameters."""

    fn: RewardFn
    params: Any = None
    weights: Weights = ()  # of named scores (`Parts.score_weights`)


MakeReward = Callable[[TaskConfig, Policy], Reward]
TextJudge = Callable[[str, str], Any]  # (response, reference) -> score, or scores by name


def _on_tokens(metric: token_metrics.Metric) -> MakeReward:
    """A metric of token ids, in the program."""
    return lambda options, policy: Reward(
        token_metrics.as_reward(metric, eos=policy.tokenizer.eos_ids), {}
    )


def _on_text(make_judge: Callable[[], TextJudge], weights: Weights = ()) -> MakeReward:
    """A judge of decoded text, on the host. Outer spaces do not count."""
    names = [name for name, _ in weights]

    def make(options: TaskConfig, policy: Policy) -> Reward:
        judge = make_judge()
        call = lambda prompt, response, reference: judge(response.strip(), reference.strip())
        decode = policy.tokenizer.decode_batch
        return Reward(on_host(call, decode, references=True, scores=names), {}, weights)

    return make


def _response_only(
    make_judge: Callable[[], Callable[[str], float]], sign: float = 1.0
) -> Callable[[], TextJudge]:
    """A judge that does not read the reference."""

    def make() -> TextJudge:
        judge = make_judge()
        return lambda response, reference: sign * judge(response)

    return make


def _negated_wer() -> TextJudge:
    rate = text.word_error_rate()
    return lambda response, reference: -rate(response, reference)


def _of_counts(score: Callable[[float, float], float]) -> MakeReward:
    """A score of a row's entity counts: (2 · common, found + wanted)."""
    rows = metrics.METRICS["named_f1"].rows
    judge = lambda response, reference: float(score(*rows(response, reference)))
    return _on_text(lambda: judge)


def _f1(common: float, both: float) -> float:
    """The row's own F1; 1 where neither side has an entity."""
    return common / both if both else 1.0


def _f1_gain(common: float, both: float, *, reached: float = 0.5) -> float:
    """How much a row raises the F1 of all rows above the one reached:
    2 · common − reached · (found + wanted). Greedy responses of a fine-tuned SmolLM2
    reach .5.

    A row's own F1 rewards silence fully where there is no entity. Here naming an entity
    pays if it is right with a probability above reached / 2, which is when it raises
    the F1 of all rows (Lipton et al. 2014, https://arxiv.org/abs/1402.1892).
    """
    return common - reached * both


def _reward_model(options: TaskConfig, policy: Policy) -> Reward:
    model, params = load.load_reward_model(options, policy.tokenizer)
    return Reward(in_program.reward_model(model), params)


def _fluency(options: TaskConfig, policy: Policy) -> Reward:
    """Minus the log perplexity under the initial policy, at worst -10."""
    fn = in_program.fluency(policy.model, options, cap=10.0)
    return Reward(fn, reference_params(policy.frozen))


# Judges of decoded text, made by functions that import their packages.
JUDGES: dict[str, Callable[[], TextJudge]] = {
    "text_bleu": text.sentence_bleu,
    "text_chrf": text.chrf,
    "text_rouge_l": partial(text.rouge, "rougeL"),
    "text_wer": _negated_wer,
    "vader": _response_only(text.vader),
    "clean": _response_only(text.profanity, -1.0),  # a penalty on profanity
    "reverse_text": lambda: answers.reversed_text,
    "countdown": lambda: answers.countdown,
    "gsm8k": lambda: answers.gsm8k,
}

# Of judges with named scores. TinyZero gives .1 for an answer in tags and 1 for a right
# one.
WEIGHTS: dict[str, Weights] = {"countdown": (("format", 0.1), ("result", 0.9))}

REWARDS: dict[str, MakeReward] = {
    **{name: _on_text(judge, WEIGHTS.get(name, ())) for name, judge in JUDGES.items()},
    "bleu": _on_tokens(token_metrics.bleu),
    "rouge_l": _on_tokens(token_metrics.rouge_l),
    "token_f1": _on_tokens(token_metrics.token_f1),
    "exact": _on_tokens(token_metrics.exact_match),
    "edit": _on_tokens(lambda *pair: -token_metrics.error_rate(*pair)),
    "fluency": _fluency,
    "model": _reward_model,
    "named_f1": _of_counts(_f1),
    "named_gain": _of_counts(_f1_gain),
}


def reward_name(options: TaskConfig) -> str:
    """Return the name of the reward in the options, or of the task's own. Raises
    UserError for an unknown name, and for a missing package.
    """
    name = options.reward or get_task(options).reward
    if name not in REWARDS:
        raise UserError(f"--reward {name!r}: choose one of {', '.join(REWARDS)}")
    if name == "model" and not options.reward_model:
        raise UserError(
            "--reward model needs --reward-model RUN, the folder of a run of"
            " experiments/reward_model.py"
        )
    if name in JUDGES:
        JUDGES[name]()
    return name


def make_reward(options: TaskConfig, policy: Policy) -> Reward:
    """Make the reward of `reward_name`."""
    return REWARDS[reward_name(options)](options, policy)


def review_classifier(
    options: RunConfig,
    policy: Policy,
    reviews: Reviews,
    split: Split,
    folder: Path,
    *,
    scale: float = 1.0,
) -> tuple[Reward, float]:
    """Train a classifier of movie reviews on the policy's embedding, or load it from
    the folder. Returns 2 p(positive) - 1 as a reward, and its accuracy on test
    sentences whose human rating is beyond ±.5.
    """
    net = text_classifier.Classifier()
    base = policy.frozen["base"] or policy.frozen["reference"]
    embedding = processes.to_host(base["embed"]["embedding"])
    encode = policy.tokenizer.encode
    labelled = classifier.LabelledTexts.encode(reviews.texts, reviews.ratings, encode)
    with processes.main_first("reward"):  # one process trains it, once a run
        if folder.exists():
            params = checkpoint.load_tree(
                folder, classifier.init(net, embedding, seed=options.seed)
            )
        else:
            texts = labelled.rows(split.train).with_windows(
                least=12, most=options.response_length, seed=options.seed
            )
            params = classifier.fit(net, embedding, texts, seed=options.seed, report=print)
            checkpoint.save_tree(folder, params)
    params = {"embedding": embedding, "net": params}
    accuracy = classifier.accuracy(net, params, labelled.rows(split.test), beyond=0.5)
    print(f"reward model: {accuracy:.3f} of test sentences right (human rating beyond +-0.5)")
    return Reward(classifier.reward(net, scale=scale), params), accuracy
