"""The exception of this package that means "the user can fix this": one line with option, value and what to do."""


class LaunchError(Exception):
    """A job cannot be submitted, or failed. Tools print the message as it is and exit with code 1."""
