"""Training: config, loop, engines, checkpoints, monitoring, generation and evaluation. Knows nothing of Slurm."""
