"""What a failed task tells its supervisor."""

import json

from slurm.records import Record, clear_records, failed_record, read_records, write_record


def read_back(logs, record):
    clear_records(logs)
    write_record(logs, 3, record)
    [(rank, found)] = read_records(logs).items()
    assert rank == 3 and found.written_at > 0
    return found


def test_what_an_exception_carries_is_in_the_record(tmp_path):
    error = RuntimeError("Connection closed\nby peer")
    error.step, error.absent_ranks, error.at_fault = 7, [1, 2], "peer"
    found = read_back(tmp_path, failed_record("node1", error))
    assert (found.outcome, found.host, found.error) == ("failed", "node1", "RuntimeError: Connection closed")
    assert (found.step, found.absent_ranks, found.at_fault, found.final) == (7, [1, 2], "peer", False)


def test_an_exception_that_carries_nothing_is_the_programs_own(tmp_path):
    found = read_back(tmp_path, failed_record("node1", ValueError("x")))
    assert (found.step, found.absent_ranks, found.at_fault, found.final) == (None, [], "program", False)


def test_the_message_of_a_final_error_stays_as_it_is():
    error = ValueError("lr=-1: must be above 0; set optim.lr")
    error.final = True
    record = failed_record("node1", error)
    assert record.final and record.error == "lr=-1: must be above 0; set optim.lr"


def test_a_record_of_another_version_is_read(tmp_path):
    clear_records(tmp_path)
    old = {"outcome": "failed", "host": "node1", "error": "ValueError: x", "final": False, "step": 7, "absent": [2]}
    (tmp_path / "records/0.json").write_text(json.dumps(old))
    found = read_records(tmp_path)[0]
    assert (found.outcome, found.step, found.absent_ranks, found.at_fault) == ("failed", 7, [], "program")


def test_a_task_that_runs_has_a_record(tmp_path):
    assert read_back(tmp_path, Record("running", "node1")).outcome == "running"
