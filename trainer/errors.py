"""The trainer's error that the user can fix, and what libraries raise at files that are not as they should be."""

from safetensors import SafetensorError

from data.errors import UserError

NOT_LOADED = (OSError, ValueError, RuntimeError, SafetensorError)  # what transformers and diffusers raise at bad files


class RunError(UserError):
    """A run cannot start or continue."""


def first_line(error: Exception) -> str:
    """Return what an exception of a library says, in short."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
