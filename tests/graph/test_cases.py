"""Every known fault and every case that has to stay right, in every dialect in which it can be written."""

import copy

import pytest
from case_checks import agrees, found, make
from cases import CASES
from checking import CAPTURES, dynamo, inductor
from torch._dynamo.utils import counters
from versions import EPS

from triton_convbn import ConvBNPass


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_dynamo(case, eps):
    model, x = make(case, eps)
    agrees(case, dynamo(model), model, x)
    found(case, "dynamo")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_interpreted(case, monkeypatch):
    """Again with the generated kernels. Their interpreter rounds to bf16 by cutting off: an ulp, in the tolerance."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model, x = make(case, 1e-3)
    agrees(case, dynamo(model, kernel="triton"), model, x)
    found(case, "dynamo")
    decomposed = [key for key in counters["triton_convbn"] if key.startswith("decomposed")]
    assert bool(decomposed) == (case.name == "weight-from-bn"), "only that weight, a slice, is not the kernels'"


@pytest.mark.parametrize(
    ("dialect", "case"),
    [
        pytest.param(dialect, case, marks=[pytest.mark.slow] if dialect == "decomposed" else [])
        for dialect in CAPTURES
        for case in CASES
        if dialect not in case.skip
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_dialects(dialect, case):
    model, x = make(case, 1e-3)
    gm = CAPTURES[dialect](copy.deepcopy(model), x)
    ConvBNPass(when="always")(gm.graph)
    gm.graph.lint()
    gm.recompile()
    found(case, dialect)
    agrees(case, gm, model, x, params_of=gm)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.folded], ids=lambda case: case.name)
def test_inductor(case):
    """Where nothing folds, the graph is the one that Inductor compiles without the pass: `test_dynamo` shows it."""
    model, x = make(case, 1e-3)
    agrees(case, inductor(model), model, x)
    found(case, "dynamo")
