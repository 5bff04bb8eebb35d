"""How an attempt ended, who is to blame, and what to do next. Nothing here asks Slurm or reads files."""

from collections import Counter
from itertools import takewhile
from pathlib import Path
from typing import Literal

from slurm.records import Record
from slurm.state import Attempt, RunState

MAX_FAILURES_OF_HOST = 2  # from which on a host is left out

Verdict = Literal["restart", "requeue", "finished", "stopped", "failed"]
"""Start the tasks again in the same allocation; have Slurm start the job again; or end the run."""


def conclude(attempt: Attempt, records: dict[int, Record], bad_ends: dict[int, str], logs: Path) -> None:
    """Fill in how an attempt ended whose tasks left `records`.

    bad_ends: how the tasks ended that ended badly, by rank, the first to do so first.
    """
    outcomes = {record.outcome for record in records.values()}
    if not bad_ends and outcomes == {"finished"}:
        attempt.outcome = "finished"
        return
    if not bad_ends and outcomes == {"stopped"}:
        attempt.outcome = "stopped"
        return
    attempt.outcome = "failed"
    failed = [record for record in records.values() if record.outcome == "failed"]
    attempt.final = any(record.final for record in failed)
    attempt.step = min((record.step for record in failed if record.step is not None), default=None)
    rank, did_not_answer = _to_blame(records, bad_ends)
    record = records.get(rank, Record("running", ""))
    if did_not_answer:
        message = f"did not answer the others: {bad_ends.get(rank, 'it hung')}"
    else:
        message = record.error or bad_ends.get(rank, "ended without a word")
        attempt.at_fault = record.at_fault
    at = f"rank {rank}"
    if record.host:
        at += f" on {record.host}"
    if attempt.step is not None:
        at += f" in step {attempt.step}"
    attempt.why = f"{message} ({at}; log {logs / f'{rank}.log'})"
    silent = record.outcome == "running" and rank in bad_ends
    blamed = record.outcome == "failed" and record.at_fault in ("program", "node")
    attempt.host = record.host if did_not_answer or silent or blamed else ""


def _to_blame(records: dict[int, Record], bad_ends: dict[int, str]) -> tuple[int, bool]:
    """Return the rank with which a failure began, and whether it is to blame because it did not answer the others."""
    errors = {rank: record for rank, record in sorted(records.items()) if record.outcome == "failed"}
    own = [rank for rank, record in errors.items() if record.at_fault != "peer"]
    final = [rank for rank in own if errors[rank].final]
    silent = [rank for rank in bad_ends if rank in records and records[rank].outcome == "running"]
    votes = Counter(rank for record in errors.values() for rank in record.absent_ranks)
    # A rank that left a record of its failure was alive. If all did, as one that was frozen does when Slurm ends it,
    # the first to report missed the right one, and later ones missed those that had ended.
    reports = [record for record in errors.values() if record.absent_ranks]
    first = min(reports, key=lambda record: record.written_at).absent_ranks if reports else []
    absent = sorted(votes, key=lambda rank: (rank in errors, rank not in first, -votes[rank], rank))
    rank = next(iter([*final, *own, *absent, *silent, *errors, *bad_ends, 0]))
    return rank, rank in absent and rank not in own


def decide(state: RunState, retries: int, near_limit: bool, stop_asked: bool, can_requeue: bool) -> tuple[Verdict, str]:
    """Return what to do after the last attempt, and why. Adds hosts to leave out to `state.excluded`.

    near_limit: the time limit is too near to start again. stop_asked: the user wants the run to end.
    can_requeue: there is a queue.
    """
    last = state.attempts[-1]
    if last.outcome == "finished":
        return "finished", ""
    if last.final:
        return "failed", last.why
    if stop_asked:
        return "stopped", "as asked" + (f"; {last.why}" if last.why else "")
    if last.outcome in ("stopped", "lost"):
        return "requeue", last.why or "time limit or preemption"
    if last.at_fault in ("program", "peer") and _has_repeated(state.attempts):
        when = "before the first step" if last.step is None else f"in step {last.step}"
        return "failed", f"twice {when}: {last.why}"
    in_a_row = len(list(takewhile(lambda attempt: attempt.outcome == "failed", reversed(state.attempts))))
    if in_a_row > retries:
        return "failed", f"{in_a_row} failures; the last: {last.why}"
    bad = {host for host, number in state.host_failures.items() if number >= MAX_FAILURES_OF_HOST}
    if can_requeue and (near_limit or bad - set(state.excluded)):
        state.excluded = sorted({*state.excluded, *bad})
        return "requeue", last.why
    return "restart", last.why


def _has_repeated(attempts: list[Attempt]) -> bool:
    """Whether the last attempt failed in the same step as the failure before it."""
    *before, last = attempts
    if last.step is None:
        before = before[-1:]  # an attempt that did not fail got as far as a first step
    failed = [attempt for attempt in before if attempt.outcome == "failed"]
    return bool(failed) and failed[-1].step == last.step
