"""Every setting, as frozen dataclasses of the standard library. The string under a
field is its help on the command line.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from dataclasses import dataclass

from jaxppo.errors import UserError

HIDDEN = "***"  # in a run's config.json, in the place of a secret


@dataclass(frozen=True)
class Config:
    """One PPO step: everything that shapes the compiled program and nothing else."""

    batch_size: int = 64
    """rollouts a step, over all devices (= prompts x group_size)"""
    prompt_length: int = 8
    """tokens of prompt; shorter prompts are padded on the left"""
    response_length: int = 24
    """most tokens generated for a prompt"""
    group_size: int = 1
    """samples for each prompt; group-relative advantages need more than one"""
    epochs: int = 1
    """passes over each batch of rollouts"""
    minibatches: int = 4
    """optimizer updates in each pass"""
    microbatches: int = 1
    """parts in which a minibatch's gradient is computed: the same result with less
    memory
    """

    algorithm: str = "ppo"
    """preset of parts and settings (`jaxppo algorithms` lists them); every other option
    overrides it
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
    """sampler | scorer: whose log-probs of the responses are the ratio's denominator.
    The scorer's cost one more forward pass, and differ where the sampler computes
    otherwise (another precision, another temperature)
    """
    correction: str = "none"
    """none | truncated: importance weights of the scorer against the sampler (1 unless
    --old-logprobs scorer)
    """
    update: str = "gradient"
    """gradient (epochs x minibatches) | trpo | npg (one natural-gradient step a
    batch)
    """

    clip_low: float | None = None
    """the ratio is held above 1 - clip_low; None = the loss's own default"""
    clip_high: float | None = None
    """the ratio is held below 1 + clip_high; None = the loss's own default"""
    loss_settings: tuple[tuple[str, float], ...] = ()
    """other settings of the loss by name, such as: tau_positive 1.0 tau_negative
    1.05
    """
    beta: float = 1.0
    """weight of the pull towards the old policy in the losses kl_penalty and dro"""
    beta_target: float = 0.0
    """loss kl_penalty: nats a token to which PPO's rule steers beta; 0 = beta stays"""
    value_clip: float = 0.2
    """new values are held within this distance of the old ones"""
    value_coef: float = 0.1
    """weight of the value loss"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    critic: str = "shared"
    """shared (a head on the policy's trunk) | separate (a second network of the same
    shape)
    """
    critic_lr: float | None = None
    """learning rate of the critic's own parameters; None = lr"""
    critic_warmup: int = 0
    """first steps in which the critic alone learns"""
    value_init: str = "zero"
    """value head at the start: zero | normal | reward (the trunk, if separate, and the
    head of the reward model)
    """

    gamma: float = 1.0
    """discount for each token"""
    lam: float = 0.95
    """GAE's lambda"""
    critic_lam: float | None = None
    """lambda of the critic's targets; None = the same (VAPO: 1)"""
    lam_alpha: float = 0.0
    """above 0, lambda depends on the response's length: 1 - 1 / (lam_alpha * tokens)
    (VAPO: .05)
    """
    whiten_advantages: bool | None = None
    """advantages with mean 0 and variance 1 over the global batch; None = as the
    estimator's paper has it
    """
    whiten_ddof: int = 0
    """0 | 1: what is taken from the count in the variance"""
    whiten_shift: bool = True
    """take the mean away when whitening; without, only the scale changes"""
    baseline_decay: float = 0.9
    """advantage moving_average: how much of the old baseline stays"""

    missing_eos_penalty: float = 0.0
    """taken from the score of a response that did not end by itself"""
    missing_eos_score: float | None = None
    """score of a response that did not end by itself, whatever its reward (TL;DR: -1);
    None = its reward's
    """
    overlong_buffer: int = 0
    """tokens before the longest response over which overlong_penalty grows from 0
    (DAPO); 0 = no such penalty
    """
    overlong_penalty: float = 1.0
    """most that is taken from the score of a long response"""
    reward_clip: float = 0.0
    """scores are held in [-reward_clip, reward_clip]; 0 = not at all"""
    reward_norm: str = "none"
    """none | running (scores over their running deviation) | batch, task (scores
    whitened over the batch, or each task's rows)
    """
    num_tasks: int = 1
    """tasks that are learned together; extra["task"] says which a row is"""
    reward_reference: int = 0
    """rollouts of the untrained policy whose scores are given mean 0 and deviation 1
    before the run; 0 = scores stay (Ziegler)
    """
    whiten_rewards: bool = False
    """per-token rewards, KL penalty included, with variance 1 over the batch; the mean
    stays
    """
    filter_groups: bool = False
    """groups whose scores are all equal leave the loss and its denominators (DAPO)"""
    oversample: int = 1
    """with filter_groups: make this many times the groups and keep the first
    informative ones
    """

    kl_coef: float = 0.1
    """weight of the KL to the reference, for each nat (the start value when
    adaptive)
    """
    kl_place: str = "reward"
    """reward | loss: where that term stands"""
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
    """rollouts over which the coefficient can move by one e-fold at most, times 5"""
    kl_coef_min: float = 0.0
    """the adaptive coefficient never falls below this"""
    kl_stop: float = 0.0
    """nats a token from the sampling policy at which the rest of the step's minibatches
    are left out; 0 = never
    """

    temperature: float = 1.0
    """of the sampler and of every log-prob"""
    top_k: int = 0
    """sample among the k likeliest tokens; 0 = all"""
    top_p: float = 1.0
    """sample among the likeliest tokens with this much probability; 1 = all"""
    mask_top_p: float = 1.0
    """below 1, only the top-p tokens of a lagged copy of the policy may be sampled
    (NLPO)
    """
    mask_every: int = 20
    """steps between two copies of the policy for mask_top_p"""
    mask_renormalise: bool = True
    """log-probs among the allowed tokens sum to 1; no = as RL4LMs has it, the unmasked
    log-prob of an allowed token
    """

    optimizer: str = "adam"
    """adam | adamw | rmsprop | sgd"""
    lr: float = 1e-3
    """learning rate at the start, or after the warm-up"""
    lr_schedule: str = "linear"
    """linear (to 0 over all steps) | cosine (to 0) | constant"""
    lr_warmup: int = 0
    """first steps in which the learning rate grows from 0"""
    weight_decay: float = 0.01
    """adamw's"""
    adam_eps: float = 1e-5
    """eps of adam, adamw and rmsprop"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this global norm; those of a separate critic by
    themselves
    """
    trust_kl: float = 0.01
    """update trpo, npg: nats a token that a natural-gradient step may move the policy;
    both want float32
    """
    cg_iterations: int = 10
    """conjugate-gradient iterations for the natural gradient"""
    cg_damping: float = 0.1
    """multiple of the identity added to the Fisher matrix"""
    backtracks: int = 10
    """trpo: how often the step may be halved"""
    eos: int = -1
    """token id that ends a response (a script sets it from its tokenizer); -1 =
    responses always have full length
    """
    pad: int = 0
    """token id written after the end; it is never attended to"""

    steps: int = 100
    """training steps: one rollout and its updates each"""

    lora: int = 8
    """rank of the low-rank adapters on the q and v projections; 0 = train every
    weight
    """
    lora_alpha: float = 16.0
    """the adapters are scaled by lora_alpha / lora"""
    dtype: str = "float32"
    """float32 | bfloat16: inputs of the matrix products; parameters and statistics stay
    float32
    """
    remat: str = "none"
    """none | block (keep the inputs of each layer only, and compute the rest again in
    the backward pass; on a CPU with --scan-layers, else XLA undoes it) | full (compute
    all again at once: it saves hardly anything)
    """
    scan_layers: bool = False
    """compile one layer and loop over it: seconds instead of minutes for deep models, a
    little slower on a CPU
    """
    logits_bytes: int = 64 * 2**20
    """logits larger than this are computed in chunks"""
    seed: int = 0

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
    "lr_schedule": ("linear", "cosine", "constant"),
    "optimizer": ("adam", "adamw", "rmsprop", "sgd"),
    "kl_place": ("reward", "loss"),
    "kl_rule": ("ziegler", "ppo"),
    "old_logprobs": ("sampler", "scorer"),
    "critic": ("shared", "separate"),
    "value_init": ("zero", "normal", "reward"),
    "reward_norm": ("none", "running", "batch", "task"),
    "whiten_ddof": (0, 1),
    "remat": ("none", "block", "full"),
}

POSITIVE = (
    "batch_size",
    "prompt_length",
    "response_length",
    "group_size",
    "epochs",
    "minibatches",
    "steps",
    "temperature",
    "oversample",
    "mask_every",
    "microbatches",
    "num_tasks",
)

LEAST = {"top_k": 0, "lora": 0, "logits_bytes": 1, "critic_warmup": 0, "lr_warmup": 0}

GROUPED = (
    "group",
    "group_mean",
    "rloo",
    "opo",
    "gpg",
    "gdpo",
    "reinforce_plus_plus_baseline",
)  # 0 for ever in groups of one

# where inf means: not at all
UNBOUNDED = ("clip_high", "clip_low", "value_clip", "max_grad_norm")


def validate(config: Config, *, devices: int = 1) -> None:
    """Raise UserError, with the numbers, for a configuration that cannot run."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if (
            isinstance(value, float)
            and not math.isfinite(value)
            and not (value > 0 and field.name in UNBOUNDED)
        ):
            raise UserError(
                f"--{field.name.replace('_', '-')} must be a finite number, but is {value}"
            )
    for name in POSITIVE:
        if getattr(config, name) <= 0:
            raise UserError(
                f"--{name.replace('_', '-')} must be above 0, but is {getattr(config, name)}"
            )
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(config, name)!r}: choose one of {', '.join(str(x) for x in choices)}"
            )
    for name, least in LEAST.items():
        if getattr(config, name) < least:
            raise UserError(
                f"--{name.replace('_', '-')} must be {least} or more, but is {getattr(config, name)}"
            )
    for name in ("top_p", "mask_top_p"):
        if not 0 < getattr(config, name) <= 1:
            raise UserError(
                f"--{name.replace('_', '-')} must be in (0, 1], but is {getattr(config, name)}"
            )
    if config.advantage in GROUPED and config.group_size == 1:
        raise UserError(
            f"--advantage {config.advantage} compares the responses to a prompt: give --group-size 2 or more"
        )
    if config.update in ("trpo", "npg"):
        _check_natural(config)
    if config.oversample > 1 and not config.filter_groups:
        raise UserError(
            f"--oversample {config.oversample} chooses among groups: it needs --filter-groups"
        )
    if config.filter_groups and config.group_size == 1:
        raise UserError(
            "--filter-groups needs groups to compare: --group-size 1 has none; use 2 or more"
        )
    if config.reward_norm == "task" and config.num_tasks == 1:
        raise UserError(
            "--reward-norm task tells tasks apart: --num-tasks 1 has none to tell; use --reward-norm batch"
        )
    if config.overlong_buffer > config.response_length:
        raise UserError(
            f"--overlong-buffer {config.overlong_buffer} is longer than --response-length {config.response_length}; shorten it"
        )
    if config.batch_size % devices:
        raise UserError(
            f"--batch-size {config.batch_size} does not divide over {devices} devices; use a multiple of {devices}"
        )
    unit = config.minibatches * config.group_size
    if (config.batch_size // devices) % unit:
        raise UserError(
            f"--batch-size {config.batch_size} ({config.batch_size // devices} for each of {devices} devices) does not divide "
            f"into {config.minibatches} minibatches of whole groups of {config.group_size}; use a multiple of {unit * devices}"
        )

    rows = config.batch_size // devices // config.minibatches
    if rows % (config.microbatches * config.group_size):
        raise UserError(
            f"--microbatches {config.microbatches} does not divide a minibatch of {rows} rows into whole groups of "
            f"{config.group_size}; use a divisor of {rows // config.group_size}"
        )


def _check_natural(config: Config) -> None:
    """A natural-gradient step follows the surrogate alone: what else could stand in a
    loss would silently do nothing.
    """
    idle = {
        "--kl-place loss": config.kl_place == "loss" and config.kl_coef > 0,
        "--entropy-coef": config.entropy_coef != 0,
        "--kl-stop": config.kl_stop > 0,
        "--correction": config.correction != "none",
        "--critic-warmup": config.critic_warmup > 0,
    }
    for option in (name for name, given in idle.items() if given):
        raise UserError(
            f"{option} has no meaning with --update {config.update}, which takes one step on the surrogate alone"
        )
    if config.dtype != "float32":
        raise UserError(
            f"--update {config.update} differentiates twice, for which 16 bits are too few: --dtype float32"
        )


@dataclass(frozen=True)
class RunConfig(Config):
    """A whole run: the step's settings, and what the host does around it."""

    model: str = "smollm2"
    """smollm2 (fetched once, 93 MB), a local folder, or a hub id: GPT-2, Llama, SmolLM,
    Qwen2/2.5/3 or Mistral in safetensors
    """
    prompt_start: bool = False
    """prompts begin with the token that starts a document, in training and wherever the
    run is sampled from
    """
    prompt_format: str = "{prompt}"
    """how `jaxppo sample` puts what it is given; a task has its own"""
    model_kind: str = "transformer"
    """transformer | gru | lstm | convolution | window: of a network that is made anew
    (--tiny, experiments/pretrain.py)
    """
    reward_model: str = ""
    """folder of a run of experiments/reward_model.py: what --reward model pays by, and
    where --value-init reward starts
    """
    name: str = "run"
    """the run's folder is <runs>/<name>"""
    runs: str = "runs"
    """folder that holds the runs"""
    resume: bool = False
    """continue the run of this name from its newest checkpoint"""
    save_every: int = 20
    """steps between checkpoints"""
    keep_every: int = 0
    """checkpoints of steps that are multiples of it are kept for good; 0 = the newest
    two and the best only
    """
    eval_every: int = 20
    """steps between evaluations on validation prompts; 0 = never"""
    patience: int = 0
    """evaluations in a row without a better score after which a run ends (the best
    checkpoint is kept); 0 = never
    """
    steps_per_call: int = 1
    """steps in one dispatch of the program; checkpoints and evaluations fall between
    dispatches
    """
    parallel: str = "auto"
    """auto (jit on one device, pmap on several, mesh with --mesh) | jit | pmap |
    mesh
    """
    mesh: str = ""
    """sizes of the axes of --parallel mesh, which it implies, such as
    data=2,fsdp=2,tensor=2
    """
    expect_devices: int = 0
    """refuse to start unless there are this many devices, over all processes; 0 = any
    number
    """
    distributed: str = "auto"
    """auto (join other processes when the environment names a cluster) | on (join or
    fail) | off
    """
    connect_timeout: int = 300
    """seconds to wait for the other processes"""
    heartbeat: int = 60
    """seconds without a sign of life after which a process counts as dead, and the
    others end
    """
    max_bad_steps: int = 5
    """steps in a row without one finite update after which the run ends (exit code
    76)
    """
    max_invalid_rewards: float = 0.1
    """share of a batch's rewards that may be invalid (NaN, an exception, a deadline);
    above it the run ends (exit code 2)
    """
    debug_nans: bool = False
    """when an update is not finite: do the step again with every operation checked,
    name the one that made it so, and end
    """
    profile: str = ""
    """steps of which to write a JAX trace to the run's folder, first:last, such as 3:6;
    empty = none
    """
    tiny: bool = False
    """smoke test: a small random model with a byte vocabulary"""
    track: str = ""
    """tensorboard, wandb or both with a comma: where the numbers go beside
    metrics.jsonl (`pip install -e ".[track]"`)
    """
    traceback: bool = False
    """show where an error was raised instead of one line"""


# What may differ when a run is gone on with: it does not change the numbers, or only
# how long they go on. Three exceptions, each wanted: `steps` is also where a schedule
# ends; `microbatches` changes the losses kl_cov and clip_cov, which rank the tokens of
# a part; `microbatches`, `parallel` and `mesh` change which dropout a supervised stage
# draws.
FREE = {
    "steps",
    "microbatches",
    "remat",
    "logits_bytes",
    "name",
    "runs",
    "resume",
    "save_every",
    "keep_every",
    "eval_every",
    "patience",
    "prompt_format",
    "steps_per_call",
    "parallel",
    "mesh",
    "expect_devices",
    "distributed",
    "connect_timeout",
    "heartbeat",
    "max_bad_steps",
    "max_invalid_rewards",
    "debug_nans",
    "profile",
    "track",
    "traceback",
    "results",
}

# and the package that each needs
TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def profiled_steps(config: RunConfig) -> tuple[int, int]:
    """The first and the last step of --profile, counted from 1; (0, 0) for none. Raises
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
    """The names in --track. Raises UserError for one that is none, and where a package
    is missing.
    """
    names = tuple(dict.fromkeys(name.strip() for name in config.track.split(",") if name.strip()))
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--track {name!r}: choose among {', '.join(TRACKERS)}")
        found = importlib.util.find_spec(TRACKERS[name])
        if (
            found is None or found.origin is None
        ):  # a mere folder of that name, such as W&B makes, is no package
            raise UserError(
                f'--track {name} needs the package {TRACKERS[name]}: pip install -e ".[track]"'
            )
    return names


def validate_run(config: RunConfig) -> None:
    """`validate`, and what the host's loop needs."""
    validate(config)
    if config.mesh and config.parallel not in ("auto", "mesh"):
        raise UserError(
            f"--mesh {config.mesh} is not for --parallel {config.parallel}: leave that out, or give --parallel mesh"
        )
    tracker_names(config)
    profiled_steps(config)
    for name in ("save_every", "steps_per_call", "max_bad_steps", "connect_timeout", "heartbeat"):
        if getattr(config, name) <= 0:
            raise UserError(
                f"--{name.replace('_', '-')} must be above 0, but is {getattr(config, name)}"
            )
    if config.steps % config.steps_per_call:
        raise UserError(
            f"--steps {config.steps} is not a multiple of --steps-per-call {config.steps_per_call}; make it one"
        )
    for name in ("save_every", "eval_every"):
        if getattr(config, name) % config.steps_per_call:
            option = name.replace("_", "-")
            raise UserError(
                f"--{option} {getattr(config, name)} is not a multiple of --steps-per-call {config.steps_per_call}; make it one"
            )
