"""What an attempt came to, and what follows from that: pure functions."""

import re
from collections import Counter
from itertools import takewhile
from pathlib import Path
from typing import Literal

from slurm.state import Attempt, RunState

MAX_FAILURES_OF_HOST = 2
# errors that come of another rank's end, not of a fault of their own
_OF_OTHERS = re.compile(r"Connection|DistBackend|DistNetwork|DistStore|NCCL|gloo|[Tt]imed? ?out|Broken pipe")

Verdict = Literal["again", "requeue", "finished", "stopped", "failed"]


def judge(attempt: Attempt, records: dict[int, dict], ends: dict[int, str], logs: Path) -> None:
    """Set the outcome of an attempt whose tasks left `records`. `ends`: how tasks ended that ended badly, the first to
    do so first."""
    outcomes = {record["outcome"] for record in records.values()}
    if not ends and outcomes in ({"finished"}, {"stopped"}):
        attempt.outcome = outcomes.pop()
        return
    attempt.outcome = "failed"
    errors = {rank: record for rank, record in sorted(records.items()) if record["outcome"] == "failed"}
    attempt.final = any(record["final"] for record in errors.values())
    attempt.step = min((record["step"] for record in errors.values() if record["step"] is not None), default=None)
    own = [rank for rank, record in errors.items() if not _OF_OTHERS.search(record["error"])]
    final = [rank for rank in own if errors[rank]["final"]]
    silent = [rank for rank in ends if records.get(rank, {}).get("outcome") == "running"]
    votes = Counter(rank for record in errors.values() for rank in record["absent"])  # of those that waited for it
    # Who reported was alive. If all have, as one that was frozen does when Slurm ends it: the first to report missed
    # the right one, later ones missed those that had ended.
    first = min((record for record in errors.values() if record["absent"]), key=lambda record: record["at"], default={})
    named = first.get("absent", [])
    missed = sorted(votes, key=lambda rank: (rank in errors, rank not in named, -votes[rank], rank))
    rank = next(iter([*final, *own, *missed, *silent, *errors, *ends, 0]))
    record = records.get(rank, {"host": ""})
    if rank in missed and rank not in own:
        said = f"did not answer the others: {ends.get(rank, 'it hung')}"
    else:
        said = record.get("error") or ends.get(rank, "ended without a word")
    where = [
        f"rank {rank}",
        f"on {record['host']}" * bool(record["host"]),
        f"in step {attempt.step}" * (attempt.step is not None),
    ]
    attempt.why = f"{said} ({' '.join(filter(None, where))}; log {logs / f'{rank}.log'})"
    attempt.host = record["host"] if rank in {*own, *missed, *silent} else ""


def decide(state: RunState, retries: int, late: bool, asked: bool, can_requeue: bool) -> tuple[Verdict, str]:
    """What follows the last attempt, and why; hosts to be left out are added to the state.

    late: the time limit is near. asked: the user wants the end. can_requeue: there is a queue.
    """
    last = state.attempts[-1]
    failed = list(takewhile(lambda attempt: attempt.outcome == "failed", reversed(state.attempts)))
    if last.outcome == "finished":
        return "finished", ""
    if last.final:
        return "failed", last.why
    if asked:
        return "stopped", f"as asked{'; ' * bool(last.why)}{last.why}"
    if last.outcome in ("stopped", "lost"):
        return "requeue", last.why or "time limit or preemption"
    others = state.attempts[-2:-1] if last.step is None else state.attempts[:-1]  # one that did not fail has begun
    before = [attempt for attempt in others if attempt.outcome == "failed"][-1:]
    own = not re.search("EADDRINUSE|NodeError", last.why)
    if own and any(attempt.step == last.step for attempt in before):
        return "failed", f"twice {'before the first step' if last.step is None else f'in step {last.step}'}: {last.why}"
    if len(failed) > retries:
        return "failed", f"{len(failed)} failures; the last: {last.why}"
    bad = {host for host, number in state.host_failures.items() if number >= MAX_FAILURES_OF_HOST}
    if can_requeue and (late or bad - set(state.excluded)):
        state.excluded = sorted({*state.excluded, *bad})
        return "requeue", last.why
    return "again", last.why
