import dataclasses
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
        ({"batch_size": 30, "minibatches": 4}, 1, ["30", "4 minibatches", "multiple of 4"]),
        # 24 rows hold 3 units of 2 minibatches x groups of 4
        (
            {"batch_size": 20, "minibatches": 2, "group_size": 4},
            1,
            ["20", "2 minibatches", "groups of 4", "multiple of 8"],
        ),
        ({"batch_size": 30}, 4, ["30", "4 devices", "multiple of 4"]),
        # 48 rows over 8 devices are 6 each, which 4 does not divide
        (
            {"batch_size": 48, "minibatches": 4},
            8,
            ["48", "6 for each of 8 devices", "4 minibatches", "multiple of 32"],
        ),
        ({"top_p": 0.0}, 1, ["--top-p", "(0, 1]", "0.0"]),
        ({"top_p": 1.5}, 1, ["--top-p", "1.5"]),
        ({"dtype": "float16"}, 1, ["--dtype", "'float16'", "float32", "bfloat16"]),
        ({"lr_schedule": "cubic"}, 1, ["--lr-schedule", "'cubic'", "linear", "cosine", "constant"]),
        ({"microbatches": 3}, 1, ["--microbatches 3", "16 rows", "divisor of 16"]),
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


def test_the_advice_of_a_divisibility_error_is_right():
    validate(Config(batch_size=32, minibatches=4), devices=8)  # "a multiple of 32"
    validate(Config(batch_size=8, minibatches=2, group_size=4))  # "a multiple of 8"


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
