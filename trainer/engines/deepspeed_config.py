"""DeepSpeed's configuration, derived from our fields, so that nothing is set twice."""

from typing import Any

from trainer.engines.config import EngineConfig, OptimConfig

BUCKET = 3_000_000  # numbers sent or held at once: half of what DDP sends; DeepSpeed's default of 5e8 takes 2 GB
GROUP = 20_000_000  # weights that AdamW updates, and ranks gather, at once: about one block of DiT-XL
# DeepSpeed's keys that duplicate a field of ours, and that field
_OURS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "fp16": "precision",
    "bf16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "activation_checkpointing": "activation_checkpointing",
    "compile": "compile",
    "zero_optimization.stage": "zero",
    "zero_optimization.stage3_param_persistence_threshold": "zero",
}


def deepspeed_config(config: EngineConfig, optim: OptimConfig) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`: from our fields, and the further keys of `config.deepspeed`.
    Raise ValueError if one of those duplicates a field of ours."""
    zero = {"stage": config.zero, "reduce_bucket_size": BUCKET, "allgather_bucket_size": GROUP}
    if config.zero == 3:
        zero |= {f"stage3_{name}": BUCKET for name in ("prefetch_bucket_size", "max_live_parameters")}
        zero |= {"stage3_max_reuse_distance": 0}
        zero |= {"sub_group_size": BUCKET}  # DeepSpeed makes a flat copy of a sub-group's gradients
        zero |= {"stage3_param_persistence_threshold": 0}  # the EMA is swapped in shard by shard
    derived = {
        "train_micro_batch_size_per_gpu": 1,  # a formality: our loader makes the batches, our loop says when to step
        "gradient_clipping": (optim.clip or 0.0) if config.zero else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    if config.precision == "bf16":
        exact = {"lower_precision_safe_modules": []}  # the gradients of modules listed here would be reduced in bf16
        derived["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", **exact}
    return _merged(derived, config.deepspeed)


def _merged(derived: dict[str, Any], extra: dict[str, Any], above: str = "") -> dict[str, Any]:
    merged = dict(derived)
    for key, value in extra.items():
        name = above + key
        if name in _OURS:
            raise ValueError(f"deepspeed.{name}={value}: is derived from {_OURS[name]}; set that, and leave this out")
        inner = derived.get(key, {})
        if isinstance(value, dict) and isinstance(inner, dict):
            value = _merged(inner, value, name + ".")
        merged[key] = value
    return merged
