"""The one exception of this package that means "the user can mend this": one line with field or file, value and fix."""


class DataError(Exception):
    """Data cannot be read, written or used. Tools print the message as it is and exit with code 1."""

    final = True  # trying again would not help

    def __init__(self, message: str) -> None:
        # the worker of a DataLoader passes it on inside a traceback, whose last line it is
        super().__init__(message.strip().rpartition("\n")[2].removeprefix(f"{__name__}.DataError: "))
