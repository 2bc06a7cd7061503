"""Signals: recorded, checked at safe points, and not lost where Python drops exceptions."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import threading

import pytest

from evotok_plugin.common.interruption import Stopped, StopSignals, check_stopped, forget_stop, stop_on_signals
from evotok_plugin.common.progress import progress_bar

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers():
    """Default handlers: a suite in the background of a shell, or under nohup, inherits ignored signals."""
    before = [signal.signal(number, signal.SIG_DFL) for number in SIGNALS]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_a_command_and_handlers_are_restored(number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, stop_on_signals():
        signal.raise_signal(number)
    assert stopped.value.number == number and signal.getsignal(number) is before
    check_stopped()  # the record ends with the block


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_whose_exception_is_lost_stops_at_the_next_safe_point(number):
    with stop_on_signals():
        try:
            signal.raise_signal(number)
        except Stopped:
            pass  # as Python does in a fork hook
        with pytest.raises(Stopped):
            check_stopped()
        with pytest.raises(Stopped):
            progress_bar(total=1, disable=True).update()
        with StopSignals() as signals:
            assert signals.caught == number
            check_stopped()  # the loop stops itself, where its work is saved
            progress_bar(total=1, disable=True).update()
        forget_stop()
        check_stopped()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_records_a_signal_and_goes_on(number):
    with stop_on_signals(), StopSignals() as signals:
        signal.raise_signal(number)
        assert signals.caught == number


def test_a_hangup_that_is_ignored_at_the_start_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_on_signals(), StopSignals() as signals:
        signal.raise_signal(signal.SIGHUP)
        assert signals.caught == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_ctrl_c_that_a_shell_has_ignored_for_a_background_job_still_stops_a_run():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.caught == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_other_threads_change_no_handlers():
    seen = []

    def look():
        with stop_on_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


LOOP = """
import logging, sys, time
from evotok_plugin.common.interruption import StopSignals, stop_on_signals
from evotok_plugin.common.progress import progress_bar

with stop_on_signals(), StopSignals() as signals:
    bar = progress_bar(total=10**6)
    open(sys.argv[1] + "/up", "w").close()
    while not signals.caught:
        bar.update()
        time.sleep(0.01)
    for _ in range(30):  # a step and its checkpoint
        bar.update()
        print("saving", flush=True)
        time.sleep(0.01)
    bar.close()
    open(sys.argv[1] + "/saved", "w").close()
sys.exit(128 + signals.caught)
"""


def test_a_run_whose_terminal_is_lost_still_saves(tmp_path):
    main, terminal = pty.openpty()
    termios.tcsetwinsize(main, (24, 80))
    running = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(tmp_path)], stdin=terminal, stdout=terminal, stderr=terminal,
        start_new_session=True, preexec_fn=_own_terminal,
    )  # fmt: skip
    os.close(terminal)
    while not (tmp_path / "up").exists():
        assert running.poll() is None
    assert b"1000000" in os.read(main, 1000)  # the bar
    os.close(main)  # the terminal hangs up, and the system sends SIGHUP
    assert running.wait(timeout=120) == 129 and (tmp_path / "saved").exists()


def _own_terminal():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
