"""Errors that the user can fix: their message is one line with the field or file, its value, and what to do."""


class UserError(Exception):
    """Something that the user can fix. Tools print the message as it is and exit with code 1."""

    final = True  # starting again would not help


class DataError(UserError):
    """Data cannot be read, written or used."""
