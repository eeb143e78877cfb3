import dataclasses
import importlib.util
import json
import math
import re
import sys
import typing
from dataclasses import replace
from pathlib import Path

import pytest

from jaxppo import cli, config
from jaxppo.ablation.question import AblationConfig
from jaxppo.ablation.toy_tasks import ToyConfig
from jaxppo.commands.evaluate import EvalOptions
from jaxppo.commands.plan import PlanOptions
from jaxppo.commands.sample import SampleOptions
from jaxppo.commands.train import TrainOptions
from jaxppo.config import Config, RunConfig, check_numbers, ranges_of, validate, validate_run
from jaxppo.errors import UserError
from jaxppo.run import settings
from jaxppo.tasks import TaskConfig

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def test_defaults_are_valid():
    validate(Config())
    validate_run(RunConfig())


def test_derived_sizes():
    c = Config(prompt_length=8, response_length=24, steps=10, epochs=3, minibatches=4)
    assert c.length == 32
    assert c.updates == 120  # 10 · 3 · 4


def numbers_of(kind: type) -> list[str]:
    """The settings of a class that are numbers, or tuples with numbers in them."""

    def has_number(hint) -> bool:
        return hint in (int, float) or any(map(has_number, typing.get_args(hint)))

    literal = lambda hint: typing.get_origin(hint) is typing.Literal
    return [
        name
        for name, hint in typing.get_type_hints(kind).items()
        if not name.isupper() and not literal(hint) and has_number(hint)
    ]


def with_number(options, name: str, x: float):
    """The options with this number, in a tuple if the setting is one."""
    hint = typing.get_type_hints(type(options))[name]
    if typing.get_origin(hint) is tuple:
        pair = typing.get_origin(typing.get_args(hint)[0]) is tuple
        return replace(options, **{name: (("a", x),) if pair else (x,)})
    return replace(options, **{name: x})


def defaults(kind: type):
    needed = {x.name: "" for x in dataclasses.fields(kind) if x.default is dataclasses.MISSING}
    return kind(**needed)


OWN = [Config, RunConfig, TaskConfig, ToyConfig, AblationConfig]
OWN += [TrainOptions, PlanOptions, SampleOptions, EvalOptions]


@pytest.fixture(scope="module")
def scripts() -> dict[str, type]:
    """The class of settings of each script of experiments/."""
    found, before = {}, [*sys.path]
    sys.path[:0] = [str(EXPERIMENTS), str(EXPERIMENTS / "benchmarks")]
    folders = ("", "benchmarks/", "recipes/")
    paths = sorted(path for place in folders for path in EXPERIMENTS.glob(f"{place}*.py"))
    for path in paths:
        name = re.search(r"cli\.script\(main, (\w+)", path.read_text())
        if name is None:
            continue
        spec = importlib.util.spec_from_file_location(f"settings_of_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        found[f"{path.parent.name}/{path.stem}"] = getattr(module, name[1])
    sys.path[:] = before
    return found


def refusal(options) -> str:
    try:
        check_numbers(options)
    except UserError as error:
        return str(error)
    return ""


def test_every_number_of_every_class_of_settings_has_a_range(scripts):
    """Not a number, 1e300 and infinity are refused in one line that names the option; infinity and
    1e300 are taken where a range says that infinity is no bound.
    """
    assert len(scripts) > 20
    seen = set()
    for kind in [*OWN, *scripts.values()]:
        options, ranges = defaults(kind), ranges_of(kind)
        assert refusal(options) == ""
        for name in numbers_of(kind):
            assert name in ranges, f"{kind.__name__}.{name} has no range in RANGES"
            if (name, ranges[name]) in seen:
                continue
            seen.add((name, ranges[name]))
            words = {x: refusal(with_number(options, name, x)) for x in PROBES}
            unbounded = ranges[name].endswith("inf]")
            must_refuse = {math.nan, -math.inf} | (set() if unbounded else {math.inf, 1e300})
            for x, said in words.items():
                assert said or x not in must_refuse, f"{kind.__name__}.{name}: {x} is taken"
                assert not said or said.startswith(f"--{name.replace('_', '-')} ")
                assert "\n" not in said
    assert {"lr", "sft_steps", "weights", "of", "at_once", "candidates", "max_tokens"} <= {
        name for name, _ in seen
    }


PROBES = (0, -1, math.nan, math.inf, -math.inf, 1e300)
# What 0 and -1 mean where they are taken, by the help or by the name.
ZERO = {
    "critic_warmup", "lr_warmup", "log_samples", "min_tokens", "top_k", "lora", "overlong_buffer",
    "reward_reference", "backtracks", "keep_every", "eval_every", "patience", "expect_devices",
    "pad", "start", "eos", "seed", "beta", "beta_target", "value_coef", "lam_alpha",
    "missing_eos_penalty",
    "overlong_penalty", "reward_clip", "kl_coef", "kl_coef_min", "kl_stop", "lr", "critic_lr",
    "weight_decay", "cg_damping", "max_grad_norm", "gamma", "turn_gamma", "lam", "critic_lam",
    "max_invalid_rewards", "baseline_decay", "entropy_coef", "missing_eos_score", "loss_settings",
    "tokens_per_microbatch", "whiten_ddof", "likelihood_coef", "likelihood_threshold",
    "off_policy_threshold", "correction_low", "rejection_low", "distil_coef", "reference_every",
    "reference_decay", "ema_decay",
    "eval_right",
}  # fmt: skip
MINUS_ONE = {
    "eos", "entropy_coef", "likelihood_threshold", "missing_eos_score", "loss_settings",
    "eval_right",
}  # fmt: skip


@pytest.mark.parametrize("name", numbers_of(RunConfig))
def test_0_and_minus_1_are_taken_where_they_mean_something(name):
    options = RunConfig()
    assert (refusal(with_number(options, name, 0)) == "") == (name in ZERO)
    assert (refusal(with_number(options, name, -1)) == "") == (name in MINUS_ONE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": -1e-3}, "--lr must be 0 or more, but is -0.001"),  # would climb the loss
        ({"max_grad_norm": -1.0}, "--max-grad-norm must be 0 or more, but is -1.0"),
        ({"kl_horizon": 0.0}, "--kl-horizon must be above 0, but is 0.0"),  # a divisor
        (
            {"batch_size": 10**400},
            "--batch-size must be 2147483647 or less, but is 10000000000000000000",
        ),
        ({"batch_size": 2.5}, "--batch-size must be a whole number, but is 2.5"),
        ({"seed": 2**32}, "--seed must be 4294967295 or less, but is 4294967296"),  # would be 0
        (
            {"loss": "sapo", "loss_settings": (("tau_positive", 0.0),)},
            "--loss-settings tau_positive must be above 0, but is 0.0",
        ),
        (
            {"loss_settings": (("mine", math.nan),)},
            "--loss-settings mine must be a finite number, but is nan",
        ),
    ],
)
def test_a_number_out_of_its_range_is_one_line(changes, words):
    with pytest.raises(UserError) as caught:
        validate(replace(Config(), **changes))
    assert str(caught.value) == words


def test_the_option_that_was_given_is_named():
    options = TaskConfig(sft_steps=-1)
    assert refusal(options) == "--sft-steps must be 0 or more, but is -1"
    assert refusal(TrainOptions(prompt_length=0)) == ""  # there it is the longest prompt's
    assert refusal(SampleOptions(Path("run"), temperature=0.0)) == ""  # greedy


def test_a_number_is_refused_on_the_command_line_before_anything_is_loaded(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(TaskConfig, args=["--sft-steps", "-1"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --sft-steps must be 0 or more, but is -1\n"


@pytest.mark.parametrize(
    "path", sorted(EXPERIMENTS.glob("results/**/*.json")), ids=lambda x: x.stem
)
def test_settings_of_records_are_valid(path, scripts):
    """In the ranges of the class that wrote them, wherever that has a range."""
    record = json.loads(path.read_text())
    script = path.parent.name
    script = "reasoning" if script in ("spelling", "sums") else script
    own = (scripts.get(f"{place}/{script}") for place in ("experiments", "recipes"))
    kind = ToyConfig if script == "ablations" else next(x for x in own if x)
    options = settings.from_dict(kind, record["config"], source=path)
    assert refusal(options) == ""
    for arm in record.get("settings", {}).values():
        own = record["config"] | arm
        assert refusal(settings.from_dict(kind, own, source=path)) == ""


@pytest.mark.parametrize(
    ("changes", "devices", "words"),
    [
        ({"top_p": 0.0}, 1, ["--top-p", "(0, 1]", "0.0"]),
        ({"top_p": 1.5}, 1, ["--top-p", "1.5"]),
        ({"dtype": "float16"}, 1, ["--dtype", "'float16'", "float32", "bfloat16"]),
        ({"lr_schedule": "cubic"}, 1, ["--lr-schedule", "'cubic'", "linear", "cosine", "constant"]),
        ({"oversample": 2}, 1, ["--oversample 2", "--filter-groups"]),
        ({"filter_groups": True}, 1, ["--filter-groups", "--group-size 1"]),
        ({"update": "trpo", "kl_place": "loss"}, 1, ["--kl-place loss", "--update trpo"]),
        ({"update": "npg", "entropy_coef": 0.1}, 1, ["--entropy-coef", "--update npg"]),
        ({"rejection": "token_k1"}, 1, ["--rejection token_k1", "--rejection-low"]),
        ({"update": "trpo", "top_entropy": 0.2}, 1, ["--top-entropy", "--update trpo"]),
        ({"update": "npg", "likelihood_coef": 0.1}, 1, ["--likelihood-coef", "--update npg"]),
        ({"update": "trpo", "kl_stop": 0.1}, 1, ["--kl-stop", "--update trpo"]),
        ({"update": "trpo", "distil": "jsd"}, 1, ["--distil jsd", "--update trpo"]),
        ({"distil_beta": 1.0}, 1, ["--distil-beta", "(0, 1)", "1"]),
        ({"update": "trpo", "dtype": "bfloat16"}, 1, ["--update trpo", "--dtype float32"]),
        ({"top_k": -1}, 1, ["--top-k must be 0 or more", "-1"]),
        ({"logits_bytes": 0}, 1, ["--logits-bytes must be 1 or more"]),
        ({"old_logprobs": "mine"}, 1, ["--old-logprobs", "sampler, scorer"]),
        ({"decode_dtype": "int4"}, 1, ["--decode-dtype", "same, int8"]),
        ({"decode_dtype": "int8"}, 1, ["--decode-dtype int8", "--old-logprobs scorer"]),
        (
            {"loss": "two_sided", "old_logprobs": "scorer"},
            1,
            ["--loss two_sided", "--old-logprobs sampler", "--decode-dtype same"],
        ),
        ({"overlong_buffer": 30}, 1, ["--overlong-buffer 30", "--response-length 24"]),
        ({"mask_top_p": 0.0}, 1, ["--mask-top-p", "(0, 1]"]),
        ({"min_tokens": 25}, 1, ["--min-tokens 25", "--response-length 24"]),
        ({"min_tokens": -1}, 1, ["--min-tokens must be 0 or more", "-1"]),
        ({"stop": ("a", "")}, 1, ["--stop has an empty text"]),
        (
            {"reward_norm": "task"},
            1,
            ["--reward-norm task", "--num-tasks 1", "--reward-norm batch"],
        ),
        ({"num_tasks": 0}, 1, ["--num-tasks", "0"]),
        ({"whiten_ddof": 2}, 1, ["--whiten-ddof", "2", "0, 1"]),
        ({"layout": "padded"}, 1, ["--layout 'padded'", "packed, dense"]),
    ],
)
def test_errors_name_both_numbers_and_what_to_do(changes, devices, words):
    with pytest.raises(UserError) as caught:
        validate(replace(Config(), **changes), devices=devices)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("batch", "devices", "minibatches", "microbatches", "group", "parts", "cures"),
    [
        # 32 = 8 x 4; 30 is divisible by 3
        (30, 1, 4, 1, 1, "4 minibatches", "--batch-size 32, or --minibatches 3"),
        # the unit is 2 x 4 = 8: 24 = 3 x 8; 20 = 5 x (1 x 4) = 5 x (2 x 2)
        (
            20, 1, 2, 1, 4, "2 minibatches x groups of 4",
            "--batch-size 24, or --minibatches 1, or --group-size 2",
        ),
        # 4 x 4 = 16; 30 / 4 and 30 / (1 x 4) are not whole
        (30, 4, 4, 1, 1, "4 devices x 4 minibatches", "--batch-size 32"),
        # 8 x 4 = 32; 48 = 6 x 4 x 2 = 8 x 3 x 2
        (
            48, 8, 4, 1, 1, "8 devices x 4 minibatches",
            "--batch-size 64, or 6 devices, or --minibatches 3",
        ),
        # 4 x 3 = 12: 72 = 6 x 12; 64 = 4 x 2 x 8; no smaller number of minibatches helps
        (
            64, 1, 4, 3, 1, "4 minibatches x 3 microbatches",
            "--batch-size 72, or --microbatches 2",
        ),
        # minibatches of a multiple of lcm(6, 4) = 12 rows: 24 = 2 x 12; 16 / 2 = 2 x 4
        (
            16, 1, 2, 6, 4, "2 minibatches x 6 microbatches x groups of 4",
            "--batch-size 24, or --microbatches 4",
        ),
        # a group of one has no advantage: 9 = 9 x 1 is no cure
        (9, 1, 1, 1, 2, "groups of 2", "--batch-size 10"),
        (9, 2, 1, 1, 1, "2 devices", "--batch-size 10, or 1 device"),
    ],
)  # fmt: skip
def test_a_divisibility_error_has_a_value_that_works_for_each_number(
    batch, devices, minibatches, microbatches, group, parts, cures
):
    settings = Config(
        batch_size=batch,
        minibatches=minibatches,
        microbatches=microbatches,
        group_size=group,
        layout="dense",
    )
    with pytest.raises(UserError) as caught:
        validate(settings, devices=devices)
    assert str(caught.value) == f"--batch-size {batch} does not divide into {parts}; use {cures}"
    for cure in cures.split(", or "):
        if match := re.fullmatch(r"(\d+) devices?", cure):
            validate(settings, devices=int(match[1]))
        else:
            name, value = cure.removeprefix("--").replace("-", "_").split()
            validate(replace(settings, **{name: int(value)}), devices=devices)


def test_a_microbatch_may_cut_a_group_and_packed_rows_anywhere():
    """Minibatches of 8 rows, two groups of 4: 8 microbatches of a row, not 3; packed, any."""
    settings = Config(batch_size=16, minibatches=2, microbatches=8, group_size=4, layout="dense")
    validate(settings)
    with pytest.raises(UserError, match="3 microbatches"):
        validate(replace(settings, microbatches=3))
    validate(replace(settings, microbatches=3, layout="packed"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"save_every": 0}, ["--save-every", "0"]),
        ({"steps_per_call": 0}, ["--steps-per-call", "0"]),
        ({"steps": 10, "steps_per_call": 4}, ["--steps 10", "--steps-per-call 4"]),
        ({"mesh": "fsdp=4", "parallel": "pmap"}, ["--mesh fsdp=4", "--parallel pmap"]),
        (
            {"steps": 12, "steps_per_call": 4, "save_every": 6},
            ["--save-every 6", "--steps-per-call 4"],
        ),
        (
            {"steps": 12, "steps_per_call": 4, "save_every": 8, "eval_every": 2},
            ["--eval-every 2", "--steps-per-call 4"],
        ),
        ({"distil": "forward"}, ["--distil forward needs --teacher"]),
        ({"algorithm": "distil"}, ["--algorithm distil needs --teacher"]),
        ({"batch_size": 30, "minibatches": 4}, ["30", "4"]),  # the step's own rules hold too
    ],
)
def test_errors_of_a_run(changes, words):
    with pytest.raises(UserError) as caught:
        validate_run(replace(RunConfig(), **changes))
    for word in words:
        assert word in str(caught.value)


def test_no_evaluation_goes_with_any_steps_per_call():
    validate_run(RunConfig(steps=12, steps_per_call=4, save_every=8, eval_every=0))


def test_oversampling_makes_more_rollouts_than_it_learns_from():
    c = Config(batch_size=64, group_size=8, filter_groups=True, oversample=3)
    validate(c)
    assert c.rows == 192


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_settings_are_finite(value):
    with pytest.raises(UserError, match="--temperature must be a finite number"):
        validate(Config(temperature=value))
    validate(Config(clip_high=float("inf")))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"\n", "\n"),
        (r"a\tb\n", "a\tb\n"),
        (r"\\n", r"\n"),  # two backslashes are one
        (r"\boxed", r"\boxed"),  # others stay
        ("\n", "\n"),  # a shell can pass one on
    ],
)
def test_a_line_end_on_the_command_line(typed, meant):
    assert config.unescape(typed) == meant
    assert config.unescape(config.escape(meant)) == meant
