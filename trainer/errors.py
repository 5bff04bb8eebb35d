"""The one exception that means "the user can mend this": its message is one line with field or file, value and fix."""

from safetensors import SafetensorError

NOT_LOADED = (OSError, ValueError, RuntimeError, SafetensorError)  # what transformers and diffusers raise at bad files


class RunError(Exception):
    """A run cannot start or go on. Tools print the message as it is and exit with code 1."""

    final = True  # starting again would not help


def first_line(error: Exception) -> str:
    """What an exception of a library says, in short."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
