"""One process of a supervised job: `python -m slurm.task LOGS`, where LOGS/task.pkl holds the function to call.

The function gets `stop_requested`, which tells whether the job is about to end (time limit near, preemption, Ctrl-C),
and returns "finished" or "stopped". What becomes of it goes into a record; slurm/records.py says what an exception that
it raises may carry for the supervisor.
"""

import os
import pickle
import socket
import sys
import traceback
from pathlib import Path

from slurm.records import Record, failed_record, write_record
from slurm.signals import ignore_signals, note_signals


def main(logs: Path) -> int:
    """Call the function. Return the exit code: 0 if it finished or stopped, 1 if it failed."""
    signals = note_signals()
    if "RANK" not in os.environ:
        _set_ranks()
    rank = int(os.environ["RANK"])
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()  # Slurm's name of a node need not be its own
    write_record(logs, rank, Record("running", host))
    try:
        from slurm.health import check_node  # it takes seconds to import torch, and a signal may come at any time

        check_node(logs)
        function, arguments = pickle.loads((logs / "task.pkl").read_bytes())
        outcome = function(*arguments, stop_requested=lambda: bool(signals))
    except BaseException as error:
        traceback.print_exc()
        write_record(logs, rank, failed_record(host, error))
        return 1
    write_record(logs, rank, Record(outcome, host))
    return 0


def _set_ranks() -> None:
    """Set torchrun's variables from Slurm's."""
    tasks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NNODES"])
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        WORLD_SIZE=str(tasks),
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(tasks // nodes),
    )


if __name__ == "__main__":
    failed = main(Path(sys.argv[1]))
    ignore_signals()
    if failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # threads of a communication library that broke must not keep a failed task alive
