"""What ranks really exchange in a step, as torch.distributed is asked for it."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer.forked import TINY
from trainer.build import build_network, open_data
from trainer.config.tree import load_config
from trainer.engines.build import build_engine
from trainer.ranks import process_group

WHOLE = {"_allgather_base_": 0, "_reduce_scatter_base_": 1, "allreduce_": 0}  # the argument that has the whole tensor
IMAGES = 4  # of a rank's micro-batch


class Record(TorchDispatchMode):
    """[name, bytes of the whole tensor, ranks] of each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            whole = args[WHOLE[name]]
            group = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
            ranks = torch.distributed.ProcessGroup.unbox(group).size()
            tensors = whole if isinstance(whole, list) else [whole]
            self.calls.append((name, sum(t.nbytes for t in tensors), ranks))
        return func(*args, **(kwargs or {}))


def record(file: Path, micro_batches: int, *overrides: str) -> None:
    """Record the last of three steps: DDP makes its buckets anew in the second."""
    config = load_config(TINY, overrides)
    with process_group() as ranks:
        images = open_data(config)
        engine = build_engine(config, config.optim, build_network(config, images), ranks)
        number = torch.arange(IMAGES)
        channels, side, _ = images.shape
        for step in range(3):
            seen = Record()
            with seen if step == 2 else nullcontext():
                for i in range(micro_batches):
                    with engine.accumulating(last=i == micro_batches - 1):
                        x = torch.randn(IMAGES, channels, side, side)
                        engine.backward(engine(x, number / IMAGES, number, number, 1).square().mean())
            engine.step(1e-4)
        if ranks.rank == 0:
            file.write_text(json.dumps(seen.calls))
