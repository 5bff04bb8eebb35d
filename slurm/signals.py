"""Signals that tell a job of its end: SIGUSR2 (time limit), SIGTERM (preemption, scancel), SIGINT (Ctrl-C)."""

import signal

_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def note_signals() -> list[int]:
    """From now on these signals do no more than appear in this list."""
    noted: list[int] = []
    for number in _SIGNALS:
        signal.signal(number, lambda number, _: noted.append(number))
    return noted


def ignore_signals() -> None:
    """At the end: Python gives up its handlers before it exits, and a signal, which any thread may get, would then make
    a failure of success. What is ignored stays ignored."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
