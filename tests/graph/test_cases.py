"""Every known fault and every case that has to stay right, in every dialect in which it can be written."""

import copy

import pytest
import torch
from cases import CASES, Case
from checking import CAPTURES, TOLERANCES, check, counted, dynamo, errors, inductor, randn_like_model, results, scramble
from torch._dynamo.utils import counters
from versions import EPS

from triton_convbn import ConvBNPass


def make(case: Case, eps: float | None):
    torch.manual_seed(0)
    model = scramble(case.model().eval(), eps)
    return model, randn_like_model(case.shape, dtype=case.dtype)


def agrees(case: Case, run, model, x, params_of=None) -> None:
    if not case.trains:
        with torch.no_grad():
            want = results(copy.deepcopy(model).double(), model, x.double())
            got = results(run, params_of or model, x)
        for name, error in errors(got, want).items():
            assert error < TOLERANCES[x.dtype], f"{name}: {error:.2e}"
    elif case.name.startswith("autocast"):  # an fp64 model would be cast to bf16 too: compare with eager as it is
        eager = copy.deepcopy(model)
        want = results(eager, eager, x)
        for name, error in errors(results(run, params_of or model, x), want).items():
            assert error < TOLERANCES[torch.bfloat16], f"{name}: {error:.2e}"
    else:
        check(run, model, x, params_of)


def found(case: Case, dialect: str) -> None:
    folded, declined = counted()
    want_folded, want_declined = case.expected(dialect)
    assert folded == want_folded, declined
    assert sorted(declined) == sorted({reason.value for reason in want_declined})
    assert sum(declined.values()) == len(want_declined)


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
    [(dialect, case) for dialect in CAPTURES for case in CASES if dialect not in case.skip],
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_inductor(case):
    model, x = make(case, 1e-3)
    agrees(case, inductor(model), model, x)
    found(case, "dynamo")
