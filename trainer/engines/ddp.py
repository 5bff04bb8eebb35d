"""The whole network on each rank; gradients are averaged while they are computed."""

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.engines.config import EngineConfig, OptimConfig
from trainer.engines.single import Single
from trainer.ranks import Ranks


class DDP(Single):
    """PyTorch's DistributedDataParallel. Heads, which it does not see, have their gradients averaged in `step`."""

    def __init__(
        self, network: nn.Module, heads: nn.ModuleDict, config: EngineConfig, optim: OptimConfig, ranks: Ranks
    ) -> None:
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        with warnings.catch_warnings():  # from torch 2.13 on, of an argument whose successor older ones lack
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._replica = DistributedDataParallel(
                network, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        super().__init__(network, heads, config, optim, ranks)
        self.network = self._replica

    @classmethod
    def check_ranks(cls, config: EngineConfig, world_size: int) -> None:
        """Accept any number."""

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Exchange gradients in the last micro-batch of a step only."""
        return nullcontext() if last else self._replica.no_sync()

    def step(self, lr: float) -> Tensor:
        """Average the heads' gradient over the ranks; otherwise do the same as in one process."""
        gradients = [weight.grad for weight in self.head_weights.values() if weight.grad is not None]
        if gradients:
            mean = torch.cat([gradient.flatten() for gradient in gradients]) / dist.get_world_size()
            dist.all_reduce(mean)
            sizes = [gradient.numel() for gradient in gradients]
            for gradient, part in zip(gradients, mean.split(sizes), strict=True):
                gradient.copy_(part.view_as(gradient))
        return super().step(lr)
