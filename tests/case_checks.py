"""Build the models of `cases` and check what the pass does to them."""

import copy

import torch
from cases import Case
from checking import TOLERANCES, check, counted, errors, randn_like_model, results, scramble


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
