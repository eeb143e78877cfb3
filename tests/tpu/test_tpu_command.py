"""The verbs of tpu.py: exact commands, wrong input, and dry runs that print the real commands."""

import shlex
import subprocess

import pytest

# Type, topology, chips, hosts: https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e.
TYPES = [
    ("v4-8", "v4:2x2x1", 4, 1),
    ("v4-16", "v4:2x2x2", 8, 2),
    ("v4-32", "v4:2x2x4", 16, 4),
    ("v4-64", "v4:2x4x4", 32, 8),
    ("v4-128", "v4:4x4x4", 64, 16),
    ("v4-256", "v4:4x4x8", 128, 32),
    ("v4-512", "v4:4x8x8", 256, 64),
    ("v4-1024", "v4:8x8x8", 512, 128),
    ("v4-2048", "v4:8x8x16", 1024, 256),
    ("v4-4096", "v4:8x16x16", 2048, 512),
    ("v5litepod-1", "v5e:1x1", 1, 1),
    ("v5litepod-4", "v5e:2x2", 4, 1),
    ("v5litepod-8", "v5e:2x4", 8, 1),
    ("v5litepod-16", "v5e:4x4", 16, 4),
    ("v5litepod-32", "v5e:4x8", 32, 8),
    ("v5litepod-64", "v5e:8x8", 64, 16),
    ("v5litepod-128", "v5e:8x16", 128, 32),
    ("v5litepod-256", "v5e:16x16", 256, 64),
    ("v5p-8", "v5p:2x2x1", 4, 1),
    ("v5p-16", "v5p:2x2x2", 8, 2),
    ("v5p-32", "v5p:2x2x4", 16, 4),
    ("v5p-64", "v5p:2x4x4", 32, 8),
    ("v5p-128", "v5p:4x4x4", 64, 16),
    ("v5p-256", "v5p:4x4x8", 128, 32),
    ("v5p-512", "v5p:4x8x8", 256, 64),
    ("v5p-1024", "v5p:8x8x8", 512, 128),
    ("v5p-2048", "v5p:8x8x16", 1024, 256),
    ("v5p-4096", "v5p:8x16x16", 2048, 512),
    ("v5p-8192", "v5p:16x16x16", 4096, 1024),
    ("v5p-12288", "v5p:16x16x24", 6144, 1536),
    ("v6e-1", "v6e:1x1", 1, 1),
    ("v6e-4", "v6e:2x2", 4, 1),
    ("v6e-8", "v6e:2x4", 8, 1),
    ("v6e-16", "v6e:4x4", 16, 4),
    ("v6e-32", "v6e:4x8", 32, 8),
    ("v6e-64", "v6e:8x8", 64, 16),
    ("v6e-128", "v6e:8x16", 128, 32),
    ("v6e-256", "v6e:16x16", 256, 64),
]
IMAGES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
JOB = ["--", "experiments/sentiment.py", "--runs", "gs://my-bucket/runs"]
ZONE = "--zone=us-east5-b --quiet"
SSH = "gcloud compute tpus tpu-vm ssh my-run --worker=all '--ssh-flag=-o ServerAliveInterval=30'"


def commands(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize(
    ("kind", "topology", "chips", "hosts"), TYPES, ids=[kind[0] for kind in TYPES]
)
def test_the_commands_of_every_type(cloud, capsys, kind, topology, chips, hosts):
    assert cloud.run("create", "--type", kind, "--dry-run") == 0
    assert commands(capsys.readouterr().out) == [
        "gcloud compute tpus queued-resources create my-run --node-id=my-run "
        f"--accelerator-type={kind} "
        f"--runtime-version={IMAGES[topology.split(':')[0]]} {ZONE}"
    ]
    assert cloud.run("run", "--type", kind, "--dry-run", *JOB) == 0
    pod = " --distributed on --connect-timeout 1800" if hosts > 1 else ""
    job = (
        "experiments/sentiment.py --runs gs://my-bucket/runs --name my-run "
        f"--expect-devices {chips}{pod}"
    )
    _, read, plan, look, machine, start = commands(capsys.readouterr().out)
    assert read.endswith(f"/tpu/job_settings.py {cloud.cache}/config.json {job}")
    assert plan.endswith(f"jaxppo plan {cloud.cache}/config.json --topology {topology}")
    assert look == f"gcloud compute tpus queued-resources describe my-run --format=json {ZONE}"
    assert machine == f"gcloud compute tpus tpu-vm describe my-run --format=json {ZONE}"
    assert start == (
        f"{SSH} '--command=env JAX_PLATFORMS=tpu,cpu bash jaxppo/tpu/job.sh "
        f"start my-run -- python {job}' {ZONE}"
    )
    assert cloud.calls == []


def test_every_type_is_tried():
    from accelerators import ACCELERATORS

    assert list(ACCELERATORS) == [kind[0] for kind in TYPES]


@pytest.mark.parametrize(
    ("verb", "args", "expected"),
    [
        (
            "create",
            ["--type", "v6e-8", "--spot"],
            "queued-resources create my-run --node-id=my-run --accelerator-type=v6e-8 "
            f"--runtime-version=v2-alpha-tpuv6e --spot {ZONE}",
        ),
        (
            "create",
            [
                "--type",
                "v4-8",
                "--wait-hours",
                "1.5",
                "--gcloud-option=--reserved",
                "--gcloud-option=--network=mine",
            ],
            "queued-resources create my-run --node-id=my-run "
            "--accelerator-type=v4-8 --runtime-version=tpu-ubuntu2204-base "
            f"--valid-until-duration=5400s --reserved --network=mine {ZONE}",
        ),
        (
            "delete",
            ["--project", "mine"],
            "queued-resources delete my-run --force --zone=us-east5-b --project=mine --quiet",
        ),
        (
            "stop",
            ["--run", "other"],
            f"tpu-vm ssh my-run --worker=all '--ssh-flag=-o ServerAliveInterval=30' "
            f"'--command=bash jaxppo/tpu/job.sh stop other' {ZONE}",
        ),
        (
            "logs",
            ["--lines", "5"],
            f"tpu-vm ssh my-run --worker=0 '--ssh-flag=-o ServerAliveInterval=30' "
            f"'--command=bash jaxppo/tpu/job.sh log my-run 5' {ZONE}",
        ),
        (
            "logs",
            ["--worker", "all"],
            f"tpu-vm ssh my-run --worker=all '--ssh-flag=-o ServerAliveInterval=30' "
            f"'--command=bash jaxppo/tpu/job.sh log my-run 100 named' {ZONE}",
        ),
        (
            "logs",
            ["--follow", "--worker", "3"],
            f"tpu-vm ssh my-run --worker=3 '--ssh-flag=-o ServerAliveInterval=30' "
            f"'--command=tail -n 100 -F .jaxppo-jobs/my-run/log' {ZONE}",
        ),
    ],
)
def test_the_command_of_each_verb(cloud, verb, args, expected):
    cloud.play(["active"], there=verb != "create")
    assert cloud.run(verb, *args) == 0
    assert [shlex.join(call) for call in cloud.calls] == [f"gcloud compute tpus {expected}"]


def test_setup_copies_the_code_and_the_secrets(cloud, tmp_path):
    file = tmp_path / "secrets.env"
    file.touch(0o600)
    cloud.play(["active"], there=True)
    cloud.run("status")
    assert cloud.run("setup", "--env-file", str(file)) == 0
    tpu = "gcloud compute tpus tpu-vm"
    assert [shlex.join(call) for call in cloud.calls[-3:]] == [
        f"{tpu} scp --worker=all {cloud.cache}/jaxppo.tar.gz my-run:jaxppo.tar.gz {ZONE}",
        f"{SSH} '--command=mkdir -p jaxppo && rm -rf jaxppo/jaxppo && tar -xzf "
        "jaxppo.tar.gz -C jaxppo "
        f"&& JAXPPO_GCSFUSE=1 bash jaxppo/tpu/setup_vm.sh' {ZONE}",
        f"{tpu} scp --worker=all --scp-flag=-p {file} my-run:.jaxppo.env {ZONE}",
    ]


@pytest.mark.parametrize(
    ("verb", "args"),
    [
        ("babysit", ["--type", "v6e-16", "--spot", *JOB]),
        ("babysit", ["--type", "v6e-8", "--", "experiments/sentiment.py"]),
        ("run", ["--type", "v6e-16", *JOB]),
        ("status", []),
        ("wait", []),
    ],
)
def test_a_dry_run_prints_what_a_real_one_runs(cloud_on_path, capsys, verb, args):
    cloud = cloud_on_path
    cloud.play(
        ["active", "exit 0"],
        hosts=4 if "v6e-16" in args else 1,
        type=args[1] if args else "v6e-8",
        there=verb != "babysit",
    )
    assert cloud.run(verb, "--dry-run", "--no-plan", *args) == 0
    printed = capsys.readouterr().out
    assert cloud.calls == [] and cloud.slept == []
    assert cloud.run(verb, "--no-plan", *args) == 0
    assert commands(printed) == [shlex.join(call) for call in cloud.calls]
    assert (
        subprocess.run(["bash", "-n"], input=printed, text=True).returncode == 0
    )  # a script, with comments


def test_step_by_step_from_nothing_to_a_finished_run(cloud, capsys):
    cloud.play(["WAITING_FOR_RESOURCES", "PROVISIONING", "active", "active", "active", "exit 0"])
    offer = "delete it with: python3 tpu/tpu.py delete my-run --zone us-east5-b"
    for verb, args in (
        ("create", ["--type", "v6e-8"]),
        ("wait", []),
        ("setup", []),
        ("run", ["--type", "v6e-8", "--no-plan", *JOB]),
    ):
        assert cloud.run(verb, *args) == 0
        assert offer in capsys.readouterr().out  # each leaves something behind that costs
    cloud.run("status")
    assert (
        "my-run: ACTIVE" in (said := capsys.readouterr().out)
        and "host 0: running" in said
        and offer in said
    )
    cloud.run("status")
    assert "host 0: exit 0" in capsys.readouterr().out
    assert cloud.run("delete") == 0
    assert cloud.story == ["create", "scp", "setup", "start", "delete"]
    cloud.run("status")
    assert capsys.readouterr().out.splitlines()[-1] == "my-run: NONE, 0.0 paid hours"


@pytest.mark.parametrize(
    ("state", "said"),
    [("SUSPENDED", "SUSPENDED"), ("preempted", "PREEMPTED"), ("FAILED", "FAILED")],
)
def test_wait_ends_when_the_slice_has_ended(cloud, capsys, state, said):
    cloud.play(["WAITING_FOR_RESOURCES", state], there=True)
    assert cloud.run("wait") == 1
    assert (
        f"my-run is not active ({said}); delete it if it has ended, and create it"
        in capsys.readouterr().err
    )


def test_waiting_pauses_grow_up_to_two_minutes(cloud):
    cloud.play([*["WAITING_FOR_RESOURCES"] * 7, "active"], there=True)
    assert cloud.run("wait") == 0
    assert cloud.slept == [10, 20, 40, 80, 120, 120, 120]


def test_an_existing_slice_is_used_unless_its_type_differs(cloud, capsys):
    cloud.play(["active"], there=True, create=["ALREADY_EXISTS: my-run"] * 2)
    assert cloud.run("create", "--type", "v6e-8") == 0
    assert "my-run exists already: ACTIVE" in capsys.readouterr().out
    assert cloud.run("create", "--type", "v6e-4") == 2
    assert "exists as v6e-8, not v6e-4" in capsys.readouterr().err


def test_run_needs_an_active_slice(cloud, capsys):
    cloud.play(["PROVISIONING"], there=True)
    assert cloud.run("run", "--type", "v6e-8", "--no-plan", *JOB) == 1
    assert (
        "my-run is not ready (PROVISIONING); call tpu.py create, wait and setup first"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(("answer", "gone"), [("y\n", True), ("\n", False)])
def test_stop_offers_deletion(cloud, answer, gone):
    cloud.play(["active"], there=True)
    cloud.answers = [answer]
    assert cloud.run("stop", person=True) == 0
    assert cloud.asked and cloud.story == ["stop"] + ["delete"] * gone


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["create", "my-run"], "the following arguments are required: --zone"),
        (["creat", "my-run", "--zone", "us-east5-b"], "invalid choice: 'creat'"),
        (["create", "My_Run", "--zone", "us-east5-b"], "name 'My_Run': use 1 to 63 of a-z"),
        (["create", "my-run", "--zone", "us-east5"], "--zone 'us-east5' is not a zone"),
        (["create", "my-run", "--zone", "us-east5-b"], "--type '' is unknown"),
        (["create", "my-run", "--zone", "us-east5-b", "--type", "v5e-16"], "perhaps v5litepod-16"),
        (["create", "my-run", "--zone", "us-east5-b", "--type", "v6e-12"], "perhaps v6e-1"),
        (["logs", "my-run", "--zone", "us-east5-b", "--run", "a; rm -rf ~"], "--run 'a; rm -rf ~'"),
        (["logs", "my-run", "--zone", "us-east5-b", "--worker", "x"], "--worker x"),
        (
            ["babysit", "my-run", "--zone", "us-east5-b", "--max-hours", "nan"],
            "--max-hours nan must be above 0",
        ),
        (["babysit", "my-run", "--zone", "us-east5-b", "--max-hours", "inf"], "and all finite"),
        (
            ["babysit", "my-run", "--zone", "us-east5-b", "--max-hours", "0"],
            "--max-hours 0 must be above 0",
        ),
        (
            ["stop", "my-run", "--zone", "us-east5-b", "--", "experiments/sentiment.py"],
            "stop takes no job",
        ),
        (
            ["create", "my-run", "--zone", "us-east5-b", "--gcloud-option=--metadata=HF_TOKEN=x"],
            "--metadata=HF_TOKEN: all users",
        ),
    ],
)
def test_wrong_input_is_one_line_and_2(cloud, capsys, args, complaint):
    import tpu

    assert tpu.main(args) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and complaint in said
    assert cloud.calls == []


def test_without_gcloud(cloud_on_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert cloud_on_path.run("status") == 2
    assert capsys.readouterr().err.startswith("error: gcloud is missing; install it: https://")


def test_an_answer_that_is_not_json(cloud, capsys, monkeypatch):
    import fake_gcloud

    monkeypatch.setattr(fake_gcloud, "play", lambda folder, words: (0, "<html>", ""))
    assert cloud.run("status") == 1
    assert "gcloud's answer is not JSON: '<html>'" in capsys.readouterr().err


def test_help(capsys):
    import tpu

    with pytest.raises(SystemExit) as stop:
        tpu.main(["--help"])
    assert stop.value.code == 0 and "--max-hours" in capsys.readouterr().out


def test_an_interrupted_log_is_an_error_that_says_how_to_delete(cloud, capsys):
    cloud.play(["deaf"], there=True)
    assert cloud.run("logs", "--follow") == 1
    assert len(cloud.calls) == 1 and cloud.slept == []
    assert "delete it with: python3 tpu/tpu.py delete my-run" in capsys.readouterr().err


def test_several_hosts_cannot_be_followed(cloud, capsys):
    cloud.play(["active"], there=True)
    assert cloud.run("logs", "--follow", "--worker", "all") == 2
    assert "--follow shows one host" in capsys.readouterr().err and cloud.story == []
