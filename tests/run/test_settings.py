"""Settings from a file, as a script's command line takes them: what wins, and what is refused in
one line with exit code 2.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from jaxppo import cli, config
from jaxppo.commands import algorithms, plan
from jaxppo.config import RunConfig
from jaxppo.errors import UserError
from jaxppo.presets import ALGORITHMS, preset
from jaxppo.run import settings


@dataclass(frozen=True)
class Mine(RunConfig):
    """A script's own settings, of every type."""

    name: str = "mine"
    steps: int = 7
    data: Path = Path("prompts.jsonl")
    kind: Literal["one", "two"] = "one"
    at: tuple[int, ...] = ()
    pair: tuple[str, float] = ("a", 0.5)
    hub_token: str = ""


def parsed(tmp_path, text: str, *args: str, suffix: str = "yaml", kind: type = Mine):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return cli.parse(kind, args=["--config", str(path), *args])


def refused(tmp_path, capsys, text, *args: str, suffix: str = "yaml", kind: type = Mine) -> str:
    """The one line on stderr, without the file's folder."""
    with pytest.raises(SystemExit) as stop:
        parsed(tmp_path, text, *args, suffix=suffix, kind=kind)
    shown = capsys.readouterr()
    assert stop.value.code == 2 and shown.out == ""
    assert len(shown.err.splitlines()) == 1 and shown.err.startswith("error: "), shown.err
    return shown.err.removeprefix("error: ").strip().replace(f"{tmp_path}/", "")


# What wins


def test_the_command_line_over_the_file_over_the_scripts_defaults(tmp_path):
    file = "steps: 30\nlr: 1e-4\nbatch_size: 32  # rows\n"
    options = parsed(tmp_path, file, "--batch-size", "16")
    assert (options.batch_size, options.steps, options.lr, options.name, options.epochs) == (
        16,
        30,
        1e-4,
        "mine",
        1,
    )
    assert parsed(tmp_path, "kl_adaptive: true\n", "--no-kl-adaptive").kl_adaptive is False
    # wherever the file stands, and with =
    path = tmp_path / "a.yaml"
    path.write_text(file)
    assert cli.parse(Mine, args=["--batch-size", "16", f"--config={path}"]) == options


def test_the_file_over_the_algorithm(tmp_path):
    """grpo has groups of 8, k3 with .04 in the loss, and no critic."""
    plain = parsed(tmp_path, "algorithm: grpo\n")
    assert plain == preset(Mine(), "grpo") and (
        plain.group_size,
        plain.kl_coef,
        plain.value_loss,
    ) == (8, 0.04, "none")
    mixed = parsed(tmp_path, "algorithm: grpo\nkl_coef: 0.01\ngroup_size: 4\n", "--group-size", "2")
    assert (mixed.algorithm, mixed.kl_coef, mixed.group_size, mixed.kl, mixed.steps) == (
        "grpo",
        0.01,
        2,
        "k3",
        7,
    )


def test_an_algorithm_of_the_command_line_takes_the_place_of_the_files(tmp_path, capsys):
    options = parsed(tmp_path, "algorithm: grpo\nlr: 1e-4\n", "--algorithm", "rloo")
    assert options == dataclasses.replace(preset(Mine(), "rloo"), lr=1e-4)
    # a run's config.json has every setting: there it would be no more than another name
    stored = json.dumps(settings.to_dict(Mine()))
    said = refused(tmp_path, capsys, stored, "--algorithm", "grpo", suffix="json")
    assert said.startswith(
        "--algorithm grpo would change nothing: a.json is of algorithm ppo and sets loss, advantage"
    )
    assert parsed(tmp_path, stored, "--algorithm", "ppo", suffix="json") == Mine()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_runs_own_record_gives_its_settings_back(tmp_path, name):
    mine = dataclasses.replace(
        preset(Mine(), name),
        data=Path("x/y.jsonl"),
        kind="two",
        at=(1, 2),
        clip_high=float("inf"),
        adam_eps=1e-7,
        loss_settings=(("tau_positive", 1.5),),
        pair=("b", 2.0),
        resume=True,
    )
    options = parsed(tmp_path, json.dumps(settings.to_dict(mine), indent=2), suffix="json")
    assert options == dataclasses.replace(
        mine, resume=False
    )  # which says how that run was started last
    assert isinstance(options.data, Path) and hash(options) == hash(
        dataclasses.replace(mine, resume=False)
    )


def test_every_type_from_yaml(tmp_path):
    text = """
algorithm: ppo
data: some/where.jsonl
kind: two
at: [3, 5]
pair: [b, 2]
loss_settings:
  - [tau_positive, 1.5]
  - [tau_negative, 2]
lr: 1E-4          # YAML itself takes it for text
adam_eps: 1.e-8
clip_high: .inf
value_clip: inf
clip_low: null
kl_coef: 0
distributed: "off"
resume: yes
mesh: data=2,fsdp=2
"""
    options = parsed(tmp_path, text)
    assert (options.data, options.kind, options.at, options.pair) == (
        Path("some/where.jsonl"),
        "two",
        (3, 5),
        ("b", 2.0),
    )
    assert options.loss_settings == (("tau_positive", 1.5), ("tau_negative", 2.0))
    assert (options.lr, options.adam_eps, options.clip_high, options.value_clip) == (
        1e-4,
        1e-8,
        float("inf"),
        float("inf"),
    )
    assert options.clip_low is None and isinstance(options.kl_coef, float)
    assert (options.distributed, options.resume, options.mesh) == ("off", True, "data=2,fsdp=2")


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("steps: 1_000", 1000),
        ("steps: 1_000_000", 1_000_000),
        ("steps: 012", 12),  # octal, 10, in YAML 1.1
        ("steps: '12'", 12),
        ("seed: +7", 7),
        ("lr: 1e-4", 1e-4),  # text in YAML 1.1
        ("lr: 1.e-4", 1e-4),
        ("lr: .5", 0.5),
        ("lr: 012", 12.0),
        ("lr: 1_000", 1000.0),
        ("lr: 2", 2.0),
        ("kl_horizon: 1e4", 1e4),
        ("clip_high: .inf", float("inf")),
        ("clip_low: ~", None),
        ("resume: yes", True),
        ("resume: Off", False),
        ("resume: True", True),
        ("at: [012, 1_000]", (12, 1000)),
        # texts that YAML 1.1 reads as something else
        ("distributed: off", "off"),
        ("name: no", "no"),
        ("name: y", "y"),
        ("name: 2024-01-01", "2024-01-01"),
        ("name: 2024-13-45", "2024-13-45"),
        ("name: 1_000", "1_000"),
        ("name: 1e-4", "1e-4"),
        ("name: '012'", "012"),
        ("name: 012", "012"),
        ("name: 1.10", "1.10"),
        ("name: true", "true"),
        ("clip_low: null", None),
        ("clip_low:", None),
        ("profile: 3:6", "3:6"),  # 186 in base 60
        ("name: 0x10", "0x10"),
        ("kind: one", "one"),
    ],
)
def test_yaml_is_read_as_a_person_reads_it(tmp_path, line, value):
    found = getattr(parsed(tmp_path, line + "\n"), line.split(":")[0])
    assert found == value and type(found) is type(value)


def test_what_is_hidden_in_a_record_is_left_out_with_a_note(tmp_path, capsys):
    stored = settings.to_dict(Mine()) | {"hub_token": config.HIDDEN, "steps": 3}
    options = parsed(tmp_path, json.dumps(stored), suffix="json")
    assert (options.hub_token, options.steps) == ("", 3)
    assert (
        capsys.readouterr().err
        == f"note: {tmp_path}/a.json: hub_token is hidden there, and keeps its default\n"
    )
    assert (
        parsed(tmp_path, json.dumps({"api_key": "***"}), suffix="json") == Mine()
    )  # another script's secret is no matter


# What is refused


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "lrr: 1\n",
            "a.yaml: unknown setting 'lrr' (perhaps you meant lr); --help-all lists all settings",
        ),
        ("batch-size: 1\n", "a.yaml: unknown setting 'batch-size' (perhaps you meant batch_size)"),
        (
            "a: 1\nstepz: 2\n",
            "unknown settings 'a' (perhaps you meant at), 'stepz' (perhaps you meant steps)",
        ),
        ("config: b.yaml\n", "unknown setting 'config'"),
        ("3: 1\n", "unknown setting '3'"),
        ("steps: many\n", "a.yaml: steps is 'many', but must be int"),
        ("steps: 1.5\n", "steps is '1.5', but must be int"),
        ("steps: true\n", "steps is 'true', but must be int"),
        ("lr: fast\n", "lr is 'fast', but must be float"),
        ("lr: .nan\n", "lr is '.nan', but must be float"),
        ("clip_low: x\n", "clip_low is 'x', but must be float | None"),
        ("lr:\n", "lr is '', but must be float"),
        ("resume: 1\n", "resume is '1', but must be bool"),
        ("steps: 1:30\n", "steps is '1:30', but must be int"),
        ("lr: 1:30\n", "lr is '1:30', but must be float"),
        ("steps: 0x10\n", "steps is '0x10', but must be int"),
        ("steps: 0o12\n", "steps is '0o12', but must be int"),
        ("steps: 10_00\n", "steps is '10_00', but must be int"),
        ("steps: 1,000\n", "steps is '1,000', but must be int"),
        ("steps: 1e3\n", "steps is '1e3', but must be int"),
        ("lr: yes\n", "lr is 'yes', but must be float"),
        ("resume: y\n", "resume is 'y', but must be bool"),
        ("at: [1:30]\n", "at is a list, but must be tuple[int, ...]"),
        ("kind: three\n", "kind is 'three', but must be one of one, two"),
        ("at: 3\n", "at is '3', but must be tuple[int, ...]"),
        ("at: [x]\n", "at is a list, but must be tuple[int, ...]"),
        ("pair: [b]\n", "pair is a list, but must be tuple[str, float]"),
        ("optimizer:\n  lr: 1\n", "optimizer is a mapping, but must be str"),
        ("algorithm: ppa\n", "a.yaml: algorithm is 'ppa'; choose one of reinforce, "),
        ("lr: 1\nsteps: 3\nlr: 2\n", "a.yaml, line 3: 'lr' is given twice"),
        ("", "a.yaml holds nothing, not settings such as lr: 0.001"),
        ("# nothing\n---\n", "a.yaml holds str, not settings"),
        ("- lr\n", "a.yaml holds list, not settings"),
        ("lr\n", "a.yaml holds str, not settings"),
        ("lr: 1\n---\nlr: 2\n", "line 2: not YAML (but found another document)"),
        ("lr: [1\n", "line 2: not YAML (expected ',' or ']', but got '<stream end>')"),
        ("\tlr: 1\n", "not YAML (found character '\\t' that cannot start any token)"),
        ("lr: \x00\n", "a.yaml is not YAML (unacceptable character #x0000"),
        ("name: !!python/object/apply:os.system [touch x]\n", "name is a list, but must be str"),
        ("lr: &a 1\ncritic_lr: *a\n", "a.yaml, line 2: an alias (*a); write its value out"),
        ("at: " + "[" * 5000, "a.yaml is not YAML (maximum recursion depth exceeded"),
        (b"lr: 1 # \xff\n", "a.yaml is not UTF-8 (byte 9); save it as UTF-8"),
    ],
)
def test_a_file_that_is_none_is_one_line(tmp_path, capsys, text, words):
    assert words in refused(tmp_path, capsys, text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"steps": "many"}', "a.json: steps is 'many', but must be int"),
        ('{"name": 3}', "a.json: name is 3, but must be str"),
        ('{"lr": 1, "lr": 2}', "a.json: 'lr' is given twice"),
        ("{half", "a.json is not JSON"),
        ("[" * 100_000, "a.json"),
        ("[1]", "a.json holds list, not settings"),
        ("", "a.json is not JSON"),
        (
            '{"reward_scale": 1, "kl_coeff": 2}',
            "settings 'reward_scale' (perhaps you meant reward_clip), 'kl_coeff' (",
        ),
        ('{"reward_scale": 1}', "a run's config.json goes with the script that wrote it"),
        ('{"lr": 1' + "0" * 400 + "}", "lr is 1000"),
        ('{"lr": NaN}', "lr is nan, but must be float"),
    ],
)
def test_a_record_that_is_none_is_one_line(tmp_path, capsys, text, words):
    assert words in refused(tmp_path, capsys, text, suffix="json")


def test_a_bomb_of_aliases_is_refused_before_it_goes_off(tmp_path, capsys):
    """Nine levels of nine: a billion values in less than a kilobyte."""
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    assert "line 2: an alias (*a0)" in refused(tmp_path, capsys, "\n".join(levels))


def test_a_file_without_end_is_not_read_to_its_end(tmp_path, capsys):
    assert "has more than 100,000 bytes: it is no settings file" in refused(
        tmp_path, capsys, "# " + "x" * 100_000
    )
    with pytest.raises(SystemExit):
        cli.parse(Mine, args=["--config", "/dev/zero"])
    assert "more than 100,000 bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read (No such file or directory)"),
        (["--config", "/"], "/ cannot be read (Is a directory)"),
        (["--config"], "--config needs a file"),
        (["--config", "--steps", "3"], "--config needs a file"),
        (["--config=", "--steps", "3"], "--config needs a file"),
        (["--config", "a.yaml", "--config=b.yaml"], "--config is given 2 times; give one file"),
    ],
)
def test_a_file_that_is_not_there(args, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(Mine, args=args)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and words in shown and len(shown.splitlines()) == 1


def test_a_wrong_option_beside_a_file_is_still_found(tmp_path, capsys):
    assert "--stepz" in refused(tmp_path, capsys, "lr: 1\n", "--stepz", "3")


def test_plan_takes_a_record_in_its_place_or_a_file_but_not_both(tmp_path, capsys):
    record = tmp_path / "config.json"
    record.write_text("{}")
    assert cli.parse(plan.PlanOptions, args=[str(record), "--topology", "v5e:1x1"]).config == record
    options = parsed(
        tmp_path,
        "batch_size: 32\ntopology: v5e:2x2\n",
        "--topology",
        "v5e:2x4",
        kind=plan.PlanOptions,
    )
    assert (options.batch_size, options.topology, options.config) == (32, "v5e:2x4", None)
    said = refused(tmp_path, capsys, "batch_size: 32\n", str(record), kind=plan.PlanOptions)
    assert said == "two files of settings, config.json and --config a.yaml; give one"


def test_plan_takes_the_record_of_any_script_but_no_wrong_name_of_a_file(tmp_path, capsys):
    stored = json.dumps(settings.to_dict(Mine(steps=3, hub_token="a")))
    options = parsed(tmp_path, stored, suffix="json", kind=plan.PlanOptions)
    assert (options.steps, options.record, options.config) == (3, tmp_path / "a.json", None)
    said = refused(tmp_path, capsys, "lrr: 1\n", kind=plan.PlanOptions)
    assert said.startswith("a.yaml: unknown setting 'lrr' (perhaps you meant lr)")
    said = refused(tmp_path, capsys, stored, suffix="json", kind=RunConfig)
    assert "a run's config.json goes with the script that wrote it" in said


def test_help_mentions_it(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(plan.PlanOptions, args=["--help"])
    assert stop.value.code == 0 and "--config FILE" in capsys.readouterr().out


def test_what_has_no_settings_takes_no_file(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(algorithms.AlgorithmsOptions, args=["--config", "a.yaml"])
    assert stop.value.code == 2 and "--config" in capsys.readouterr().err


def test_read_gives_types(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1\n")
    assert settings.read_config_file(RunConfig, tmp_path / "a.yaml") == ({"lr": 1.0}, [])
    with pytest.raises(UserError):
        settings.read_config_file(RunConfig, tmp_path / "b.yaml")


# A run's config.json


def test_to_dict_is_json():
    @dataclasses.dataclass(frozen=True)
    class Own(RunConfig):
        data: Path = Path("a") / "b.jsonl"

    stored = settings.to_dict(Own())
    assert stored["data"] == "a/b.jsonl"
    assert stored["batch_size"] == 64
    assert json.loads(json.dumps(stored)) == stored


def test_from_dict_is_the_way_back():
    mine = RunConfig(steps=3, loss_settings=(("tau_positive", 1.5),), clip_low=0.1)
    stored = json.loads(json.dumps(settings.to_dict(mine)))
    assert settings.from_dict(RunConfig, stored | {"unknown": 1}, source="x") == mine
    assert hash(settings.from_dict(RunConfig, stored, source="x")) == hash(mine)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "holds list, not settings"),
        ("{half", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"steps": "many"}', "steps is 'many', but must be int"),
        ('{"steps": 1.5}', "steps is 1.5, but must be int"),
        ('{"steps": true}', "steps is True, but must be int"),
        ('{"lr": [1]}', "lr is a list, but must be float"),
        ('{"clip_low": "x"}', "clip_low is 'x', but must be float | None"),
        ('{"resume": 1}', "resume is 1, but must be bool"),
        ('{"loss_settings": "x"}', "loss_settings is 'x'"),
        ('{"lr": null}', "lr is None"),
    ],
)
def test_a_config_that_holds_no_settings(tmp_path, text, words):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        settings.read_config(RunConfig, path)
    assert words in str(caught.value)


def test_a_config_of_another_script(tmp_path):
    path = tmp_path / "config.json"
    mine = RunConfig(steps=3, clip_low=0.1, loss_settings=(("tau_positive", 1.0),))
    path.write_text(json.dumps(settings.to_dict(mine) | {"of a script": 1}))
    assert settings.read_config(RunConfig, path) == mine
    with pytest.raises(UserError, match="cannot be read"):
        settings.read_config(RunConfig, tmp_path / "nothing")
