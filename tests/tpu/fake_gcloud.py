"""A fake gcloud that plays the states of a slice from a script, and records its calls.

conftest.py puts it in PATH. world.json has "lives": [[step, ...], ...] (the steps of each slice
that is created), "life" (the present slice, or -1) and "step", "started" (whether a run was),
"ended" (how it ended), "hosts" (their number), "born" (when), and "errors": {verb: [the next error
outputs]}. Each look at the queued resource goes to the next step; the last step stays. While the
slice is PROVISIONING, SUSPENDING or DELETING a deletion is refused, and also goes to the next step.
A step is a state of the queued resource, or:

    half             ACTIVE, but there is no machine
    preempted        ACTIVE, and the machine is PREEMPTED
    repairing        ACTIVE, and the machine is REPAIRING
    leaving          ACTIVE, and the machine is DELETING
    active           the machine is READY, and a started run is running
    exit 0,75        READY, and the run ended with these codes (one for all hosts, or one each: a
                     code, running, lost)
    deaf             READY, and the hosts do not answer
    deleted          somebody else deleted it

Several hosts answer in the wrong order, and their errors are mixed with gcloud's own lines, as in
ssh.py of tpu_vm.
"""

import json
import os
import sys
from pathlib import Path

# As gcloud 528 prints them.
ADVICE = """Please run:

  $ gcloud auth login

to obtain new credentials.

If you have already logged in with a different account, run:

  $ gcloud config set account ACCOUNT

to select an already authenticated account to use.
"""
MISSING = """ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource \
'projects/p/locations/us-east5-b/\
queuedResources/my-run' was not found. This command is authenticated as a@b.org which is the \
active account specified by the \
[core/account] property
- '@type': type.googleapis.com/google.rpc.ResourceInfo
  resourceName: projects/p/locations/us-east5-b/queuedResources/my-run
"""


def step_of(world: dict, *, on: bool = False) -> str:
    """Return the present step, or with `on` the next one."""
    if world["life"] < 0:
        return "deleted"
    life = world["lives"][world["life"]]
    world["step"] = min(world["step"] + on, len(life) - 1)
    return life[max(world["step"], 0)]


def of_many(world: dict, kind: str, complaint: str) -> str:
    """Return what gcloud prints when a command fails on the last host."""
    lines = [
        f"Using {kind.lower()} batch size of 1. Attempting to {kind} into 1 "
        f"nodes with a total of {world['hosts']} workers."
    ]
    lines += [f"{kind}: Attempting to connect to worker {i}..." for i in range(world["hosts"])]
    lines += [
        complaint,
        f"##### Command execution on worker {world['hosts'] - 1} failed with "
        "exit status 1. Continuing.",
    ]
    return "\n".join(lines) + "\n"


def jobs(world: dict, step: str) -> list[str]:
    """Return each host's state of the run."""
    if not world["started"]:
        return ["none"] * world["hosts"]
    texts = step.removeprefix("exit ").split(",") if step.startswith("exit") else ["running"]
    texts = texts * world["hosts"] if len(texts) == 1 else texts
    found = [f"exit {text}" if text.isdigit() else text for text in texts]
    world["ended"] = world["ended"] or ([] if "running" in found else found)
    return world["ended"] or found  # what has ended stays so until it is started again


def describe(world: dict, group: str) -> tuple[int, str, str]:
    step = step_of(world, on=group == "queued-resources")
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
    state = {"preempted": "PREEMPTED", "repairing": "REPAIRING", "leaving": "DELETING"}.get(
        step, "READY"
    )
    return 0, json.dumps({"state": state, "createTime": world["born"]}), ""


def ssh(world: dict, words: list[str]) -> tuple[int, str, str]:
    command = next(word for word in words if word.startswith("--command="))
    step = step_of(world)
    if step in ("deaf", "deleted", "half", "preempted", "repairing", "leaving") or step.isupper():
        return 1, "", "ssh: the host does not answer"
    if "job.sh start" in command:
        world |= {"started": True, "ended": []}
    hosts = [f"t1v-n-0123abcd-w-{i}" for i in range(world["hosts"])]
    if "--worker=0" in words:
        hosts = hosts[:1]
    if "job.sh status" in command:
        lines = [f"jaxppo-host {host} {text}\n" for host, text in zip(hosts, jobs(world, step))]
        return 0, "".join(reversed(lines)), ""
    if "job.sh log" in command:
        return (
            0,
            "".join(
                f"{host}: the last words\n" if " named" in command else "the last words\n"
                for host in hosts
            ),
            "",
        )
    return 0, "", ""


def delete(world: dict) -> tuple[int, str, str]:
    step = step_of(world)
    if step in ("PROVISIONING", "SUSPENDING", "DELETING"):
        world["step"] = max(world["step"], 0) + 1
        refusal = f"FAILED_PRECONDITION: DeleteQueuedResource is not supported when state is {step}"
        return (
            1,
            "",
            f"ERROR: (gcloud.compute.tpus.queued-resources.delete) {refusal} "
            "(must be one of [ACCEPTED SUSPENDED])",
        )
    world |= {"life": -1, "started": False}
    return (1, "", MISSING) if step == "deleted" else (0, "", "")


def answer(world: dict, words: list[str]) -> tuple[int, str, str]:
    """Return exit code, output and error output."""
    group, verb = (words[2], words[3]) if words[0] == "compute" else ("storage", "storage")
    if verb == "ssh":  # by what the host is to do
        command = next(word for word in words if word.startswith("--command="))
        name = next(
            (name for name in ("start", "stop", "status", "log") if f"job.sh {name}" in command),
            "setup",
        )
    else:
        name = verb
    if world["errors"].get(name):
        complaint = world["errors"][name].pop(0)
        if complaint and verb in ("ssh", "scp") and world["hosts"] > 1:
            complaint = of_many(world, verb.upper(), complaint)
        if "has not finished" in complaint:  # and goes on
            world["errors"][name].insert(0, "")
            answer(world, words)
        if complaint:
            return 1, "", complaint
    if verb == "create":
        made = world.get("made", 0)
        kind = next(word for word in words if word.startswith("--accelerator-type="))
        world |= {
            "made": made + 1,
            "life": made,
            "step": -1,
            "started": False,
            "type": kind.split("=")[1],
        }
    elif verb == "delete":
        return delete(world)
    elif verb == "describe":
        return describe(world, group)
    elif verb == "ssh":
        return ssh(world, words)
    return 0, "", ""


def play(folder: Path, words: list[str]) -> tuple[int, str, str]:
    """Record a call and answer it."""
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
