import dataclasses
import re
from dataclasses import replace

import pytest

from jaxppo import config
from jaxppo.config import Config, RunConfig, validate, validate_run
from jaxppo.errors import UserError


def test_defaults_are_valid():
    validate(Config())
    validate_run(RunConfig())


def test_derived_sizes():
    c = Config(prompt_length=8, response_length=24, steps=10, epochs=3, minibatches=4)
    assert c.length == 32
    assert c.updates == 120  # 10 · 3 · 4


@pytest.mark.parametrize("name", config.POSITIVE)
def test_zero_is_refused_by_its_option_name(name):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} must be above 0, but is 0"):
        validate(replace(Config(), **{name: 0}))


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
        ({"update": "trpo", "kl_stop": 0.1}, 1, ["--kl-stop", "--update trpo"]),
        ({"update": "trpo", "dtype": "bfloat16"}, 1, ["--update trpo", "--dtype float32"]),
        ({"top_k": -1}, 1, ["--top-k must be 0 or more", "-1"]),
        ({"logits_bytes": 0}, 1, ["--logits-bytes must be 1 or more"]),
        ({"old_logprobs": "mine"}, 1, ["--old-logprobs", "sampler, scorer"]),
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
        # a group of one has no advantage: 9 = 9 x 1 is no cure
        (9, 1, 1, 1, 2, "groups of 2", "--batch-size 10"),
        (9, 2, 1, 1, 1, "2 devices", "--batch-size 10, or 1 device"),
    ],
)  # fmt: skip
def test_a_divisibility_error_has_a_value_that_works_for_each_number(
    batch, devices, minibatches, microbatches, group, parts, cures
):
    settings = Config(
        batch_size=batch, minibatches=minibatches, microbatches=microbatches, group_size=group
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
