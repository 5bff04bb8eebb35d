"""When a run ends early, all ranks end after the same step: they vote in every step, at no cost that shows."""

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist


class StopVote:
    """Whether any rank was told to stop. All ranks make one, vote in every step, and get the same answer.

    The votes travel by gloo, in a group of their own, while the step is computed.
    """

    def __init__(self, stop_requested: Callable[[], bool], timeout: float) -> None:
        self._requested = stop_requested
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        if dist.get_world_size() > 1:
            dist.monitored_barrier(self._group, wait_all_ranks=True)  # names the ranks that do not come

    def begin(self) -> None:
        """Vote, at the start of a step."""
        self._votes = torch.tensor(int(self._requested()))
        self._sending = dist.all_reduce(self._votes, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def decided(self) -> bool:
        """The answer, at the end of the step."""
        self._sending.wait()
        return bool(self._votes)
