"""Signals to this very process, and their handlers as they were afterwards."""

import os
import signal
import subprocess
import sys

import pytest

from jaxppo.errors import Interrupted
from jaxppo.run import signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_remembered(number, capfd):
    before = signal.getsignal(number)
    with signals.StopSignals() as stopping:
        assert not stopping.should_stop(1)
        os.kill(os.getpid(), number)
        assert stopping.should_stop(2) and stopping.should_stop(3)
    assert signal.getsignal(number) is before
    assert (
        capfd.readouterr().err
        == f"{number.name}: stopping after this step; once more to stop at once\n"
    )


def test_the_second_ends_at_once():
    code = """
import os, signal
from jaxppo.run import signals
with signals.StopSignals():
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("never", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("still here\n", 143)  # 128 + 15
    assert done.stderr.endswith("SIGTERM again: stopping at once\n")


def test_before_training_there_is_nothing_to_save():
    before = signal.getsignal(signal.SIGTERM)
    try:
        signals.exit_on_sigterm()
        with pytest.raises(Interrupted, match="nothing is lost"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert Interrupted.code == 75


def test_a_slow_dispatch_is_warned_about_once():
    stopping = signals.StopSignals()
    assert stopping.slow_warning(15.0) == ""  # half of 30
    assert "a dispatch takes 16 s" in stopping.slow_warning(16.0)
    assert stopping.slow_warning(17.0) == ""
