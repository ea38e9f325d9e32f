"""The property over random programs, and over every minimal one that ever failed."""

import contextlib
import warnings
from typing import Any

import plant
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import Program
from property import DIALECTS, Invalid, check
from regressions import REGRESSIONS, Regression
from strategies import HOSTS, examples, programs

# The same examples on every run: a failure in CI is one of the change that it tests. `make fuzz` draws new ones.
QUICK = settings(
    max_examples=350, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@QUICK
@given(examples())
def test_equal_or_untouched(example: tuple[Program, str, str, dict[str, Any]]) -> None:
    program, dialect, host, options = example
    with contextlib.suppress(Invalid):
        check(program, dialect, host, **options)


@settings(QUICK, max_examples=8)
@given(programs(), st.sampled_from(["exported", "exported, decomposed"]))
def test_exported(program: Program, dialect: str) -> None:
    with contextlib.suppress(Invalid):
        check(program, dialect)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("regression", REGRESSIONS, ids=lambda each: each.what)
def test_what_once_failed(regression: Regression, host: str) -> None:
    """In its own dialect, and in the others, where they can say it."""
    check(regression.program, regression.dialect, host)
    for dialect in DIALECTS:
        if "exported" not in dialect:
            with contextlib.suppress(Invalid):
                check(regression.program, dialect, host)


@pytest.mark.slow
def test_without_a_bug_nothing_is_found() -> None:
    """What the tests below find is the bug, and no error of their own: these are the same examples."""
    assert plant.hunt(None, limit=1000) is None


@pytest.mark.slow
@pytest.mark.parametrize("bug", plant.BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_found(bug: plant.Bug) -> None:
    """By the same examples as above, and without the time that shrinking takes."""
    found = plant.hunt(bug, limit=1000)
    assert found is not None, f"{bug.name} is not found"


def test_programs_are_written_as_what_makes_them() -> None:
    """A failing example can be pasted: `repr` gives the program back."""
    import programs as names

    for regression in REGRESSIONS:
        again = eval(repr(regression.program), vars(names) | {"torch": torch})
        assert again == regression.program
