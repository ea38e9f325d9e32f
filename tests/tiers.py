"""What `make test` leaves to `make test-slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def few(values: Iterable[Any], count: int) -> list[Any]:
    """Mark all values of a parameter but the first `count` as slow: more of the same kind."""
    return [each if index < count else pytest.param(each, marks=pytest.mark.slow) for index, each in enumerate(values)]
