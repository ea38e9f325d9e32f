"""Errors that the command line shows as one line."""


class UsageError(Exception):
    """The user can correct this. The message says how. Exit code 2."""
