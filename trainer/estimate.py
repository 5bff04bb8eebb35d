"""Estimate what a run will need, before it is submitted: network, memory, communication, time.

- FLOPs: multiply-adds of a forward pass counted by fvcore (attention of the groups included), times 2 for FLOPs, times
  3 for forward and backward (Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1).
- Model states: AdamW in fp32 keeps 4 bytes each of parameter, gradient and two moments (Rajbhandari et al. 2020,
  "ZeRO", section 3.1), each average of the weights 4 more. What an engine shards is divided by its ranks: everything
  with fsdp, hsdp (by `shard_size`, here the whole world if null) and ZeRO-3, the optimizer's part with ZeRO-1, that and
  gradients with ZeRO-2. The gathered blocks are extra. With `offload` the states are in host memory.
- Activations: 34 bytes per token, channel and block in bf16, without the attention matrix, which fused attention does
  not keep (Korthikanti et al. 2022, "Reducing Activation Recomputation", equation 2); twice that in fp32. It counts
  dropout masks, which we lack, and omits the adaptive norm's copies, which we have: the least exact line. A recomputed
  block keeps only its input (2 bytes); the rest is kept for one such block at a time.
- Communication: a ring all-reduce moves 2 (P - 1) / P of the gradients per rank and step, as ZeRO-1 and 2 do in two
  halves; FSDP and ZeRO-3 gather the weights for forward and backward and reduce the gradients: 3 (P - 1) / P ("ZeRO",
  section 7); HSDP does so inside a copy, and all-reduces shards of gradients between copies.
- Time: world size x peak x utilisation over FLOPs, with the peaks of NVIDIA's data sheet, dense.
"""

import torch

from data.sets.form import ImageForm
from models.backbones.flops import forward_multiply_adds
from trainer.build import build_network
from trainer.config.tree import Config
from trainer.engines.build import ENGINES

PEAK_FLOPS = {"bf16": 989e12, "fp32": 67e12}  # of an H100 SXM


def estimate(config: Config, images: ImageForm, world_size: int, utilisation: float) -> dict[str, float]:
    """Return parameters, flops_per_step, per rank the bytes of states, gathered weights, activations and communication,
    and images_per_second, days. A rank's memory is that of its largest micro-batch."""
    with torch.device("meta"):
        network = build_network(config, images)
    parameters = sum(p.numel() for p in network.parameters())
    channels, side, _ = images.shape
    size, share = config.groups.size, config.groups.share or 0.0
    single, grouped = (2 * forward_multiply_adds(network, n, channels, side, n) / n for n in (1, size))
    flops_per_image = 3 * ((1 - share) * single + share * grouped)

    batch, ranks = config.train.global_batch, world_size
    shards, states, communication = _layout(config, ranks)
    per_rank = config.train.micro_batch or batch // ranks
    bytes_of_number = 2 if config.precision == "bf16" else 4
    block = max(sum(p.numel() for p in block.parameters()) for block in network.blocks)
    rate = world_size * PEAK_FLOPS[config.precision] * utilisation / flops_per_image
    return {
        "parameters": parameters,
        "flops_per_step": flops_per_image * batch,
        "states": states * parameters,
        "gathered": 2 * block * bytes_of_number if shards > 1 else 0,
        "activations": bytes_of_number * network.tokens * config.model.width * per_rank * _kept_of_blocks(config),
        "communication": communication * parameters * 4,
        "images_per_second": rate,
        "days": config.train.images / rate / 86400,
    }


def _layout(config: Config, ranks: int) -> tuple[int, float, float]:
    """Return (ranks that share a copy of the weights, bytes of states and numbers sent by a rank per parameter)."""
    weights, gradients, moments = ENGINES[config.engine].shards(config, ranks)
    averages = len(config.optim.ema) + len(config.optim.power_ema)
    states = 4 * (1 + averages) / weights + 4 / gradients + 8 / moments
    copies = ranks // weights
    return weights, states, 3 * (weights - 1) / weights + 2 * (copies - 1) / copies / weights


def _kept_of_blocks(config: Config) -> float:
    """Return the numbers kept per token and channel: 17 per block; if recomputed, 1 per block and 17 for one."""
    depth, every = config.model.depth, config.activation_checkpointing
    recomputed = -(-depth // every) if every else 0
    return 17 * (depth - recomputed) + (recomputed + 17 if recomputed else 0)


def estimate_table(config: Config, images: ImageForm, world_size: int, utilisation: float) -> str:
    """Return the estimate as a readable table."""
    e = estimate(config, images, world_size, utilisation)
    memory = e["states"] * (not config.offload) + e["gathered"] + e["activations"]
    place = ", in the host's memory" if config.offload else ""
    rows = [
        ("parameters", f"{e['parameters'] / 1e6:,.1f} M"),
        ("FLOPs of a step", f"{e['flops_per_step'] / 1e12:,.1f} T"),
        (f"memory of a rank, engine={config.engine}", f"{memory / 2**30:,.2f} GiB"),
        (f"  parameters, gradients, optimizer, EMA{place}", f"{e['states'] / 2**30:,.2f} GiB"),
        ("  blocks gathered at once", f"{e['gathered'] / 2**30:,.2f} GiB"),
        ("  activations", f"{e['activations'] / 2**30:,.2f} GiB"),
        ("sent by a rank in a step", f"{e['communication'] / 2**30:,.2f} GiB"),
        (
            f"images/s on {world_size} ranks at {utilisation:.0%} of {PEAK_FLOPS[config.precision] / 1e12:.0f} TFLOP/s",
            f"{e['images_per_second']:,.0f}",
        ),
        (f"days to {config.train.images:,} images", f"{e['days']:,.2f}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value:>14}" for name, value in rows)
