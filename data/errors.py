"""Errors that the user can fix: the message is one line with the field or file, its value, and what to do."""


class UserError(Exception):
    """An error that the user can fix. Tools print only its message and exit with code 1."""

    final = True  # starting again would not help


class DataError(UserError):
    """Data cannot be read, written or used."""
