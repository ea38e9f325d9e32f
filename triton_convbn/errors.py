"""Errors that the command line shows as one line."""

from collections.abc import Iterable, Iterator, Sequence
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


def pip_install(extra: str) -> str:
    """Return the command that installs the packages of an extra. It needs a clone, as no index has this package."""
    return f"pip install '.[{extra}]' in your clone"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def choose(what: str, given: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return the given names, each once. Raises: UsageError for an unknown name; `what` says what it is a name of."""
    known = list(known)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise UsageError(f"no such {what}: {', '.join(unknown)}; choose from {', '.join(known)}")
    return list(dict.fromkeys(given))
