"""One rank that trains a step and notes in which types things are computed, summed, sent and kept."""

import json
from collections import defaultdict
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.backbones.attention import GroupAttention
from models.objectives.denoising import denoising_loss
from models.paths.registry import make_path
from tests.trainer.forked import TINY
from trainer.batches import make_batches
from trainer.build import build_network, open_data
from trainer.config.tree import load_config
from trainer.engines.build import build_engine
from trainer.ranks import process_group

KINDS = {  # what a module is, by the first of these words that its name begins with
    "blocks.attn.q_norm": "norms",
    "blocks.attn.k_norm": "norms",
    "blocks.norm": "norms",
    "blocks.adaLN_modulation.0": "conditioning",
    "blocks.": "branches",
    "x_embedder": "patches",
    "t_embedder": "time",
    "y_embedder": "classes and slots",
    "sample_embedder": "classes and slots",
    "final_layer": "last layer",
}


class Notes(TorchDispatchMode):
    """Types by what they are of: collectives are seen here, modules by hooks."""

    def __init__(self):
        super().__init__()
        self.types = defaultdict(set)

    def note(self, what, *tensors):
        found = (t.dtype for t in tree_leaves(tensors) if isinstance(t, torch.Tensor) and t.is_floating_point())
        self.types[what] |= {str(dtype).removeprefix("torch.") for dtype in found}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = str(func).partition(".")
        if namespace in ("c10d", "_c10d_functional"):
            many = [tensor for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor) and tensor.numel() > 1]
            self.note("reduced" if "reduce" in name else "gathered" if "gather" in name else "sent", many)
        return func(*args, **(kwargs or {}))

    def watch(self, network):
        network.register_forward_hook(lambda network, inputs, output: self.note("prediction", output))
        for block in network.blocks:
            block.register_forward_hook(lambda block, inputs, output: self.note("tokens", inputs[0], output))
            block.register_forward_hook(lambda block, inputs, output: self.note("conditioning", inputs[1]))
        for name, module in network.named_modules():
            head, _, rest = name.partition(".")
            name = f"blocks.{rest.partition('.')[2]}" if head == "blocks" else name
            kind = next((kind for start, kind in KINDS.items() if name.startswith(start)), None)
            if kind and name != "blocks.":
                module.register_forward_hook(lambda module, inputs, output, kind=kind: self.note(kind, output))
            if isinstance(module, GroupAttention):
                module.observer = lambda q, k, groups: self.note("queries and keys", q, k)


def observe(*overrides):
    """Two micro-batches of a step; all types, in RUN.json."""
    config, notes = load_config(TINY, overrides), Notes()
    with process_group() as ranks:
        images = open_data(config)
        network = build_network(config, images)
        notes.watch(network)
        engine = build_engine(config, config.optim, network, ranks)
        (micro_batches,) = make_batches(config, images, ranks, 0, 1, lambda *_: None)
        with notes:
            for i, micro in enumerate(micro_batches):
                with engine.accumulating(last=i == len(micro_batches) - 1):
                    loss = denoising_loss(engine, make_path(config.path), micro)
                    notes.note("loss", loss)
                    engine.backward(loss.mean())
            notes.note("gradients", [weight.grad for weight in engine.weights.values()])
            engine.step(1e-3)
        state = engine.state()
        notes.note("weights, averages and moments", [state[part] for part in ("model", "ema", "optimizer")])
        if ranks.rank == 0:
            Path(config.run + ".json").write_text(json.dumps({what: sorted(t) for what, t in notes.types.items()}))
