"""What follows from how the tasks of an attempt ended."""

from pathlib import Path

import pytest

from slurm.records import Record
from slurm.state import Attempt, RunState
from slurm.verdict import conclude, decide

LOGS = Path("/logs")


def attempt(outcome="running", **more):
    return Attempt(hosts=["a", "b"], began=0, outcome=outcome, **more)


def record(outcome, host="a", **more):
    return Record(outcome, host, **{"written_at": 5} | more)


def failed(error, host="a", **more):
    return record("failed", host, error=error, **more)


def broken(host="a", **more):
    return failed("RuntimeError: Connection closed by peer", host, at_fault="peer", **more)


def judged(records, ends):
    found = attempt()
    conclude(found, records, ends, LOGS)
    return found


@pytest.mark.parametrize("outcome", ["finished", "stopped"])
def test_all_tasks_that_end_alike_decide(outcome):
    assert judged({0: record(outcome), 1: record(outcome, "b")}, {}).outcome == outcome


@pytest.mark.parametrize(
    ("records", "ends", "said", "host"),
    [
        ({0: broken(), 1: failed("ValueError: x", "b", step=7)}, {0: "", 1: ""}, "ValueError: x (rank 1 on b", "b"),
        ({0: broken(step=7), 1: record("running", "b")}, {1: "Killed", 0: ""}, "Killed (rank 1 on b", "b"),
        (
            {0: broken(absent_ranks=[1], step=7), 1: broken("b")},
            {0: ""},
            "did not answer the others: it hung",
            "b",
        ),
        (
            {0: broken(absent_ranks=[1, 2]), 1: broken(absent_ranks=[2]), 2: record("running", "b")},
            {1: "", 0: "", 2: "Killed"},
            "did not answer the others: Killed (rank 2 on b",
            "b",
        ),
        (  # rank 0 was slow to notice, but did
            {0: broken(), 1: broken(absent_ranks=[0]), 2: record("running", "b"), 3: broken(absent_ranks=[0, 2])},
            {0: "", 1: "", 3: "", 2: "Killed"},
            "did not answer the others: Killed (rank 2 on b",
            "b",
        ),
        (  # rank 2 was frozen; rank 0 reported it first and ended; the others, and rank 2 when released, missed rank 0
            {
                0: broken(absent_ranks=[2], written_at=4),
                1: broken(absent_ranks=[0]),
                2: broken("b", absent_ranks=[0]),
                3: broken("b", absent_ranks=[0]),
            },
            {0: "", 1: "", 2: "Exited with exit code 1", 3: ""},
            "did not answer the others: Exited with exit code 1 (rank 2 on b",
            "b",
        ),
        ({0: broken(), 1: broken("b")}, {0: "", 1: ""}, "Connection closed", ""),
        ({}, {0: "srun: error: Unable to create step"}, "Unable to create step", ""),
        ({0: record("finished"), 1: record("running", "b")}, {1: "killed by SIGSEGV"}, "SIGSEGV (rank 1 on b", "b"),
    ],
)
def test_who_is_to_blame(records, ends, said, host):
    found = judged(records, ends)
    assert found.outcome == "failed" and said in found.why and found.host == host and not found.final
    if any(one.step for one in records.values()):
        assert found.step == 7 and "in step 7" in found.why


def test_an_error_that_the_user_must_fix_is_said_as_it_is_whoever_else_failed():
    found = judged({0: broken(), 1: failed("ValueError: x"), 2: failed("lr=-1: below 0", final=True)}, {2: ""})
    assert found.final and found.why.startswith("lr=-1: below 0 (rank 2")


def verdict(*attempts, retries=3, near_limit=False, stop_asked=False, can_requeue=True, failures=None, excluded=()):
    state = RunState(attempts=list(attempts), host_failures=failures or {}, excluded=list(excluded))
    return *decide(state, retries, near_limit, stop_asked, can_requeue), state.excluded


def test_what_follows():
    def broke(step):
        return attempt("failed", step=step, why="x")

    stopped = attempt("stopped")
    assert verdict(attempt("finished"))[0] == "finished"
    assert verdict(attempt("finished"), near_limit=True, stop_asked=True)[0] == "finished"
    assert verdict(stopped)[:2] == ("requeue", "time limit or preemption")
    assert verdict(stopped, stop_asked=True)[:2] == ("stopped", "as asked")
    assert verdict(attempt("lost"))[0] == "requeue"
    assert verdict(attempt("failed", final=True, why="lr"))[:2] == ("failed", "lr")
    assert verdict(broke(4))[0] == "restart"
    assert verdict(broke(4), retries=0)[0] == "failed"
    assert verdict(broke(4), near_limit=True)[0] == "requeue", "the allocation is at its end"
    assert verdict(broke(4), near_limit=True, can_requeue=False)[0] == "restart"
    assert verdict(broke(4), broke(5))[0] == verdict(broke(4), stopped, broke(9))[0] == "restart"
    assert verdict(broke(4), broke(4))[:2] == ("failed", "twice in step 4: x")
    assert verdict(broke(None), broke(None))[1] == "twice before the first step: x"
    assert verdict(broke(4), stopped, broke(4))[0] == "failed"
    assert verdict(broke(None), stopped, broke(None))[0] == "restart", "between them it began"
    assert verdict(broke(4), broke(9), broke(4))[0] == "restart"
    assert verdict(broke(1), broke(2), broke(3))[0] == "restart"
    assert verdict(broke(1), broke(2), broke(3), stopped, broke(5))[0] == "restart", "failures in a row count"
    assert verdict(broke(1), broke(2), broke(3), broke(4))[:2] == ("failed", "4 failures; the last: x")
    assert verdict(broke(1), broke(2), failures={"a": 1, "b": 2})[::2] == ("requeue", ["b"])
    assert verdict(broke(1), broke(2), failures={"b": 2}, excluded=["b"])[::2] == ("restart", ["b"])
    assert verdict(broke(1), broke(2), failures={"b": 2}, can_requeue=False)[::2] == ("restart", [])


def test_a_port_that_was_taken_meanwhile_is_no_fault_of_the_program():
    taken = attempt("failed", why="DistNetworkError: EADDRINUSE", at_fault="port")
    assert verdict(taken, taken)[0] == "restart"


def test_a_host_that_is_not_fit_is_no_fault_of_the_program():
    unfit = attempt("failed", why="NodeError: b: 7 of its 8 GPUs can be used", at_fault="node")
    assert verdict(unfit, unfit, failures={"b": 2})[::2] == ("requeue", ["b"])
    assert verdict(unfit, unfit, failures={"b": 1, "a": 1})[0] == "restart"
