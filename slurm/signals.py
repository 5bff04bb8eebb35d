"""Signals that tell a job to end: SIGUSR2 (time limit), SIGTERM (preemption, scancel), SIGINT (Ctrl-C)."""

import signal

_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def note_signals() -> list[int]:
    """Catch these signals from now on; return the list to which each that arrives is appended."""
    noted: list[int] = []
    for number in _SIGNALS:
        signal.signal(number, lambda number, _: noted.append(number))
    return noted


def ignore_signals() -> None:
    """Ignore these signals until the process has exited.

    Python drops its handlers before it exits, and a signal in between, which any thread may get, would turn success
    into a failure. What is ignored stays ignored.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
