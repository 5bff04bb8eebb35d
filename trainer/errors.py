"""The one exception that means "the user can mend this": its message is one line with field or file, value and fix."""


class RunError(Exception):
    """A run cannot start or go on. Tools print the message as it is and exit with code 1."""
