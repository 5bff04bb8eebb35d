"""The generative model: networks, paths from noise to data, losses, samplers, guidance. Knows nothing of ranks."""
