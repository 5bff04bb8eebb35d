"""One process of a supervised job: `python -m slurm.task LOGS`, where LOGS/task.pkl holds the function to call.

The function gets `stop_requested`, which tells that the job is about to end (time limit near, preemption, Ctrl-C), and
returns "finished" or "stopped". Whatever becomes of it stands in a record (slurm/records.py). If it raises, the
exception may say `final = True` (starting again would not help) and, in notes, "step 120" and "no answer from ranks 3".
"""

import os
import pickle
import re
import socket
import sys
import traceback
from functools import partial
from pathlib import Path

from slurm.records import write_record
from slurm.signals import ignore_signals, note_signals


def main(logs: Path) -> int:
    """Call the function; 0 if it came to a good end."""
    signals = note_signals()
    if "RANK" not in os.environ:
        _set_ranks()
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()  # Slurm's name for it need not be its own
    record = partial(write_record, logs, int(os.environ["RANK"]), host=host)
    record(outcome="running")
    try:
        from slurm.health import check_node  # it takes seconds to import torch, and a signal may come at any time

        check_node(logs)
        function, arguments = pickle.loads((logs / "task.pkl").read_bytes())
        outcome = function(*arguments, stop_requested=lambda: bool(signals))
    except BaseException as error:
        traceback.print_exc()
        notes = " ".join(getattr(error, "__notes__", []))
        step = re.search(r"\bstep (\d+)", notes)
        absent = re.search(r"\bno answer from ranks ([\d, ]+)", notes)
        record(
            outcome="failed",
            error=_one_line(error),
            final=getattr(error, "final", False),
            step=int(step[1]) if step else None,
            absent=[int(rank) for rank in absent[1].split(",")] if absent else [],
        )
        return 1
    record(outcome=outcome)
    return 0


def _set_ranks() -> None:
    """torchrun's names for what Slurm says."""
    tasks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NNODES"])
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        WORLD_SIZE=str(tasks),
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(tasks // nodes),
    )


def _one_line(error: BaseException) -> str:
    said = next(iter(str(error).strip().splitlines()), "")
    return said if getattr(error, "final", False) else f"{type(error).__name__}: {said}"


if __name__ == "__main__":
    failed = main(Path(sys.argv[1]))
    ignore_signals()
    if failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # threads of a communication library that broke must not keep a failed task alive
