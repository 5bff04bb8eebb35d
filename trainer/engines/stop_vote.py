"""How ranks agree on the step after which a run ends early: they vote at every step, at no measurable cost."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class StopVote:
    """Whether any rank was asked to stop. All ranks create one, vote at every step, and get the same answer.

    Votes travel by gloo, in a process group of their own, while the step is computed.
    """

    def __init__(self, stop_requested: Callable[[], bool], timeout: float) -> None:
        self._requested = stop_requested
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        if dist.get_world_size() > 1:
            dist.monitored_barrier(self._group, wait_all_ranks=True)  # names the ranks that are missing

    def begin(self) -> None:
        """Vote, at the start of a step."""
        self._votes = torch.tensor(int(self._requested()))
        self._sending: Any = dist.all_reduce(self._votes, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def decided(self) -> bool:
        """Return the answer, at the end of the step."""
        self._sending.wait()
        return bool(self._votes)
