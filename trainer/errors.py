"""The trainer's error that the user can fix, and the errors that libraries raise for bad files."""

from typing import Any

from safetensors import SafetensorError

from data.errors import UserError

NOT_LOADED = (OSError, ValueError, RuntimeError, SafetensorError)  # what transformers and diffusers raise for bad files


class RunError(UserError):
    """A run cannot start or continue."""


def add_facts(error: BaseException, **facts: Any) -> None:
    """Give an exception that ends a rank attributes for whatever started the rank, for instance a supervisor:

    - `step`, int: the step in which it was raised.
    - `absent_ranks`, list[int]: ranks that did not answer this one.
    - `at_fault`: "peer" if another rank broke the connection or did not answer, "port" if the port where the ranks meet
      was taken; absent if this rank is at fault.
    - `final`, True (as UserError has it): the user has to fix it.
    """
    vars(error).update(facts)


def first_line(error: BaseException) -> str:
    """Return the message of a library's exception, in short."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
