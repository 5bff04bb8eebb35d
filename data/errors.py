"""The one exception of this package that means "the user can mend this": one line with field or file, value and fix."""


class DataError(Exception):
    """Data cannot be read, written or used. Tools print the message as it is and exit with code 1."""
