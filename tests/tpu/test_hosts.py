"""Answers of several hosts: their order, and the full error of one of them."""

import pytest


def test_hosts_are_numbered_by_name_not_by_order_of_answers(cloud, capsys):
    """The fake gcloud prints the last host first."""
    cloud.play(["exit 0,75,1,0"], there=True, hosts=4, type="v6e-16")
    world = (cloud.folder / "world.json").read_text().replace('"started": false', '"started": true')
    (cloud.folder / "world.json").write_text(world)
    assert cloud.run("status") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1:5] == [
        "  host 0: exit 0",
        "  host 1: exit 75",
        "  host 2: exit 1",
        "  host 3: exit 0",
    ]


def test_hosts_are_sorted_by_number(monkeypatch):
    import subprocess

    import hosts
    from slices import Slice

    def run_states(*names: str) -> list[str] | None:
        lines = "".join(f"jaxppo-host {name} exit {i}\n" for i, name in enumerate(names))
        monkeypatch.setattr(
            Slice, "ssh", lambda *_, **__: subprocess.CompletedProcess([], 0, lines, "")
        )
        return hosts.run_states(Slice("my-run", "us-east5-b"), "my-run")

    assert run_states("a-w-10", "a-w-9", "a-w-2.internal") == ["exit 2", "exit 1", "exit 0"]
    assert run_states("b", "a", "c") == ["exit 0", "exit 1", "exit 2"]


OFFER = (
    "; if my-run still exists it costs: delete it with: python3 tpu/tpu.py delete "
    "my-run --zone us-east5-b"
)


@pytest.mark.parametrize(
    ("name", "what"), [("setup", "set the hosts up"), ("scp", "copy the code")]
)
def test_an_error_on_one_host_is_printed_in_full(cloud, capsys, name, what):
    """The whole output is printed first; the last line names the reason."""
    errors = {name: ["warning: slow\nE: no space left"]}
    cloud.play(["active"], there=True, hosts=4, type="v6e-16", **errors)
    assert cloud.run("setup") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"error: cannot {what}: E: no space left{OFFER}"
    assert lines[0].startswith("Using ") and lines[-4:-1] == [
        "warning: slow",
        "E: no space left",
        "##### Command execution on worker 3 failed with exit status 1. Continuing.",
    ]


def test_an_error_of_one_line_is_printed_once(cloud, capsys):
    cloud.play(["active"], there=True, hosts=4, type="v6e-16", setup=["E: no space left"])
    assert cloud.run("setup") == 1
    assert capsys.readouterr().err == f"error: cannot set the hosts up: E: no space left{OFFER}\n"
