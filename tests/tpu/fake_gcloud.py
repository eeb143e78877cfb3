"""A gcloud that plays the states of a slice as a script says, and writes down what it was asked. conftest.py puts it on PATH.

world.json: {"lives": [[step, ...], ...], "life": of the slice that is there or -1, "step": in it, "started": whether a run was,
"ended": how it ended, "hosts": how many, "born": when, "errors": {verb: [what it complains of the next times]}}. Each look at the
queued resource is a step on; the last one stays. A step is a state of the queued resource, or:

    half             ACTIVE, but there is no machine
    preempted        ACTIVE, and the machine is PREEMPTED
    repairing        ACTIVE, and the machine is REPAIRING
    active           the machine is READY, a run that was started is running
    exit 0,75        READY, and the run ended so on its hosts (one for all, or each its own: a code, running, lost)
    deaf             READY, and the hosts do not answer
    deleted          somebody else deleted it
"""

import json
import os
import sys
from pathlib import Path

MISSING = "ERROR: (gcloud) NOT_FOUND: the resource was not found"


def jobs(world: dict, step: str) -> list[str]:
    """What each host says about the run."""
    if not world["started"]:
        return ["none"] * world["hosts"]
    texts = step.removeprefix("exit ").split(",") if step.startswith("exit") else ["running"]
    texts = texts * world["hosts"] if len(texts) == 1 else texts
    found = [f"exit {text}" if text.isdigit() else text for text in texts]
    world["ended"] = world["ended"] or ([] if "running" in found else found)
    return world["ended"] or found  # what has ended stays so until it is started again


def describe(world: dict, group: str) -> tuple[int, str, str]:
    if group == "queued-resources" and world["life"] >= 0:
        world["step"] = min(world["step"] + 1, len(world["lives"][world["life"]]) - 1)
    step = world["lives"][world["life"]][world["step"]] if world["life"] >= 0 else "deleted"
    if step == "deleted":
        world["life"] = -1
        return 1, "", MISSING
    if group == "queued-resources":
        state: dict = {"state": step if step.isupper() else "ACTIVE"}
        if step == "FAILED":
            state["failedData"] = {"error": {"message": "no capacity"}}
        node = {"node": {"acceleratorType": world["type"]}}
        return 0, json.dumps({"state": state, "tpu": {"nodeSpec": [node]}}), ""
    if step == "half":
        return 1, "", MISSING
    state = step.upper() if step in ("preempted", "repairing") else "READY"
    return 0, json.dumps({"state": state, "createTime": world["born"]}), ""


def ssh(world: dict, words: list[str]) -> tuple[int, str, str]:
    command = next(word for word in words if word.startswith("--command="))
    step = world["lives"][world["life"]][world["step"]] if world["life"] >= 0 else "deleted"
    if step in ("deaf", "deleted", "half", "preempted", "repairing") or step.isupper():
        return 1, "", "ssh: the host does not answer"
    if "job.sh start" in command:
        world |= {"started": True, "ended": []}
    if "job.sh status" in command:
        return 0, "".join(f"jaxppo-host host-{i} {text}\n" for i, text in enumerate(jobs(world, step))), ""
    return 0, "the last words of the run\n" if "job.sh log" in command else "", ""


def answer(world: dict, words: list[str]) -> tuple[int, str, str]:
    """(exit code, what it prints, what it complains of)"""
    group, verb = (words[2], words[3]) if words[0] == "compute" else ("storage", "storage")
    if verb == "ssh":  # by what the host is to do
        command = next(word for word in words if word.startswith("--command="))
        name = next((name for name in ("start", "stop", "status", "log") if f"job.sh {name}" in command), "setup")
    else:
        name = verb
    if world["errors"].get(name):
        complaint = world["errors"][name].pop(0)
        if complaint:
            return 1, "", complaint
    if verb == "create":
        made = world.get("made", 0)
        kind = next(word for word in words if word.startswith("--accelerator-type="))
        world |= {"made": made + 1, "life": made, "step": -1, "started": False, "type": kind.split("=")[1]}
    elif verb == "delete":
        if world["life"] < 0:
            return 1, "", MISSING
        world |= {"life": -1, "started": False}
    elif verb == "describe":
        return describe(world, group)
    elif verb == "ssh":
        return ssh(world, words)
    return 0, "", ""


def play(folder: Path, words: list[str]) -> tuple[int, str, str]:
    """One call, written down and answered."""
    with (folder / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(["gcloud", *words]) + "\n")
    world = json.loads((folder / "world.json").read_text())
    found = answer(world, words)
    (folder / "world.json").write_text(json.dumps(world))
    return found


def main() -> int:
    code, said, complaint = play(Path(os.environ["FAKE_GCLOUD"]), sys.argv[1:])
    print(said, end="")
    print(complaint, end="", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
