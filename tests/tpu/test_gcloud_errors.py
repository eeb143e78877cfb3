"""Which line of gcloud's errors is shown, and which errors are transient."""

import gcloud_errors
import pytest
from fake_gcloud import ADVICE

MANY = """Using ssh batch size of 1. Attempting to SSH into 1 nodes with a total of 4 workers.
SSH: Attempting to connect to worker 0...
SSH: Attempting to connect to worker 1...
E: Unable to locate package gcsfuse
##### Command execution on worker 1 failed with exit status 100. Continuing.
Failed to execute command on multiple workers. This may have happened if you have not added your \
SSH key to your ssh-agent using \
"ssh-add ~/.ssh/google_compute_engine".
Retrying: SSH command error: [/usr/bin/ssh] exited with return code [255].
SSH: Attempting to connect to worker 0...
Exception in thread Thread-3 (AttemptRunWithRetries):
Traceback (most recent call last):
  File "ssh.py", line 602, in AttemptRunWithRetries
    raise e
googlecloudsdk.command_lib.util.ssh.ssh.CommandError: [/usr/bin/ssh] exited with return code [255].
"""
COPY = """Using scp batch size of 1.Attempting to SCP into 1 nodes with a total of 4 workers.
SCP: Attempting to connect to worker 0...
scp: jaxppo.tar.gz: No space left on device
##### Command execution on worker 0 failed with exit status 1. Continuing.
"""

# What gcloud 528 prints (the first two by its own HttpException, the others as it was run).
QUOTA = """ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit \
'TPUV6E' has been exceeded.
- '@type': type.googleapis.com/google.rpc.ErrorInfo
  domain: googleapis.com
  metadata:
    service: tpu.googleapis.com
  reason: RATE_LIMIT_EXCEEDED
"""
DISABLED = """ERROR: (gcloud.compute.tpus.queued-resources.create) PERMISSION_DENIED: Cloud TPU \
API has not been used in 1.
Google developers console API activation
https://console.developers.google.com/apis/api/tpu.googleapis.com/overview?project=123
- '@type': type.googleapis.com/google.rpc.ErrorInfo
  reason: SERVICE_DISABLED
"""
CRASHED = """ERROR: gcloud crashed (ConnectionError): \
HTTPSConnectionPool(host='tpu.googleapis.com', port=443): Max \
retries exceeded

If you would like to report this issue, please run the following command:
  gcloud feedback

To check gcloud for common problems, please run the following command:
  gcloud info --run-diagnostics
"""
NO_PROJECT = """ERROR: (gcloud.compute.tpus.queued-resources.describe) Error parsing \
[queued_resource].
The [queued_resource] resource is not properly specified.
Failed to find attribute [project]. The attribute can be set in the following ways:\x20
- provide the argument `--project` on the command line
- set the property `core/project`
"""
NO_LOGIN = f"""ERROR: (gcloud.compute.tpus.queued-resources.delete) You do not currently have an \
active account selected.
{ADVICE}"""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (QUOTA, QUOTA.splitlines()[0]),
        (DISABLED, " ".join(DISABLED.splitlines()[:3])),
        (CRASHED, CRASHED.splitlines()[0]),
        (NO_PROJECT, " ".join(NO_PROJECT.splitlines()[:3]).strip()),
        (NO_LOGIN, NO_LOGIN.splitlines()[0]),
        (f"E: no space\n{QUOTA}", QUOTA.splitlines()[0]),
        (MANY, "E: Unable to locate package gcsfuse"),
        (COPY, "scp: jaxppo.tar.gz: No space left on device"),
        (
            "a\nTraceback (most recent call last):\n  File x\n    y()\nValueError: wrong\n",
            "ValueError: wrong",
        ),
        (
            "SSH: Attempting to connect to worker 0...\n",
            "SSH: Attempting to connect to worker 0...",
        ),
        (" \n", "no reason given"),
        ("", "no reason given"),
    ],
)
def test_last_line(text, line):
    assert gcloud_errors.last_line(text) == line


def test_long_message_has_forty_lines():
    assert gcloud_errors.long_message(MANY) == "" and gcloud_errors.long_message("") == ""
    text = "\n".join(str(i) for i in range(50))
    assert gcloud_errors.long_message(text + "\n").splitlines() == [str(i) for i in range(10, 50)]


@pytest.mark.parametrize(
    "text",
    [
        "503 UNAVAILABLE",
        "gcloud timed out after 3600 s",
        "RESOURCE_EXHAUSTED: Quota exceeded",
        CRASHED,
        "gcloud crashed (SSLError): EOF occurred in violation of protocol (_ssl.c:2427)",
        "429 Too Many Requests",
        "Unable to find the server at tpu.googleapis.com",
        "[Errno -2] Name or service not known",
        "HTTPSConnectionPool(host='oauth2.googleapis.com', port=443): Max "
        "retries exceeded with url: /token",
        MANY,
    ],
)
def test_transient_errors(text):
    assert gcloud_errors.is_transient(text)


@pytest.mark.parametrize(
    "text",
    [
        "PERMISSION_DENIED: nobody may delete my-500",
        "unrecognized arguments: --internal-ip",
        "INVALID_ARGUMENT: quota-project",
        "Reauthentication failed.",
        "",
        DISABLED,
        NO_PROJECT,
        NO_LOGIN,
    ],
)
def test_permanent_errors(text):
    assert (
        not gcloud_errors.is_transient(text) and gcloud_errors.exit_code_of(text, quota=True) == 2
    )


def test_an_expired_login_differs_from_a_network_error():
    """In both cases gcloud says that it cannot refresh its tokens."""
    told = gcloud_errors.describe_error(
        "There was a problem refreshing your current auth tokens: Reauthentication failed."
    )
    assert told.endswith("; log in again in another terminal: gcloud auth login")
    text = (
        "There was a problem refreshing your current auth tokens: Max retries "
        "exceeded with url: /token"
    )
    assert gcloud_errors.describe_error(text) == text
