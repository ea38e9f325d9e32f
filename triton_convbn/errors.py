"""Errors that the command line shows as one line."""

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """The user can correct this. The message says how. Exit code 2."""


@contextmanager
def usage_error_from(words: str, hint: str = "") -> Iterator[None]:
    """Turn an OSError into a UsageError: "WORDS: what the system says; HINT"."""
    try:
        yield
    except OSError as error:
        raise UsageError("; ".join(filter(None, (f"{words}: {error.strerror or error}", hint)))) from error
