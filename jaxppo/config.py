"""All settings, as frozen dataclasses. The string under a field is its help on the
command line, and a comment `# --- title` begins a group of options there.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import numbers
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from tyro.constructors import PrimitiveConstructorSpec

from jaxppo.errors import UserError
from jaxppo.presets import ALGORITHMS

C = TypeVar("C")

HIDDEN = "***"  # replaces a secret in a run's config.json


# of \n, \t and \\ on the command line, where a shell passes the backslash on
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


def unescape(text: str) -> str:
    r"""The text with line ends for \n, tabs for \t and one backslash for two.

    >>> unescape(r"a\n\\n\boxed")
    'a\n\\n\\boxed'
    """
    return re.sub(r"\\[nt\\]", lambda found: ESCAPES[found[0]], text)


def escape(text: str) -> str:
    r"""The inverse of `unescape`.

    >>> escape("a\n")
    'a\\n'
    """
    return re.sub(r"[\n\t\\]", lambda found: {x: e for e, x in ESCAPES.items()}[found[0]], text)


StopText = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="TEXT",
        instance_from_str=lambda words: unescape(words[0]),
        is_instance=lambda x: isinstance(x, str),
        str_from_instance=lambda text: [escape(text)],
    ),
]


class _WithPreset(type):
    """Makes `Config(algorithm="grpo", lr=1e-4)` have GRPO's settings, but this lr."""

    def __call__(cls: type[C], *args: Any, **given: Any) -> C:
        chosen = ALGORITHMS.get(given.get("algorithm", ""))
        own = chosen.settings if chosen else {}
        return super().__call__(*args, **{**own, **given})  # pyright: ignore


@dataclass(frozen=True)
class Config(metaclass=_WithPreset):
    """One PPO step: everything that shapes the compiled program, and nothing else.

    With `algorithm` its preset's settings are the defaults; `dataclasses.replace` keeps
    all other settings as they are.
    """

    # --- batch

    batch_size: int = 64
    """rollouts a step, over all devices (= prompts x group_size)"""
    prompt_length: int = 8
    """tokens of a prompt; shorter prompts are padded on the left"""
    response_length: int = 24
    """most tokens of a response"""
    group_size: int = 1
    """samples for each prompt; group-relative advantages need 2 or more"""
    epochs: int = 1
    """passes over each batch of rollouts"""
    minibatches: int = 4
    """optimizer updates in each pass"""
    microbatches: int = 1
    """split the gradient of a minibatch into this many parts: same result, less
    memory
    """
    tokens_per_microbatch: int = 0
    """layout packed: tokens for which a gradient is computed at a time; 0 = chosen from
    the batch (an eighth of a minibatch, and at least 512)
    """
    layout: str = "packed"
    """packed (transformers: a prompt is read once a group, and only tokens that exist
    are computed) | dense (every row is a whole row; other networks always are)
    """

    # --- algorithm

    algorithm: str = "ppo"
    """preset of parts and settings (see `jaxppo algorithms`); other options override
    it
    """
    loss: str = "clip"
    """policy loss, by name"""
    advantage: str = "gae"
    """advantage estimator, by name"""
    aggregate: str = "token_mean"
    """how per-token losses become one number, by name"""
    kl: str = "k1"
    """estimator of the KL to the reference: k1, k2, k3, absolute; k1+, k3+, absolute+
    (with the gradient of k2); full (exact)
    """
    value_loss: str = "clipped"
    """value loss, by name; none = no critic"""
    old_logprobs: str = "sampler"
    """sampler | scorer: source of the old log-probs, the ratio's denominator. The
    scorer needs one more forward pass; the two differ if the sampler computes
    differently (another precision, another temperature)
    """
    correction: str = "none"
    """importance weights of the scorer against the sampler (1 unless --old-logprobs
    scorer), held at their bounds (truncated) or 0 beyond (masked), a token or a
    response
    """
    correction_low: float = 0.0
    """least importance weight"""
    correction_high: float = 2.0
    """largest importance weight; inf = none"""
    correction_normalise: bool = False
    """divide importance weights by their mean over the batch"""
    rejection: str = "none"
    """leave out tokens or responses (row_) by an estimate of the KL between sampler and
    scorer
    """
    rejection_low: float | None = None
    """smallest estimate that is kept: a ratio for k1, nats for k3; None = no bound"""
    rejection_high: float | None = None
    """largest estimate that is kept; None = no bound"""
    off_policy_threshold: float = 0.0
    """leave out responses with a negative advantage whose log-prob has fallen by more
    than this since they were sampled, in nats a token; 0 = none
    """
    top_entropy: float = 1.0
    """learn from this share of the tokens, those of highest entropy; 1 = all"""
    update: str = "gradient"
    """gradient (epochs x minibatches) | trpo | npg (one natural-gradient step a
    batch)
    """

    clip_low: float | None = None
    """the ratio is clipped at 1 - clip_low; None = the loss's own default"""
    clip_high: float | None = None
    """the ratio is clipped at 1 + clip_high; None = the loss's own default"""
    loss_settings: tuple[tuple[str, float], ...] = ()
    """other settings of the loss by name, such as: tau_positive 1.0 tau_negative
    1.05
    """
    likelihood_coef: float = 0.0
    """weight of the likelihood of right answers, a term besides the loss (VAPO: .1);
    0 = none
    """
    likelihood_threshold: float = 0.0
    """an answer is right if its score is above this"""
    beta: float = 1.0
    """weight of the pull towards the old policy in the losses kl_penalty and dro"""
    beta_target: float = 0.0
    """loss kl_penalty: target, in nats a token, to which beta is adapted; 0 = fixed
    beta
    """
    value_clip: float = 0.2
    """new values stay within this distance of the old ones; inf = any distance"""
    value_coef: float = 0.1
    """weight of the value loss; 0 = the critic is not trained"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus; below 0 it is a penalty"""
    critic: str = "shared"
    """shared (a head on the policy's trunk) | separate (a second network of that
    shape)
    """
    critic_lr: float | None = None
    """learning rate of the critic's own parameters; 0 = they stay, None = lr"""
    critic_warmup: int = 0
    """train only the critic in the first steps: how many"""
    value_init: str = "zero"
    """initial value head: zero | normal | reward (head of the reward model, for a
    separate critic its trunk, too)
    """

    # --- advantages

    gamma: float = 1.0
    """discount factor a token, from 0 (a token's own reward alone) to 1"""
    turn_gamma: float = 1.0
    """further discount from one turn of an episode to the next"""
    lam: float = 0.95
    """GAE's lambda"""
    critic_lam: float | None = None
    """lambda of the critic's targets; None = the same (VAPO: 1)"""
    lam_alpha: float = 0.0
    """above 0, lambda depends on the length: 1 - 1 / (lam_alpha * tokens) (VAPO:
    .05)
    """
    whiten_advantages: bool | None = None
    """whiten advantages to mean 0 and variance 1 over the global batch; None = as the
    estimator's paper does"""
    whiten_ddof: int = 0
    """0 | 1: degrees of freedom subtracted from the count in the variance"""
    whiten_shift: bool = True
    """subtract the mean when whitening; otherwise only the scale changes"""
    baseline_decay: float = 0.9
    """advantage moving_average: decay of the baseline; 0 = the mean of the last step"""

    # --- reward

    missing_eos_penalty: float = 0.0
    """subtracted from the score of a response without an end of text"""
    missing_eos_score: float | None = None
    """replaces the score of a response without an end of text (TL;DR: -1); None = keep
    it
    """
    overlong_buffer: int = 0
    """overlong_penalty grows from 0 over this many tokens before the longest response
    (DAPO); 0 = no such penalty"""
    overlong_penalty: float = 1.0
    """largest penalty on the score of a long response"""
    reward_clip: float = 0.0
    """clip scores to [-reward_clip, reward_clip]; 0 = no clipping"""
    reward_norm: str = "none"
    """none | running (divide scores by their running deviation) | batch, task (whiten
    scores over the batch, or over the rows of each task)"""
    num_tasks: int = 1
    """number of tasks trained together; extra["task"] is the task of a row"""
    reward_reference: int = 0
    """rollouts of the initial policy whose scores are normalised to mean 0 and
    deviation 1 before the run; 0 = no normalisation (Ziegler)
    """
    whiten_rewards: bool = False
    """scale per-token rewards, KL penalty included, to variance 1 over the batch; the
    mean stays
    """
    filter_groups: bool = False
    """leave groups with equal scores out of the loss and its denominators (DAPO)"""
    oversample: int = 1
    """with filter_groups: generate this many times the groups, keep the first
    informative ones
    """

    # --- KL to the reference

    kl_coef: float = 0.1
    """weight of the KL to the reference, per nat (the initial value if adaptive); 0 =
    none
    """
    kl_place: str = "reward"
    """reward | loss: where the KL term is added"""
    kl_importance: bool = False
    """kl_place loss: multiply by the ratio to the sampling policy, with its gradient"""
    kl_adaptive: bool = True
    """adapt kl_coef towards kl_target"""
    kl_rule: str = "ziegler"
    """ziegler (proportional, Ziegler et al. 2019) | ppo (doubled above 1.5 x target,
    halved below target / 1.5)
    """
    kl_target: float = 6.0
    """nats a response"""
    kl_horizon: float = 10_000.0
    """rollouts in which the coefficient changes by at most one e-fold, times 5"""
    kl_coef_min: float = 0.0
    """lower bound of the adaptive coefficient"""
    kl_stop: float = 0.0
    """skip the remaining minibatches of a step above this KL to the sampling policy, in
    nats a token; 0 = never"""
    reference_every: int = 0
    """the reference becomes the policy every so many steps; 0 = never"""
    reference_decay: float = 0.0
    """the reference follows the policy as an average with this decay a step, such as
    .99; 0 = it stays
    """

    # --- distillation

    distil: str = "reward"
    """what is learned from --teacher: reward (log-prob of the teacher minus that of the
    policy, on each token) | reverse | forward | jsd (divergences over the vocabulary,
    added to the loss)
    """
    distil_coef: float = 1.0
    """weight of the teacher's reward or loss"""
    distil_beta: float = 0.5
    """distil jsd: share of the teacher in the mixture; near 0 it acts as forward, near
    1 as reverse
    """

    # --- sampling

    temperature: float = 1.0
    """of the sampler and of every log-prob"""
    top_k: int = 0
    """sample among the k likeliest tokens; 0 = all"""
    top_p: float = 1.0
    """sample among the likeliest tokens with this much probability; 1 = all"""
    stop: tuple[StopText, ...] = ()
    """texts that end a response, such as "Q:"; the token that completes one is its
    last, and counts as an end of text. On the command line, \\n is a line end
    """
    min_tokens: int = 0
    """so many tokens at the start of a response cannot end it"""
    mask_top_p: float = 1.0
    """below 1, sample only among the top-p tokens of a lagged copy of the policy
    (NLPO)
    """
    mask_every: int = 20
    """steps between two copies of the policy for mask_top_p"""
    mask_renormalise: bool = True
    """renormalise log-probs over the allowed tokens; no = keep the unmasked log-prob of
    an allowed token, as RL4LMs does
    """
    eos: int | tuple[int, ...] = -1
    """token ids that end a response (scripts set them from the tokenizer); -1 =
    responses always have full length"""
    pad: int = 0
    """token id written after the end; it is never attended to"""

    # --- optimizer

    optimizer: str = "adam"
    """adam | adamw | rmsprop | sgd"""
    lr: float = 1e-3
    """initial learning rate (after the warm-up)"""
    lr_schedule: str = "linear"
    """linear (to 0 over all steps) | cosine (to 0) | constant"""
    lr_warmup: int = 0
    """steps in which the learning rate grows from 0"""
    weight_decay: float = 0.01
    """of adamw"""
    adam_eps: float = 1e-5
    """eps of adam, adamw and rmsprop"""
    max_grad_norm: float = 1.0
    """clip gradients to this global norm (those of a separate critic by themselves);
    0 = no clipping
    """
    ema_decay: float = 0.0
    """evaluate, sample and export an average of the trained weights with this decay a
    step, such as .99; 0 = the weights themselves
    """
    trust_kl: float = 0.01
    """update trpo, npg: nats a token that one step may move the policy; use float32"""
    cg_iterations: int = 10
    """conjugate-gradient iterations for the natural gradient"""
    cg_damping: float = 0.1
    """multiple of the identity added to the Fisher matrix; 0 = nothing is added"""
    backtracks: int = 10
    """trpo: how often the step may be halved; 0 = it is taken whole or not at all"""

    # --- model and adapters

    lora: int = 8
    """rank of the low-rank adapters; 0 = train all weights"""
    lora_on: str = "q,v"
    """layers with adapters: all (linear layers but the output) | attention | mlp | some
    of q, k, v, o, gate, up, down, with commas
    """
    lora_alpha: float = 16.0
    """adapters are scaled by lora_alpha / lora"""
    rslora: bool = False
    """rank-stabilised: scale adapters by lora_alpha / sqrt(lora)"""

    # --- precision and memory

    dtype: str = "float32"
    """float32 | bfloat16: inputs of matrix products; parameters and statistics stay
    float32
    """
    base_dtype: str = "same"
    """same (as dtype) | int8: weights of the frozen base below adapters, or of the
    reference, in the linear layers of a transformer's blocks
    """
    decode_dtype: str = "same"
    """same (as dtype) | int8: weights that training samples with, in the linear layers
    of a transformer's blocks; needs --old-logprobs scorer
    """
    remat: str = "none"
    """none | block (keep only the inputs of each layer and recompute the rest in the
    backward pass; on a CPU with --scan-layers, or XLA undoes it) | full (recompute
    everything at once: it saves hardly any memory)"""
    scan_layers: bool = False
    """compile one layer and loop over it: deep models compile in seconds instead of
    minutes; a little slower on a CPU"""
    logits_bytes: int = 64 * 2**20
    """compute larger logits in chunks of this many bytes"""

    # --- run

    steps: int = 100
    """training steps: one rollout and its updates each"""
    seed: int = 0
    """seed of all random numbers of the run"""
    log_samples: int = 0
    """log the responses to this many prompts of a batch, with their scores; 0 = none"""

    @property
    def length(self) -> int:
        return self.prompt_length + self.response_length

    @property
    def rows(self) -> int:
        """rollouts made in a step, of which batch_size are learned from"""
        return self.batch_size * self.oversample

    @property
    def updates(self) -> int:
        """optimizer updates in the whole run"""
        return self.steps * self.epochs * self.minibatches


CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "base_dtype": ("same", "int8"),
    "decode_dtype": ("same", "int8"),
    "lr_schedule": ("linear", "cosine", "constant"),
    "kl_place": ("reward", "loss"),
    "kl_rule": ("ziegler", "ppo"),
    "layout": ("packed", "dense"),
    "old_logprobs": ("sampler", "scorer"),
    "critic": ("shared", "separate"),
    "value_init": ("zero", "normal", "reward"),
    "reward_norm": ("none", "running", "batch", "task"),
    "whiten_ddof": (0, 1),
    "remat": ("none", "block", "full"),
    "data_changed": ("refuse", "ok"),
    "parallel": ("auto", "jit", "pmap", "mesh"),
    "distributed": ("auto", "on", "off"),
}
# The numbers that a setting may have: [ and ] include a bound, ( and ) exclude it.
# "inf)" ends where a device's numbers end, "inf]" at infinity, which means no bound
# there. A class can have `RANGES` of its own, for the settings that it adds or gives
# another meaning.
LARGEST_INT, LARGEST = 2**31 - 1, 3.4e38  # of int32 and float32
RANGES: dict[str, str] = {
    **dict.fromkeys(
        (
            # how many of something that there must be
            "batch_size", "prompt_length", "response_length", "group_size", "epochs",
            "minibatches", "microbatches", "steps", "oversample", "mask_every", "num_tasks",
            "cg_iterations", "save_every", "eval_samples", "steps_per_call", "max_bad_steps",
            "connect_timeout", "heartbeat",
            # divisors, and what would learn nothing at 0
            "temperature", "kl_target", "kl_horizon", "trust_kl", "lora_alpha",
            "adam_eps",  # a moment of 0 would be divided by it
        ),
        "(0, inf)",
    ),
    **dict.fromkeys(
        (
            # 0 is none, or never
            "critic_warmup", "lr_warmup", "log_samples", "min_tokens", "top_k", "lora",
            "tokens_per_microbatch", "overlong_buffer", "reward_reference", "backtracks",
            "keep_every", "eval_every", "patience", "expect_devices", "pad", "start",
            # weights, penalties and rates, which would turn around below 0; 0 is off
            "beta", "beta_target", "value_coef", "lam_alpha", "missing_eos_penalty",
            "overlong_penalty", "reward_clip", "likelihood_coef", "off_policy_threshold",
            "correction_low", "rejection_low", "kl_coef", "kl_coef_min", "reference_every",
            "kl_stop", "distil_coef", "lr", "critic_lr", "weight_decay", "cg_damping",
        ),
        "[0, inf)",
    ),
    # distances, of which 0 would let nothing move
    **dict.fromkeys(
        ("clip_low", "clip_high", "value_clip", "correction_high", "rejection_high"), "(0, inf]"
    ),
    "max_grad_norm": "[0, inf]",
    **dict.fromkeys(("gamma", "turn_gamma", "lam", "critic_lam", "max_invalid_rewards"), "[0, 1]"),
    **dict.fromkeys(("top_p", "mask_top_p", "top_entropy"), "(0, 1]"),
    "distil_beta": "(0, 1)",
    # 1 would keep the first baseline, 0, or the first weights
    **dict.fromkeys(("baseline_decay", "reference_decay", "ema_decay"), "[0, 1)"),
    **dict.fromkeys(
        (
            "entropy_coef", "missing_eos_score", "likelihood_threshold", "loss_settings",
            "eval_right",
        ),
        "(-inf, inf)",
    ),
    "whiten_ddof": "[0, 1]",
    "eos": "[-1, inf)",
    "logits_bytes": "[1, 1e15]",
    "seed": "[0, 4294967295]",  # JAX's keys have 32 bits of a seed
    # names in `loss_settings`
    **dict.fromkeys(("low", "high"), "(0, inf]"),
    **dict.fromkeys(("k_positive", "k_negative"), "[0, inf)"),
    **dict.fromkeys(("lambda_positive", "lambda_negative"), "[0, inf)"),
    **dict.fromkeys(("tau_positive", "tau_negative", "cap", "weight_max"), "(0, inf)"),
    "ceiling": "(1, inf)",
    "fraction": "[0, 1]",
    "coef": "[0, inf)",
}  # fmt: skip


def option(name: str) -> str:
    """A field's name as an option of the command line.

    >>> option("batch_size")
    '--batch-size'
    """
    return f"--{name.replace('_', '-')}"


def range_error(x: float, interval: str, largest: float = LARGEST) -> str:
    """What is wrong with a number, or "".

    >>> range_error(1.5, "(0, 1]"), range_error(0, "(0, inf)"), range_error(2, "[0, 9]")
    ('in (0, 1]', 'above 0', '')
    >>> range_error(math.inf, "[0, inf)"), range_error(math.inf, "[0, inf]")
    ('a finite number', '')
    """
    if math.isnan(x) or (math.isinf(x) and not (x > 0 and interval.endswith("inf]"))):
        return "a finite number"
    # "inf)" ends at the largest number, which is included
    widest = interval.replace("(-inf", f"[{-largest}").replace("inf)", f"{largest}]")
    least, most = (float(end) for end in widest[1:-1].split(","))
    if x < least or (x == least and widest[0] == "("):
        words = f"above {least:.10g}" if widest[0] == "(" else f"{least:.10g} or more"
    elif x > most or (x == most and widest[-1] == ")"):
        words = f"below {most:.10g}" if widest[-1] == ")" else f"{most:.10g} or less"
    else:
        return ""
    return f"in {interval}" if abs(most) <= 1 else words


def ranges_of(kind: type) -> dict[str, str]:
    """The ranges of the numbers of a class of settings."""
    own = [vars(base).get("RANGES", {}) for base in reversed(kind.__mro__)]
    return {name: x for table in (RANGES, *own) for name, x in table.items()}


def check_numbers(options: Any) -> None:
    """Raise UserError for a number of a dataclass that is outside of its range."""
    ranges = ranges_of(type(options))
    for field in dataclasses.fields(options):
        value, known = getattr(options, field.name), ranges.get(field.name, "(-inf, inf)")
        for words, x in _numbers(value):
            named = ranges.get(words, known) if field.name == "loss_settings" else known
            whole = field.type in (int, "int")
            wrong = range_error(_as_float(x), named, LARGEST_INT if whole else LARGEST)
            if not wrong and whole and int(x) != x:
                wrong = "a whole number"
            if wrong:
                name = f"{option(field.name)} {words}".strip()
                raise UserError(f"{name} must be {wrong}, but is {str(x)[:20]}")


def _numbers(value: Any, words: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers in a value, each with the text before it: a pair has a name."""
    if isinstance(value, tuple):
        for x in value:
            yield from _numbers(x, words)
            words = x if isinstance(x, str) else ""
    elif isinstance(value, numbers.Real) and not isinstance(value, bool):
        yield words, value


def _as_float(x: Any) -> float:
    try:
        return float(x)
    except OverflowError:  # an integer beyond every range
        return 1e300 if x > 0 else -1e300


def validate(config: Config, *, devices: int = 1) -> None:
    """Raise UserError, with the numbers, for settings that cannot run."""
    if config.algorithm not in ALGORITHMS:
        raise UserError(
            f"unknown --algorithm {config.algorithm!r}: choose one of {', '.join(ALGORITHMS)}"
        )
    check_numbers(config)
    for name in (x.name for x in dataclasses.fields(config) if x.name in CHOICES):
        value = getattr(config, name)
        if value not in CHOICES[name]:
            choices = ", ".join(str(x) for x in CHOICES[name])
            raise UserError(f"{option(name)} {value!r}: choose one of {choices}")
    if config.update in ("trpo", "npg"):
        _check_natural(config)
    if config.oversample > 1 and not config.filter_groups:
        raise UserError(
            f"--oversample {config.oversample} chooses among groups: it needs --filter-groups"
        )
    if config.filter_groups and config.group_size == 1:
        raise UserError("--filter-groups compares the rows of a group: --group-size 1 has one row")
    if config.reward_norm == "task" and config.num_tasks == 1:
        raise UserError(
            "--reward-norm task needs several tasks, but --num-tasks 1: use --reward-norm batch"
        )
    if config.overlong_buffer > config.response_length:
        raise UserError(
            f"--overlong-buffer {config.overlong_buffer} is longer than "
            f"--response-length {config.response_length}; shorten it"
        )
    if config.decode_dtype != "same" and config.old_logprobs == "sampler":
        raise UserError(
            f"--decode-dtype {config.decode_dtype} samples with other weights than those that "
            "learn: it needs --old-logprobs scorer"
        )
    if config.loss == "two_sided" and config.old_logprobs == "scorer":
        raise UserError(
            "--loss two_sided bounds the ratio to the sampler, which --old-logprobs scorer takes "
            "out of the ratio: use --old-logprobs sampler and --decode-dtype same"
        )
    if config.rejection != "none" and config.rejection_low is config.rejection_high is None:
        raise UserError(
            f"--rejection {config.rejection} needs --rejection-low, --rejection-high or both"
        )
    if "" in config.stop:
        raise UserError("--stop has an empty text, which would end every response; leave it out")
    if config.min_tokens > config.response_length:
        raise UserError(
            f"--min-tokens {config.min_tokens} is more than "
            f"--response-length {config.response_length}; lower it"
        )
    _check_division(config, devices)


def _check_division(config: Config, devices: int) -> None:
    """Devices and minibatches get whole groups; dense microbatches are of one size."""
    batch, packed = config.batch_size, config.layout == "packed"
    # (factor, in words, how to change it, its least useful value: a group needs two)
    factors = [
        (devices, "{} devices", "{} devices", 1),
        (config.minibatches, "{} minibatches", "--minibatches {}", 1),
        (1 if packed else config.microbatches, "{} microbatches", "--microbatches {}", 1),
        (config.group_size, "groups of {}", "--group-size {}", 2),
    ]
    sizes = [factor for factor, *_ in factors]

    def unit(*sizes: int) -> int:
        *others, microbatches, group_size = sizes
        return math.prod(others) * math.lcm(microbatches, group_size)

    if batch % unit(*sizes) == 0:
        return
    cures = [f"--batch-size {math.ceil(batch / unit(*sizes)) * unit(*sizes)}"]
    for at, (factor, _, change, least) in enumerate(factors):
        works = lambda x, at=at: batch % unit(*sizes[:at], x, *sizes[at + 1 :]) == 0
        smaller = (x for x in range(factor - 1, least - 1, -1) if works(x))
        cures += [change.format(x).removesuffix("s" * (x == 1)) for x in smaller][:1]
    parts = " x ".join(words.format(factor) for factor, words, *_ in factors if factor > 1)
    raise UserError(f"--batch-size {batch} does not divide into {parts}; use {', or '.join(cures)}")


def _check_natural(config: Config) -> None:
    """A natural-gradient step follows the surrogate alone; other terms of a loss would
    silently do nothing.
    """
    ignored = {
        "--kl-place loss": config.kl_place == "loss" and config.kl_coef > 0,
        "--entropy-coef": config.entropy_coef != 0,
        "--likelihood-coef": config.likelihood_coef != 0,
        f"--distil {config.distil}": config.distil != "reward",
        "--kl-stop": config.kl_stop > 0,
        "--correction": config.correction != "none",
        "--rejection": config.rejection != "none",
        "--off-policy-threshold": config.off_policy_threshold > 0,
        "--top-entropy": config.top_entropy < 1,
        "--critic-warmup": config.critic_warmup > 0,
    }
    for name in (name for name, given in ignored.items() if given):
        raise UserError(
            f"{name} has no effect with --update {config.update}, whose step follows the "
            "surrogate alone; leave it out"
        )
    if config.dtype != "float32":
        raise UserError(f"--update {config.update} differentiates twice and needs --dtype float32")


@dataclass(frozen=True)
class RunConfig(Config):
    """A whole run: the settings of the step, and of the host's loop around it."""

    # --- model and adapters

    model: str = "smollm2"
    """smollm2 (downloaded once, 93 MB), a local folder, or a hub id: GPT-2, Llama,
    SmolLM, Qwen2/2.5/3, Mistral or Gemma 2/3 in safetensors
    """
    model_kind: str = "transformer"
    """transformer | gru | lstm | convolution | window: kind of a newly made network
    (--tiny, experiments/pretrain.py)"""
    tiny: bool = False
    """smoke test: a small random model with a byte vocabulary"""

    # --- distillation

    teacher: str = ""
    """a network that the policy learns from: a local folder, the folder of a run, a hub
    id, smollm2, or self (the policy's start). A column "hint" of the prompts' file is
    put in front of what it reads
    """

    # --- sampling

    prompt_start: bool = False
    """begin prompts with the token that starts a document, in training and in sampling,
    also where the tokenizer does not begin texts with a token
    """
    start: tuple[int, ...] | None = None
    """token ids that begin each prompt (scripts set them from the tokenizer); None = by
    prompt_start alone"""
    prompt_format: str = "{prompt}"
    """format of prompts, of a task and of `jaxppo sample`; tasks have their own"""

    # --- reward

    reward_model: str = ""
    """folder of a run of experiments/reward_model.py, for --reward model and
    --value-init reward
    """

    # --- run

    name: str = "run"
    """the run's folder is <runs>/<name>"""
    runs: str = "runs"
    """folder that holds the runs"""
    resume: bool = False
    """continue the run of this name from its newest checkpoint"""
    data_changed: str = "refuse"
    """refuse | ok: whether --resume may continue with other data than those that the
    run began with
    """
    save_every: int = 20
    """steps between checkpoints"""
    keep_every: int = 0
    """keep checkpoints of multiples of this step for good; 0 = only the newest two and
    the best
    """
    eval_every: int = 20
    """steps between evaluations on validation prompts; 0 = never"""
    eval_samples: int = 1
    """samples of each validation prompt; k > 1 adds their mean reward (avg@k), pass@1,
    2, 4, ... k, and whether the most frequent response is right (maj@k)
    """
    eval_right: float = 1.0
    """least reward of a right response, for pass@k and maj@k"""
    log_samples: int = 4
    """responses of a batch that are written to samples.jsonl with their scores, at the
    first step and every 10 steps; 0 = none
    """
    patience: int = 0
    """end the run after this many evaluations in a row without a better score (the best
    checkpoint is kept); 0 = never"""
    steps_per_call: int = 1
    """steps in one dispatch of the program; checkpoints and evaluations come between
    dispatches"""
    max_bad_steps: int = 5
    """end the run (exit code 76) after this many steps in a row without a finite
    update
    """
    max_invalid_rewards: float = 0.1
    """end the run (exit code 2) if a larger share of a batch's rewards is invalid (NaN,
    an exception, a timeout)
    """
    debug_nans: bool = False
    """if an update is not finite: repeat the step with every operation checked, name
    the operation, and end
    """
    profile: str = ""
    """write a JAX trace of these steps to the run's folder, first:last, such as 3:6"""
    functions: str = ""
    """names and hashes of the reward and the parts that are no settings, by which runs
    are told apart (set by train.policy)
    """
    chats: bool = False
    """prompts are chats, in the format of the checkpoint (set by train.policy)"""
    track: str = ""
    """tensorboard, wandb, or both with a comma: where to send metrics, besides
    metrics.jsonl (`pip install -e ".[track]"`)"""
    traceback: bool = False
    """show the traceback of an error instead of one line"""

    # --- devices

    parallel: str = "auto"
    """auto (jit on one device, pmap on several, mesh with --mesh) | jit | pmap |
    mesh
    """
    mesh: str = ""
    """axis sizes of --parallel mesh, which it implies, such as
    data=2,fsdp=2,tensor=2
    """
    expect_devices: int = 0
    """refuse to start with another number of devices, over all processes; 0 = any
    number
    """
    distributed: str = "auto"
    """auto (join other processes if the environment names a cluster) | on (join or
    fail) | off
    """
    connect_timeout: int = 300
    """seconds to wait for the other processes"""
    heartbeat: int = 60
    """seconds of silence after which a process counts as dead, and the others end"""


# Settings that may change when a run is resumed: they do not change its numbers beyond
# rounding, or only when it ends. Three exceptions are deliberate: `steps` is also where
# a schedule ends; `layout`, `microbatches` and `tokens_per_microbatch` change the
# losses kl_cov and clip_cov, which rank the tokens of a microbatch; `microbatches`,
# `parallel` and `mesh` change the dropout of a supervised stage.
FREE = {
    "steps", "layout", "microbatches", "tokens_per_microbatch", "remat", "logits_bytes", "name",
    "runs", "resume", "save_every", "keep_every", "eval_every", "eval_samples", "eval_right",
    "patience", "prompt_format",
    "steps_per_call", "parallel", "mesh", "expect_devices", "distributed", "connect_timeout",
    "heartbeat", "max_bad_steps", "max_invalid_rewards", "debug_nans", "profile", "track",
    "traceback", "results", "log_samples", "data_changed",
    "data",  # its content decides (`resume.check_data`)
}  # fmt: skip

# Of these, the ones that do not decide what a run finds, either: it depends on its
# length and its data.
NO_RESULTS = FREE - {"steps", "data"}

TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # and the package of each


def profiled_steps(config: RunConfig) -> tuple[int, int]:
    """First and last step of --profile, counted from 1; (0, 0) for none. Raises
    UserError.

    >>> [profiled_steps(RunConfig(profile=text)) for text in ("3:6", "5", "")]
    [(3, 6), (5, 5), (0, 0)]
    """
    if not config.profile:
        return 0, 0
    found = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", config.profile)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(
            f"--profile {config.profile!r}: give the first and the last step to trace, such as 3:6"
        )
    return first, last


def tracker_names(config: RunConfig) -> tuple[str, ...]:
    """The names in --track. Raises UserError for an unknown name or a missing
    package.
    """
    names = tuple(dict.fromkeys(name.strip() for name in config.track.split(",") if name.strip()))
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--track {name!r}: choose among {', '.join(TRACKERS)}")
        found = importlib.util.find_spec(TRACKERS[name])
        # A folder of that name, such as W&B makes, is found but has no origin.
        if found is None or found.origin is None:
            raise UserError(
                f'--track {name} needs the package {TRACKERS[name]}: pip install -e ".[track]"'
            )
    return names


def validate_run(config: RunConfig) -> None:
    """`validate`, and the settings of the host's loop."""
    validate(config)
    if config.mesh and config.parallel not in ("auto", "mesh"):
        raise UserError(
            f"--mesh {config.mesh} needs --parallel mesh, not --parallel {config.parallel}"
        )
    if not config.teacher and (config.distil != "reward" or config.algorithm == "distil"):
        what = f"--distil {config.distil}" if config.distil != "reward" else "--algorithm distil"
        raise UserError(f"{what} needs --teacher: a network, or self")
    tracker_names(config)
    profiled_steps(config)
    for name in ("steps", "save_every", "eval_every"):
        if getattr(config, name) % config.steps_per_call:
            raise UserError(
                f"{option(name)} {getattr(config, name)} is not a multiple of "
                f"--steps-per-call {config.steps_per_call}; make it one"
            )
