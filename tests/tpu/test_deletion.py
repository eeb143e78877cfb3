"""Slices are deleted despite errors, and those that somebody else deleted are not created again."""

import pytest

ONE = [
    "--type",
    "v6e-8",
    "--no-plan",
    "--",
    "experiments/sentiment.py",
    "--runs",
    "gs://my-bucket/runs",
]
OWN_DISK = ONE[:-2]
MADE = ["create", "scp", "setup", "stop", "start"]
LIST = (
    "nothing was deleted; to list slices: "
    "gcloud compute tpus queued-resources list --zone us-east5-b"
)


@pytest.mark.parametrize(
    "life",
    [
        ["active", "active", "deleted"],
        ["active", "active", "DELETING", "DELETING", "deleted"],
        ["active", "active", "SUSPENDING", "DELETING", "deleted"],
        ["active", "active", "leaving", "DELETING", "deleted"],
        ["active", "active", "half", "deleted"],
        ["WAITING_FOR_RESOURCES", "deleted"],
        ["WAITING_FOR_RESOURCES", "DELETING", "deleted"],
    ],
    ids=" ".join,
)
def test_a_slice_deleted_by_others_is_not_created_again(cloud, capsys, life):
    cloud.play(life, ["active", "exit 0"])
    assert cloud.run("babysit", *ONE) == 75
    assert cloud.story == (MADE if "active" in life else ["create"])
    assert (
        "my-run was deleted by somebody else, and is not created again"
    ) in capsys.readouterr().err


def test_a_deletion_by_others_ends_babysit_at_once(cloud, capsys):
    cloud.play(["active", "active", "DELETING", "DELETING", "deleted"])
    assert cloud.run("babysit", *ONE) == 75
    assert cloud.slept == [60] and "preempted" not in capsys.readouterr().out


def test_babysit_waits_for_an_earlier_deletion(cloud):
    """The slice is being deleted when the command starts."""
    cloud.play(["DELETING", "DELETING", "deleted"], ["active", "exit 0"], there=True)
    assert cloud.run("babysit", *ONE) == 0
    assert cloud.story == [*MADE, "delete"]


def test_a_machine_that_vanishes_before_its_resource_is_created_again(cloud):
    cloud.play(["active", "active", "leaving", "leaving", "SUSPENDED"], ["active", "exit 0"])
    assert cloud.run("babysit", *ONE) == 0
    assert cloud.story == [*MADE, "delete", *MADE, "delete"]


@pytest.mark.parametrize(
    ("there", "errors", "args", "said"),
    [
        (True, [], [], "my-run is deleted"),
        (False, [], [], f"my-run is not in us-east5-b (gcloud's project): {LIST}"),
        (
            False,
            [],
            ["--project", "mine"],
            f"my-run is not in us-east5-b (project mine): {LIST} --project mine",
        ),
        (False, ["503 UNAVAILABLE"], [], f"my-run is not in us-east5-b (gcloud's project): {LIST}"),
    ],
)
def test_delete_says_whether_the_slice_existed(cloud, capsys, there, errors, args, said):
    cloud.play(["active"], there=there, delete=errors)
    assert cloud.run("delete", *args) == 0
    assert capsys.readouterr().out == said + "\n"


def test_a_refused_deletion_is_tried_again(cloud, capsys):
    cloud.play(["PROVISIONING", "PROVISIONING", "PROVISIONING", "active"], there=True)
    assert cloud.run("delete") == 0
    assert cloud.story == ["delete"] * 4 and cloud.slept == [10, 20, 40]
    said = capsys.readouterr()
    assert (
        said.out == "my-run is deleted\n"
        and said.err.count("is not supported when state is PROVISIONING") == 3
    )


def test_a_slice_that_vanishes_after_a_refusal_existed(cloud, capsys):
    cloud.play(["DELETING", "deleted"], there=True)
    assert cloud.run("delete") == 0
    assert capsys.readouterr().out == "my-run is deleted\n"


def test_babysit_retries_a_refused_deletion(cloud):
    cloud.play(
        ["active", "exit 0"],
        delete=[
            "FAILED_PRECONDITION: DeleteQueuedResource is not supported when state is SUSPENDING"
        ],
    )
    assert cloud.run("babysit", *ONE) == 0
    assert cloud.story == [*MADE, "delete", "delete"]


@pytest.mark.parametrize(
    "complaint",
    [
        "503 UNAVAILABLE",
        "Reauthentication failed.",
        "gcloud crashed (SSLError): EOF occurred in violation of protocol",
        "Operation op-1 has not finished in 1800 seconds. The operations may "
        "still be underway remotely",
        "what is this",
    ],
)
@pytest.mark.parametrize(
    ("life", "code"), [(["active", "exit 0"], 0), (["active"], 75)], ids=["done", "cut off"]
)
def test_deletion_goes_on_until_it_is_gone(cloud, capsys, life, code, complaint):
    """After the run, or after the paid hours; it takes more than an hour."""
    cloud.play(life, delete=[complaint] * 40)
    assert cloud.run("babysit", "--max-hours", "0.1", *ONE) == code
    assert cloud.story == [*MADE, *["stop"] * (code == 75), *["delete"] * 41]
    assert cloud.slept[-40:] == [10, 20, 40, 80, *[120] * 36]
    said = capsys.readouterr()
    assert said.err.count("my-run is not deleted yet: ") == 40
    assert ("log in again in another terminal: gcloud auth login" in said.err) == (
        "Reauth" in complaint
    )


@pytest.mark.parametrize(
    "complaint", ["PERMISSION_DENIED: no", "PERMISSION_DENIED: nobody may delete my-500"]
)
def test_a_failed_deletion_is_an_error(cloud, capsys, complaint):
    cloud.play(["active", "exit 0"], delete=[complaint] * 9)
    assert cloud.run("babysit", *ONE) == 1
    assert cloud.story == [*MADE, "delete"]
    said = capsys.readouterr().err
    assert f"could not be deleted and may still cost: {complaint}; delete it with" in said


def test_an_expired_login_ends_delete(cloud):
    """With a terminal."""
    cloud.play(["active"], there=True, delete=["Reauthentication failed."] * 9)
    assert cloud.run("delete") == 1
    assert cloud.story == ["delete"]


def test_an_unknown_error_ends_delete(cloud, capsys):
    cloud.play(["active"], there=True, delete=["what is this"] * 9)
    assert cloud.run("delete") == 1
    assert (
        cloud.story == ["delete"]
        and "could not be deleted and may still cost: what is this" in capsys.readouterr().err
    )


def test_a_slow_request_counts_as_made(cloud):
    """gcloud gives up after half an hour; the slice is created all the same, and used."""
    said = (
        "Operation [op-1] has not finished in 1800 seconds. The operations may "
        "still be underway remotely"
    )
    cloud.play(["WAITING_FOR_RESOURCES", "active", "exit 0"], create=[said])
    assert cloud.run("babysit", *ONE) == 0
    assert cloud.story == [*MADE, "delete"]


def test_paid_hours_that_end_while_a_run_is_copied(cloud, capsys):
    """72 seconds: 2 are left after 10 + 20 + 40. The exit code is that of the finished run."""
    cloud.play(["active", "exit 0"], scp=["", *["Connection reset by peer"] * 4])
    assert cloud.run("babysit", "--max-hours", "0.02", *OWN_DISK) == 0
    assert cloud.story == [*MADE, *["scp"] * 4, "scp", "delete"]
    assert cloud.slept == [10, 20, 40, pytest.approx(2)]
    assert "0.02 paid hours are over (--max-hours): deleting my-run" in capsys.readouterr().out


def test_the_copy_at_the_end_of_the_paid_hours_is_tried_again(cloud):
    cloud.play(["active"], scp=["", "Connection reset by peer"])
    assert cloud.run("babysit", "--max-hours", "0.1", *OWN_DISK) == 75
    assert cloud.story == [*MADE, "stop", "scp", "scp", "delete"]


@pytest.fixture
def hanging(cloud, monkeypatch):
    """gcloud hangs for commands that contain one of these words, once for each time it is listed.

    Records the time-outs.
    """
    import slices

    real, words, given = slices.subprocess.run, [], []

    def run(argv, *, timeout, **options):
        for word in words:
            if word in " ".join(argv):
                words.remove(word)
                given.append(timeout)
                cloud.now += timeout
                raise slices.subprocess.TimeoutExpired(argv, timeout)
        return real(argv, timeout=timeout, **options)

    monkeypatch.setattr(slices.subprocess, "run", run)
    return words, given


def test_a_command_that_hangs_ends_with_the_paid_hours(cloud, hanging, capsys):
    """gcloud hangs at the start of the run: the slice is deleted when the paid hours are over."""
    words, given = hanging
    words.append("job.sh start")
    cloud.play(["active"])
    assert cloud.run("babysit", "--max-hours", "0.1", *ONE) == 75
    assert given == [pytest.approx(360)] and cloud.story == [*MADE[:-1], "stop", "delete"]
    assert "0.1 paid hours are over" in capsys.readouterr().out


def test_after_the_paid_hours_nothing_takes_longer_than_ten_minutes(cloud, hanging):
    """The paid hours end in a command that hangs; stop, copy and the first deletion hang, too."""
    words, given = hanging
    words += ["job.sh stop", "job.sh stop", "--recurse", "resources delete"]
    cloud.play(["active"])
    begun = cloud.now
    assert cloud.run("babysit", "--max-hours", "0.1", *OWN_DISK) == 75
    assert given == [pytest.approx(360), 600, 600, 600]
    assert cloud.now - begun == pytest.approx(360 + 3 * 600 + 10) and cloud.story == [
        *MADE[:3],
        "delete",
    ]


def test_a_command_that_hangs_for_an_hour_is_not_tried_again_within_itself(cloud, hanging):
    words, given = hanging
    words += ["setup_vm.sh"]
    cloud.play(["active", "active", "exit 0"])
    assert cloud.run("babysit", *ONE) == 0
    assert given == [3600] and cloud.story == ["create", "scp", *MADE[1:], "delete"]
