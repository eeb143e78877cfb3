"""What gcloud complains of: which line of it says something, and whether it passes by itself."""

import itertools
import re

MISSING = re.compile("NOT_FOUND|was not found|could not be found")
PASSING = re.compile(
    r"UNAVAILABLE|INTERNAL\b|ABORTED|DEADLINE_EXCEEDED|\b50[0234]\b|timed? ?out|Connection (reset|refused|closed|aborted)|"
    r"RESOURCE_EXHAUSTED|quota|Network is unreachable|No route to host|Temporary failure in name resolution|"
    r"Name or service not known|nodename nor servname|Unable to find the server|Max retries exceeded|\[255\]|"
    r"\bSSL|EOF occurred|\b429\b|Too Many Requests",
    re.IGNORECASE,
)
FINAL = re.compile(
    "PERMISSION_DENIED|INVALID_ARGUMENT|unrecognized arguments"
)  # whatever else it says: a name may be my-500
REFUSED = re.compile(
    "DeleteQueuedResource is not supported"
)  # while it is PROVISIONING or SUSPENDING, which ends
UNDERWAY = re.compile(
    "has not finished in"
)  # gcloud waits half an hour for an operation, which goes on
LOGIN = re.compile(
    "Reauthentication|UNAUTHENTICATED|gcloud auth login|do not currently have an active account|refreshing .*tokens",
    re.IGNORECASE,
)
TRACEBACK = re.compile(
    r"^Traceback \(most recent call last\):\n(?:[ \t].*\n)*", re.MULTILINE
)  # not what it ends with
OWN = re.compile(
    r"ERROR: (\(gcloud[\w.-]*\)|gcloud crashed) "
)  # the line that gcloud's own complaint begins with
# What gcloud adds to a command's own words, with one host and with many, its advice of four lines
# to log in, and after a crash.
NOISE = re.compile(
    r"exited with return code|^##### Command execution on worker|^(SSH|SCP): |^Using (ssh|scp) batch size|^Retrying: |"
    r"^Failed to execute command on multiple workers|^SSH key found in project metadata|^Exception in thread|"
    r"^Please (retry your command or )?run:|^\$ gcloud |^to (obtain new credentials|select an already)|^If you have already|"
    r"^If you would like to report|^To check gcloud for|^gcloud (feedback|info)"
)


def passes(text: str) -> bool:
    """Whether the same command may work later."""
    return bool(PASSING.search(text)) and not FINAL.search(text)


def code_of(text: str, *, quota: bool) -> int:
    """1 for what may pass by itself, 2 for what will not; `quota`: whether one that is used up
    passes.

    >>> (
    ...     code_of("503 UNAVAILABLE", quota=False),
    ...     code_of("Quota exceeded", quota=False),
    ...     code_of("Quota exceeded", quota=True),
    ... )
    (1, 2, 1)
    """
    return 1 if passes(text) and (quota or "quota" not in text.lower()) else 2


def telling(text: str) -> list[str]:
    """The lines that say something."""
    lines = [line.strip() for line in TRACEBACK.sub("", text).splitlines()]
    return [line for line in lines if line and not NOISE.search(line)]


def last_line(text: str) -> str:
    """What a command complained of in the end; gcloud's own words about a remote command only where
    there are no others. What it says of itself begins with ERROR, and may go on for some lines and
    end with details in YAML, which are left out.

    >>> last_line(
    ...     "E: no space\\nERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [100].\\n"
    ... )
    'E: no space'
    >>> last_line(
    ...     "ERROR: (gcloud.a) NOT_FOUND: no x\\n- '@type': ResourceInfo\\n  resourceName: x\\n"
    ... )
    'ERROR: (gcloud.a) NOT_FOUND: no x'
    """
    lines = telling(text)
    if own := [number for number, line in enumerate(lines) if OWN.match(line)]:
        said = " ".join(
            itertools.takewhile(lambda line: not line.startswith("- "), lines[own[-1] :])
        )
    else:
        said = [*(text.strip().splitlines() or ["no reason given"]), *lines][-1].strip()
    return said[:300]


def at_length(text: str) -> str:
    """All of it, or its last 40 lines, where more than one says something; else nothing:
    `last_line` is enough.
    """
    return "\n".join(text.rstrip().splitlines()[-40:]) if len(telling(text)) > 1 else ""


def complaint(text: str) -> str:
    """Its last line, and what to do about a login that is lost while something is watched."""
    lost = LOGIN.search(text) and not passes(text)
    return last_line(text) + "; log in again in another terminal: gcloud auth login" * bool(lost)
