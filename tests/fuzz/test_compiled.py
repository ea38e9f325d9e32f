"""Check the property through Dynamo and AOTAutograd, and for a few programs through Inductor."""

import contextlib
import warnings
from typing import Any

import compiled
import pytest
from hypothesis import HealthCheck, given, settings
from programs import Call, P, Program, V
from property import Invalid
from regressions import REGRESSIONS, pair
from strategies import programs

from triton_convbn import explain

pytestmark = pytest.mark.slow

FEW = settings(max_examples=20, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@FEW
@given(programs())
def test_through_aot_autograd(program: Program) -> None:
    with contextlib.suppress(Invalid):
        compiled.check(program)


@pytest.mark.parametrize("regression", REGRESSIONS, ids=lambda each: each.what)
def test_regression(regression: Any) -> None:
    compiled.check(regression.program)


@pytest.mark.parametrize(
    ("write", "folds"),
    [(Call(".mul_", (P("w"), 2.0)), 0), (Call(".add_", (P("x0"), 0.5)), 1), (Call("torch.tanh", (V(0),)), 1)],
    ids=["weight", "what the input came from", "nothing"],
)
def test_writes_after_the_pair(write: Call, folds: int) -> None:
    assert compiled.check(pair(after=(write,), g=True, h=True)) == folds


def test_through_inductor() -> None:
    assert compiled.check(pair(Call(".mul_", (P("x0"), 2.0)), g=True, h=True), inductor=True) == 1


def test_explain_agrees_with_the_pass() -> None:
    from render_modules import modules

    for regression in REGRESSIONS:
        gm = modules(regression.program).gm
        x = regression.program.given()["x0"]
        explanation = explain(gm, x)
        assert all(bool(row.conv) != bool(row.reason) for row in explanation.rows)
        folded = compiled.check(regression.program)
        assert explanation.folded <= len(explanation.rows)
        assert folded <= len(explanation.rows)
