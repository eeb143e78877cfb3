"""Read gcloud's error output: the informative line, and whether the error is transient."""

import itertools
import re

MISSING = re.compile("NOT_FOUND|was not found|could not be found")
TRANSIENT = re.compile(
    r"UNAVAILABLE|INTERNAL\b|ABORTED|DEADLINE_EXCEEDED|\b50[0234]\b|timed? ?out|"
    r"Connection (reset|refused|closed|aborted)|RESOURCE_EXHAUSTED|quota|"
    r"Network is unreachable|No route to host|Temporary failure in name resolution|"
    r"Name or service not known|nodename nor servname|Unable to find the server|"
    r"Max retries exceeded|\[255\]|\bSSL|EOF occurred|\b429\b|Too Many Requests",
    re.IGNORECASE,
)
# Permanent, even if the text also matches TRANSIENT: a slice may have the name my-500.
FINAL = re.compile("PERMISSION_DENIED|INVALID_ARGUMENT|unrecognized arguments")
# While a slice is PROVISIONING or SUSPENDING, which ends.
REFUSED = re.compile("DeleteQueuedResource is not supported")
# gcloud waits half an hour for an operation, which then continues.
STILL_RUNNING = re.compile("has not finished in")
LOGIN = re.compile(
    "Reauthentication|UNAUTHENTICATED|gcloud auth login|"
    "do not currently have an active account|refreshing .*tokens",
    re.IGNORECASE,
)
# A traceback without its last line.
TRACEBACK = re.compile(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n)*", re.MULTILINE)
# The first line of gcloud's own error.
OWN = re.compile(r"ERROR: (\(gcloud[\w.-]*\)|gcloud crashed) ")
# Lines that gcloud adds to the output of a remote command, to a login error, and after a crash.
NOISE = re.compile(
    r"exited with return code|^##### Command execution on worker|^(SSH|SCP): |"
    r"^Using (ssh|scp) batch size|^Retrying: |^Failed to execute command on multiple workers|"
    r"^SSH key found in project metadata|^Exception in thread|"
    r"^Please (retry your command or )?run:|^\$ gcloud |"
    r"^to (obtain new credentials|select an already)|^If you have already|"
    r"^If you would like to report|^To check gcloud for|^gcloud (feedback|info)"
)


def is_transient(text: str) -> bool:
    """Return whether the same command may work later."""
    return bool(TRANSIENT.search(text)) and not FINAL.search(text)


def exit_code_of(text: str, *, quota: bool) -> int:
    """Return 1 for transient errors and 2 for others.

    `quota`: whether an exhausted quota counts as transient.

    >>> (
    ...     exit_code_of("503 UNAVAILABLE", quota=False),
    ...     exit_code_of("Quota exceeded", quota=False),
    ...     exit_code_of("Quota exceeded", quota=True),
    ... )
    (1, 2, 1)
    """
    return 1 if is_transient(text) and (quota or "quota" not in text.lower()) else 2


def informative_lines(text: str) -> list[str]:
    """Return the lines without tracebacks and gcloud's standard phrases."""
    lines = [line.strip() for line in TRACEBACK.sub("", text).splitlines()]
    return [line for line in lines if line and not NOISE.search(line)]


def last_line(text: str) -> str:
    """Return the last informative line of an error output, at most 300 characters.

    gcloud's own error begins with ERROR, may have several lines, and may end with details in YAML,
    which are left out. Its standard phrases about a remote command are used only if there is
    nothing else.

    >>> last_line(
    ...     "E: no space\\nERROR: (gcloud.a.ssh) [ssh] exited with return code [100].\\n"
    ... )
    'E: no space'
    >>> last_line(
    ...     "ERROR: (gcloud.a) NOT_FOUND: no x\\n- '@type': ResourceInfo\\n  resourceName: x\\n"
    ... )
    'ERROR: (gcloud.a) NOT_FOUND: no x'
    """
    lines = informative_lines(text)
    if own := [number for number, line in enumerate(lines) if OWN.match(line)]:
        said = " ".join(
            itertools.takewhile(lambda line: not line.startswith("- "), lines[own[-1] :])
        )
    else:
        said = [*(text.strip().splitlines() or ["no reason given"]), *lines][-1].strip()
    return said[:300]


def long_message(text: str) -> str:
    """Return the last 40 lines if several are informative, else an empty text.

    For a single line `last_line` is enough.
    """
    return "\n".join(text.rstrip().splitlines()[-40:]) if len(informative_lines(text)) > 1 else ""


def describe_error(text: str) -> str:
    """Return the last line, and what to do if the login has expired."""
    lost = LOGIN.search(text) and not is_transient(text)
    return last_line(text) + "; log in again in another terminal: gcloud auth login" * bool(lost)
