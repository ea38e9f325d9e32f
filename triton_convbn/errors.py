"""Errors that the command line shows as one line."""

from collections.abc import Iterable, Sequence


class UsageError(Exception):
    """The user can correct this. The message says how. Exit code 2."""


def choose(what: str, given: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return the given names, each once. Raises: UsageError for an unknown name; `what` says what it is a name of."""
    known = list(known)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise UsageError(f"no such {what}: {', '.join(unknown)}; choose from {', '.join(known)}")
    return list(dict.fromkeys(given))
