"""`tpu.py babysit` with a fake gcloud: its calls and their order, and that no slice is left."""

import re

import babysitting
import basics
import pytest
from fake_gcloud import ADVICE

POD = [
    "--type",
    "v6e-16",
    "--spot",
    "--no-plan",
    "--",
    "experiments/sentiment.py",
    "--runs",
    "gs://my-bucket/runs",
]
ONE = [
    "--type",
    "v6e-8",
    "--no-plan",
    "--",
    "experiments/sentiment.py",
    "--runs",
    "gs://my-bucket/runs",
]
MADE = [
    "create",
    "scp",
    "setup",
    "stop",
    "start",
]  # a slice made, set up, and the run started on it


def test_three_preemptions_to_a_finished_run_and_no_slice(cloud, capsys):
    cloud.play(
        ["WAITING_FOR_RESOURCES", "PROVISIONING", "active", "active", "SUSPENDING", "SUSPENDED"],
        ["WAITING_FOR_RESOURCES", "active", "active", "active", "preempted"],
        ["active", "SUSPENDED"],
        ["active", "active", "exit 0"],
        hosts=4,
    )
    assert cloud.run("babysit", *POD) == 0
    assert cloud.story == [*MADE, "delete", *MADE, "delete", *MADE, "delete", *MADE, "delete"]
    # The run has one name, so that job.sh finds what is there and adds --resume.
    command = (
        "experiments/sentiment.py --runs gs://my-bucket/runs --name my-run --expect-devices 16"
    )
    command += " --distributed on --connect-timeout 1800"
    assert cloud.started == [f"python {command}"] * 4
    said = capsys.readouterr().out
    assert said.count("is gone (preempted?)") == 3 and "my-run is deleted" in said


def test_a_slice_preempted_during_setup_is_created_again(cloud):
    cloud.play(
        ["active", "SUSPENDED"],
        ["active", "exit 0"],
        setup=["Connection closed by remote host", *["[255]"] * 5],
    )
    assert cloud.run("babysit", *ONE) == 0
    assert cloud.story == ["create", "scp", *["setup"] * 6, "delete", *MADE, "delete"]


def test_paid_hours_stop_the_run_and_delete_the_slice(cloud, capsys):
    cloud.play(["WAITING_FOR_RESOURCES", "active"])
    begun = cloud.now
    assert cloud.run("babysit", "--max-hours", "0.1", *ONE) == 75
    assert cloud.story == [*MADE, "stop", "delete"]
    assert cloud.now - begun == pytest.approx(
        10 + 360
    )  # ten seconds in the queue cost nothing; then 0.1 h
    assert "0.1 paid hours are over" in capsys.readouterr().out


def test_the_paid_hours_count_all_machines_and_override_keep(cloud):
    cloud.play(["active", "active", "active", "SUSPENDED"], ["active"])
    begun = cloud.now
    assert cloud.run("babysit", "--max-hours", "0.1", "--keep", *ONE) == 75
    assert cloud.story == [*MADE, "delete", *MADE, "stop", "delete"]
    assert cloud.now - begun == pytest.approx(360)


def test_the_paid_hours_count_what_a_slice_has_cost_before(cloud, capsys):
    """The clock shows 13:46:40, a million seconds after 1970; the machine is two hours old."""
    cloud.play(["active"], there=True, born="1970-01-12T11:46:40.123456789Z")
    assert cloud.run("status") == 0
    assert "my-run: ACTIVE, 2.0 paid hours" in capsys.readouterr().out
    assert cloud.run("babysit", "--max-hours", "2", *ONE) == 75
    assert cloud.story[-2:] == ["stop", "delete"] and cloud.slept == []


def test_75_starts_again_at_once_on_the_same_slice(cloud):
    cloud.play(["active", "active", "exit 75", "active", "exit 0"], hosts=4)
    assert cloud.run("babysit", *POD) == 0
    assert cloud.story == [*MADE, "stop", "start", "delete"]
    # One look at the slice while the run goes on, a minute; then the pause before the restart,
    # none; and no minute after.
    assert cloud.slept == [60, 0]


@pytest.mark.parametrize(("code", "reason"), [(76, "diverged"), (2, "bad input or configuration")])
def test_76_and_2_are_not_started_again(cloud, capsys, code, reason):
    cloud.play(["active", "active", f"exit {code}"])
    assert cloud.run("babysit", *ONE) == code
    assert cloud.story == [*MADE, "log", "delete"]
    assert (
        capsys.readouterr().err
        == f"error: my-run: {reason} (exit code {code}); its last lines are in my-run.log\n"
    )
    with open("my-run.log") as log:
        assert log.read() == "t1v-n-0123abcd-w-0: the last words\n"


def test_crashes_are_started_again_a_few_times_with_growing_pauses(cloud):
    crash = ["active", "exit 1"]
    cloud.play([*crash, *crash, *crash])
    assert cloud.run("babysit", "--max-crashes", "2", *ONE) == 1
    assert cloud.story == [*MADE, "stop", "start", "stop", "start", "log", "delete"]
    assert [seconds for seconds in cloud.slept if seconds != 60] == [10, 20]


def test_crashes_are_forgotten_after_an_hour(cloud, monkeypatch):
    monkeypatch.setattr(babysitting, "LOOK", 2000.0)
    long = ["active", "active", "active", "exit 1"]  # two looks, 4000 s
    cloud.play([*long, *long, *long, "active", "exit 0"])
    assert cloud.run("babysit", "--max-crashes", "1", *ONE) == 0
    assert cloud.story.count("start") == 4


def test_a_host_that_fails_alone_counts_as_a_crash(cloud):
    """The other hosts are stopped after five minutes; their 75 does not hide the crash."""
    alone = ["active", *["exit 134,running,running,running"] * 6, "exit 134,75,75,75"]
    cloud.play(alone, hosts=4)
    assert cloud.run("babysit", "--max-crashes", "0", *POD) == 1
    assert cloud.story == [*MADE, "stop", "log", "delete"]


def test_hosts_that_do_not_answer_for_half_an_hour_count_as_a_crash(cloud, monkeypatch, capsys):
    monkeypatch.setattr(babysitting, "LOOK", 700.0)
    cloud.play(["active", "active", "deaf", "deaf", "deaf", "active", "exit 0"])
    assert cloud.run("babysit", *ONE) == 0
    assert "do not answer" not in capsys.readouterr().out
    assert cloud.story == [*MADE, "stop", "start", "delete"]


def test_a_slice_without_a_machine_is_created_again(cloud, capsys):
    cloud.play(["half"], ["active", "exit 0"])
    assert cloud.run("babysit", *ONE) == 0
    assert cloud.story == ["create", "delete", *MADE, "delete"]
    assert "FAILED (it has no machine)" in capsys.readouterr().out
    assert 800 < sum(cloud.slept) < 1000


def test_a_slice_that_fails_three_times_is_given_up(cloud, capsys):
    cloud.play(["FAILED"], ["WAITING_FOR_RESOURCES", "FAILED"], ["FAILED"], ["active"])
    assert cloud.run("babysit", *ONE) == 1
    assert cloud.story == ["create", "delete"] * 3
    assert cloud.slept == [60, 10, 300]  # after the first, in the queue, after the second
    said = capsys.readouterr().err
    assert (
        "did not become active 3 times in a row (no capacity)" in said
        and "python3 tpu/tpu.py delete my-run" in said
    )


def test_a_quota_that_frees_up_is_waited_for_with_growing_pauses(cloud):
    full = "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPreemptiblePerProject' exceeded"
    cloud.play(["active", "exit 0"], create=[full, full, full])
    assert cloud.run("babysit", *ONE) == 0
    assert cloud.slept[:3] == [10, 20, 40]
    assert cloud.story[:5] == ["create"] * 4 + ["scp"]


def test_a_quota_that_stays_is_an_error(cloud, capsys):
    full = "ERROR: RESOURCE_EXHAUSTED: Quota limit exceeded"
    cloud.play(["active"], create=[full] * 20)
    assert cloud.run("babysit", *ONE) == 2
    assert cloud.story == ["create"] * 6  # capped, in number and in pauses
    assert cloud.slept == [10, 20, 40, 80, 120]
    assert "ask for more quota, or use another type or zone" in capsys.readouterr().err


def test_a_quota_is_waited_for_once_the_run_had_a_slice(cloud, capsys):
    """After a preemption it waits for hours until chips are free."""
    full = "ERROR: RESOURCE_EXHAUSTED: Quota limit exceeded"
    cloud.play(["active", "active", "SUSPENDED"], ["active", "exit 0"], create=["", *[full] * 20])
    assert cloud.run("babysit", *ONE) == 0
    assert cloud.story == [*MADE, "delete", *["create"] * 20, *MADE, "delete"]
    assert capsys.readouterr().err.count("asking again in 120 s") == 3  # 20 = 3 * 6 attempts + 2


def test_an_outage_during_the_request_is_not_a_failure(cloud, capsys):
    cloud.play(["FAILED"], ["active", "exit 0"], create=["503 UNAVAILABLE"] * 20)
    assert cloud.run("babysit", *ONE) == 0
    assert cloud.story == [*["create"] * 21, "delete", *MADE, "delete"]
    request = [
        10,
        20,
        40,
        80,
        120,
        120,
    ]  # within one command of gcloud, and then between two of ours
    assert cloud.slept == [*request * 3, 10, 20, 60]  # the last one is after the slice that FAILED
    assert (
        "cannot create my-run (v6e-8): 503 UNAVAILABLE; asking again in 120 s"
        in capsys.readouterr().err
    )


def test_babysit_continues_after_an_outage(cloud):
    cloud.play(
        ["active", "active", "active", "exit 0"],
        describe=["", "", "", "", *["503 UNAVAILABLE"] * 8],
    )
    assert cloud.run("babysit", *ONE) == 0
    assert cloud.story == [*MADE, "delete"]


LOGGED_OUT = f"""ERROR: (gcloud.compute.tpus.queued-resources.describe) There was a problem \
refreshing your current auth tokens: \
Reauthentication failed. cannot prompt during non-interactive execution.
{ADVICE}"""
READS = "RESOURCE_EXHAUSTED: Quota 'read requests' exceeded"
BLIND = [
    "PERMISSION_DENIED: no",
    LOGGED_OUT,
    "UNAUTHENTICATED: no",
    "You do not currently have an active account selected.",
]


@pytest.mark.parametrize("complaint", [*BLIND, READS, "what nobody has thought of"])
def test_babysit_continues_when_it_cannot_describe_an_active_slice(cloud, capsys, complaint):
    cloud.play(
        ["active", "active", "active", "exit 0"], describe=["", "", "", "", *[complaint] * 8]
    )
    assert cloud.run("babysit", *ONE) == 0
    assert cloud.story == [*MADE, "delete"]
    said = capsys.readouterr().err
    # 8 looks; or, of what gcloud itself is asked again for, 6 attempts at one look and 2 at the
    # next
    assert said.count("; trying again\n") == (1 if complaint == READS else 8)
    lost = complaint in BLIND[1:]
    assert ("; log in again in another terminal: gcloud auth login; trying again" in said) == lost
    assert (
        complaint != LOGGED_OUT
        or "Reauthentication failed. cannot prompt during non-interactive execution.; log in"
        in said
    )


def test_the_paid_hours_count_while_the_slice_cannot_be_described(cloud, capsys):
    cloud.play(["active"], describe=["", "", "", *["PERMISSION_DENIED: no"] * 99])
    begun = cloud.now
    assert cloud.run("babysit", "--max-hours", "0.1", *ONE) == 75
    assert cloud.story == [*MADE, "stop", "delete"] and cloud.now - begun == pytest.approx(360)


@pytest.mark.parametrize("complaint", BLIND)
def test_without_permission_to_describe_nothing_starts(cloud, capsys, complaint):
    cloud.play(["active"], describe=[complaint])
    assert cloud.run("babysit", *ONE) == 2
    assert cloud.story == [] and cloud.slept == []
    assert (
        "if my-run still exists it costs: delete it with: python3 tpu/tpu.py delete my-run"
        in capsys.readouterr().err
    )


def test_a_quota_of_read_requests_is_waited_for(cloud):
    cloud.play(["active", "exit 0"], describe=[READS] * 8)
    assert cloud.run("babysit", *ONE) == 0


def test_gcloud_is_missing_for_a_moment(cloud, monkeypatch, capsys):
    import slices

    cloud.play(["active", "active", "active", "exit 0"])
    real, missing = slices.subprocess.run, [True, True]

    def run(argv, **options):
        if cloud.started and missing:
            missing.pop()
            raise FileNotFoundError
        return real(argv, **options)

    monkeypatch.setattr(slices.subprocess, "run", run)
    assert cloud.run("babysit", *ONE) == 0
    assert (
        cloud.story == [*MADE, "delete"] and capsys.readouterr().err.count("gcloud is missing") == 2
    )


def test_a_run_in_progress_is_watched(cloud):
    """As after a restart of babysit."""
    cloud.play(["active", "active", "active", "exit 0"], there=True)
    world = (cloud.folder / "world.json").read_text().replace('"started": false', '"started": true')
    (cloud.folder / "world.json").write_text(world)
    assert cloud.run("babysit", *ONE) == 0
    assert cloud.story == ["delete"]


def test_a_slice_of_another_type_is_refused(cloud, capsys):
    cloud.play(["active"], there=True, type="v6e-4")
    assert cloud.run("babysit", *ONE) == 2
    assert "exists as v6e-4, not v6e-8" in capsys.readouterr().err and cloud.story == []


def test_a_run_on_the_slice_is_copied_before_deletion(cloud):
    cloud.play(["active", "exit 0"])
    assert (
        cloud.run("babysit", "--type", "v6e-8", "--no-plan", "--", "experiments/sentiment.py") == 0
    )
    assert cloud.story == [*MADE, "scp", "delete"]
    copy = [call for call in cloud.calls if call[4] == "scp"][-1]
    assert copy[5:] == [
        "--worker=0",
        "--recurse",
        "my-run:jaxppo/runs/my-run",
        "runs/",
        "--zone=us-east5-b",
        "--quiet",
    ]


def test_a_slice_is_kept_when_its_run_cannot_be_copied(cloud, capsys):
    cloud.play(["active", "exit 0"], scp=["", "Permission denied"])
    assert (
        cloud.run("babysit", "--type", "v6e-8", "--no-plan", "--", "experiments/sentiment.py") == 0
    )
    assert "delete" not in cloud.story
    assert re.search(
        "is kept and costs; delete it with: .* --zone us-east5-b", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("answer", "kept"), [("n\n", True), ("\n", False), ("", False)]
)  # the last one: nobody was there
def test_babysit_asks_before_deletion_after_a_failure(cloud, answer, kept):
    cloud.play(["active", "exit 76"])
    cloud.answers = [answer]
    assert cloud.run("babysit", *ONE, person=True) == 76
    assert cloud.asked == ["delete my-run, which costs as long as it exists? [Y/n] "]
    assert ("delete" not in cloud.story) == kept


def test_keep(cloud, capsys):
    cloud.play(["active", "exit 0"])
    assert cloud.run("babysit", "--keep", *ONE) == 0
    assert (
        "delete" not in cloud.story
        and "is kept and costs; delete it with" in capsys.readouterr().out
    )


def test_ctrl_c_leaves_the_run_and_says_how_to_delete(cloud, capsys):
    cloud.play(["active"])

    def interrupted(seconds):
        raise KeyboardInterrupt

    cloud.sleep = interrupted
    assert cloud.run("babysit", *ONE) == 130
    assert cloud.story == MADE
    assert (
        "continues, and costs; delete it with: python3 tpu/tpu.py delete my-run"
        in capsys.readouterr().err
    )


def test_secrets_are_copied_as_a_file_and_in_no_command(cloud, tmp_path):
    file = tmp_path / "secrets.env"
    file.write_text("HF_TOKEN=hf_abcdefghijklmnopqrstuvwx\n")
    file.chmod(0o600)
    cloud.play(["active", "SUSPENDED"], ["active", "exit 0"])
    assert cloud.run("babysit", "--env-file", str(file), *ONE) == 0
    assert cloud.story.count("scp") == 4  # the code and the file, on each of two slices
    copies = [call[5:] for call in cloud.calls if str(file) in call]
    assert (
        copies
        == [
            [
                "--worker=all",
                "--scp-flag=-p",
                str(file),
                "my-run:.jaxppo.env",
                "--zone=us-east5-b",
                "--quiet",
            ]
        ]
        * 2
    )
    assert "hf_" not in str(cloud.calls)


def test_a_spot_slice_without_a_bucket_gives_a_warning(cloud, capsys):
    cloud.play(["active", "exit 0"])
    assert (
        cloud.run(
            "babysit", "--spot", "--type", "v6e-8", "--no-plan", "--", "experiments/sentiment.py"
        )
        == 0
    )
    assert "a preemption loses the run" in capsys.readouterr().out


def test_a_repaired_machine_is_set_up_again(cloud):
    """It is not deleted, but it may be another machine, without large pages."""
    cloud.play(["active", "active", "repairing", "repairing", "exit lost", "active", "exit 0"])
    assert cloud.run("babysit", *ONE) == 0
    assert cloud.story == [*MADE, *MADE[1:], "delete"]


def test_a_full_local_disk_does_not_keep_the_slice(cloud, capsys, monkeypatch):
    real = babysitting.Path.write_text

    def full(path, text, **options):
        if path.suffix == ".log":
            raise OSError(28, "No space left on device")
        return real(path, text, **options)

    cloud.play(["active", "active", "exit 2"])
    monkeypatch.setattr(babysitting.Path, "write_text", full)
    assert cloud.run("babysit", *ONE) == 2
    assert cloud.story == [*MADE, "log", "delete"]
    assert (
        "its last lines could not be written to my-run.log (No space left on device)"
        in capsys.readouterr().err
    )


def test_a_bug_says_how_to_delete(cloud, capsys, monkeypatch):
    cloud.play(["active"])
    monkeypatch.setattr(babysitting, "prepare_hosts", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cloud.run("babysit", *ONE)
    assert (
        "if my-run still exists it costs: delete it with: python3 tpu/tpu.py delete my-run"
        in capsys.readouterr().err
    )


def test_one_babysit_per_slice_and_machine(cloud, capsys):
    cloud.play(["active", "exit 0"], ["active", "exit 0"])
    with basics.lock_slice("my-run"):
        assert cloud.run("babysit", *ONE) == 2
        assert (
            "error: another babysit of my-run is running on this machine; stop it first"
            in capsys.readouterr().err
        )
        assert cloud.calls == []
        assert cloud.run("babysit", "--dry-run", *ONE) == 0  # it does nothing
        with basics.lock_slice("other"):
            pass
    assert cloud.run("babysit", *ONE) == 0


def test_the_log_of_a_pod_names_hosts(cloud):
    cloud.play(["active", "active", "exit 0,2,75,75"], hosts=4)
    assert cloud.run("babysit", *POD) == 2
    with open("my-run.log") as log:
        assert log.read() == "".join(f"t1v-n-0123abcd-w-{i}: the last words\n" for i in range(4))
