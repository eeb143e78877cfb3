"""What of gcloud's complaints is told to people, and which of them pass by themselves."""

import complaints
import pytest

MANY = """Using ssh batch size of 1. Attempting to SSH into 1 nodes with a total of 4 workers.
SSH: Attempting to connect to worker 0...
SSH: Attempting to connect to worker 1...
E: Unable to locate package gcsfuse
##### Command execution on worker 1 failed with exit status 100. Continuing.
Failed to execute command on multiple workers. This may have happened if you have not added your SSH key to your ssh-agent using \
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


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (MANY, "E: Unable to locate package gcsfuse"),
        (COPY, "scp: jaxppo.tar.gz: No space left on device"),
        ("a\nTraceback (most recent call last):\n  File x\n    y()\nValueError: wrong\n", "ValueError: wrong"),
        ("SSH: Attempting to connect to worker 0...\n", "SSH: Attempting to connect to worker 0..."),
        (" \n", "no reason given"),
        ("", "no reason given"),
    ],
)
def test_the_line_that_says_something(text, line):
    assert complaints.last_line(text) == line


def test_at_length_means_forty_lines_of_more_than_one_that_matters():
    assert complaints.at_length(MANY) == "" and complaints.at_length("") == ""
    text = "\n".join(str(i) for i in range(50))
    assert complaints.at_length(text + "\n").splitlines() == [str(i) for i in range(10, 50)]


@pytest.mark.parametrize(
    "text",
    [
        "503 UNAVAILABLE", "gcloud timed out after 3600 s", "RESOURCE_EXHAUSTED: Quota exceeded",
        "Unable to find the server at tpu.googleapis.com", "[Errno -2] Name or service not known",
        "HTTPSConnectionPool(host='oauth2.googleapis.com', port=443): Max retries exceeded with url: /token", MANY,
    ],
)  # fmt: skip
def test_what_passes(text):
    assert complaints.passes(text)


@pytest.mark.parametrize(
    "text",
    [
        "PERMISSION_DENIED: nobody may delete my-500", "unrecognized arguments: --internal-ip", "INVALID_ARGUMENT: quota-project",
        "Reauthentication failed.", "",
    ],
)  # fmt: skip
def test_what_does_not_pass(text):
    assert not complaints.passes(text) and complaints.code_of(text, quota=True) == 2


def test_a_login_that_is_lost_is_told_from_a_network_that_is_down():
    """gcloud says of both that it cannot refresh its tokens."""
    told = complaints.complaint("There was a problem refreshing your current auth tokens: Reauthentication failed.")
    assert told.endswith("; log in again in another terminal: gcloud auth login")
    text = "There was a problem refreshing your current auth tokens: Max retries exceeded with url: /token"
    assert complaints.complaint(text) == text
