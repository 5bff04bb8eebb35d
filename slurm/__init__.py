"""Launching a callable on nodes by submitit. Knows nothing of models or data."""
