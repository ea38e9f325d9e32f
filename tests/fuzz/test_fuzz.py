"""Check the property over random programs, and over every minimal one that ever failed."""

import contextlib
import warnings
from dataclasses import replace
from typing import Any

import plant
import pytest
import torch
from comparison import exact_outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import Program
from property import DIALECTS, Invalid, check
from regressions import REGRESSIONS, Regression, pair
from strategies import HOSTS, Example, examples, programs
from tiers import few
from versions import TORCH

# The same examples in every run: a failure in CI comes from the change that it tests. `make fuzz` draws new ones.
SETTINGS = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("count", few([100, 350], 1))
def test_equal_or_untouched(count: int) -> None:
    @settings(SETTINGS, max_examples=count)
    @given(examples())
    def of_any_example(example: Example) -> None:
        program, dialect, host, options = example
        with contextlib.suppress(Invalid):
            check(program, dialect, host, **options)

    of_any_example()


@pytest.mark.slow
@settings(SETTINGS, max_examples=8)
@given(programs(), st.sampled_from(["exported", "exported, decomposed"]))
def test_exported(program: Program, dialect: str) -> None:
    with contextlib.suppress(Invalid):
        check(program, dialect)


@pytest.mark.parametrize("host", few(HOSTS, 1))
@pytest.mark.parametrize("regression", REGRESSIONS, ids=lambda each: each.what)
def test_regression(regression: Regression, host: str) -> None:
    """Check it in its own dialect, and in every other that can express it."""
    if regression.since > TORCH:
        pytest.skip(f"torch {TORCH} does not capture it")
    check(regression.program, regression.dialect, host, **regression.options)
    for dialect in DIALECTS:
        if "exported" not in dialect:
            with contextlib.suppress(Invalid):
                check(regression.program, dialect, host, **regression.options)


@pytest.mark.parametrize("bug", plant.BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_planted_where_the_code_is(bug: plant.Bug) -> None:
    with plant.planted(bug):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("bug", [bug for bug in plant.BUGS if not bug.rare], ids=lambda bug: bug.name)
def test_a_planted_bug_is_found(bug: plant.Bug) -> None:
    """The example that finds it passes without the bug, else `hunt` raises. It is not shrunk."""
    found = plant.hunt(bug)
    assert found is not None, f"{bug.name} is not found"


def test_exact_values_of_a_quantized_weight() -> None:
    """Rounding is judged by them. Such a weight has no conversion of its own."""
    program = pair()
    tensors = {name: spec._replace(dtype="float32") for name, spec in program.tensors.items()}
    exact = exact_outcome(replace(program, tensors=tensors | {"w": tensors["w"]._replace(subclass="quantized")}))
    assert exact is not None
    assert exact.outputs


def test_repr_makes_the_program_again() -> None:
    """A failing example can be pasted."""
    import programs as names

    for regression in REGRESSIONS:
        again = eval(repr(regression.program), vars(names) | {"torch": torch})
        assert again == regression.program
