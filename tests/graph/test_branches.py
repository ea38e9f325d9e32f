"""Sums of branches: one convolution with the values and gradients of the model, or a decline with its reason."""

import copy
import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from branch_cases import (
    MERGED,
    C,
    Factor,
    assert_same,
    blocks,
    conv,
    conv_bn,
    convolutions,
    gradients,
    made,
    rewritten,
)
from cases import Calls
from checking import CAPTURES, scramble
from torch import Tensor, nn
from torch._dynamo.utils import counters

from triton_convbn import explain, fold_exported
from triton_convbn.graph.reasons import Reason


@pytest.mark.parametrize("codegen", [False, True])
@pytest.mark.parametrize("name", MERGED)
def test_value_and_gradients(name: str, codegen: bool) -> None:
    make, merged = MERGED[name]
    model, x = made(make)
    run, findings, graph = rewritten(model, x, codegen=codegen)
    assert [len(branch.convs) for branch in findings.sums] == [merged]
    assert convolutions(graph) == 1
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert counters["triton_convbn"]["folded"] == norms
    assert not any(key.startswith("declined:") for key in counters["triton_convbn"])
    assert_same(gradients(run, model, x), gradients(model, model, x))


@pytest.mark.parametrize("dialect", CAPTURES)
@pytest.mark.parametrize("name", MERGED)
def test_other_dialects(name: str, dialect: str) -> None:
    make, merged = MERGED[name]
    model, x = made(make)
    with torch.no_grad():
        expected = model(x)
        run, findings, graph = rewritten(model, x, dialect)
        assert [len(branch.convs) for branch in findings.sums] == [merged]
        assert convolutions(graph) == 1
        assert_same({"y": run(x)}, {"y": expected})


def written_between(m: Calls, x: Tensor) -> Tensor:
    first = m.a(x)
    x.mul_(2)
    return first + m.b(x)


def read_elsewhere(m: Calls, x: Tensor) -> Tensor:
    first = m.a(x)
    return first + m.b(x) + first.relu()


def weight_written(m: Calls, x: Tensor) -> Tensor:
    first = m.a(x)
    with torch.no_grad():
        m.a[0].weight.mul_(2)
    return first + m.b(x)


def grows_in(call: Callable[[Calls, Tensor], Tensor]) -> Callable[[Calls, Tensor], Tensor]:
    """Add a convolution whose kernel holds both others, but not to their sum."""
    return lambda m, x: call(m, m.a(x) + m.b(x)) + m.c(x)


def growing() -> dict[str, nn.Module]:
    return {"a": conv_bn((1, 3), (0, 1)), "b": conv_bn((3, 1), (1, 0)), "c": conv_bn(), "norm": nn.BatchNorm2d(C)}


DECLINED: dict[str, tuple[Callable[[], nn.Module], Reason]] = {
    "other_input": (lambda: Calls(lambda m, x: m.a(x) + m.b(x.relu()), a=conv_bn(), b=conv_bn()), Reason.OTHER_INPUT),
    "residual": (lambda: Calls(lambda m, x: m.a(x.relu()) + x, a=conv_bn()), Reason.OTHER_INPUT),
    "other_padding": (
        lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv(stride=2), b=conv((2, 3), stride=2)),
        Reason.OTHER_GRID,
    ),
    "other_dilation": (
        lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv_bn(3, 1), b=conv_bn(3, 2, dilation=2)),
        Reason.OTHER_GRID,
    ),
    "shifted": (  # a kernel of 4 at dilation 2 has its middle between two elements, that of 3 has not
        lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv_bn(4, 3, dilation=2), b=conv_bn(3, 2, dilation=2)),
        Reason.OTHER_GRID,
    ),
    "strided_input": (
        lambda: Calls(lambda m, x: m.a(x) + x, a=conv_bn((7, 8), 0)),
        Reason.OTHER_GRID,
    ),
    "dense_and_depthwise": (
        lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv_bn(groups=C), b=conv_bn(1, 0)),
        Reason.OTHER_GROUPS,
    ),
    "kernel_grows": (
        lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv_bn((1, 7), (0, 3)), b=conv_bn((7, 1), (3, 0))),
        Reason.KERNEL_GROWS,
    ),
    "kernel_grows_in_a_norm": (lambda: Calls(grows_in(lambda m, y: m.norm(y)), **growing()), Reason.KERNEL_GROWS),
    "kernel_grows_in_a_factor": (lambda: Calls(grows_in(lambda m, y: 2 * y), **growing()), Reason.KERNEL_GROWS),
    "kernel_grows_in_a_copy": (lambda: Calls(grows_in(lambda m, y: y.contiguous()), **growing()), Reason.KERNEL_GROWS),
    "kernel_grows_and_is_read": (lambda: Calls(grows_in(lambda m, y: y * y.mean()), **growing()), Reason.KERNEL_GROWS),
    "read_elsewhere": (lambda: Calls(read_elsewhere, a=conv_bn(), b=conv_bn()), Reason.BRANCH_SHARED),
    "twice": (lambda: Calls(lambda m, x: (y := m.a(x)) + y, a=conv_bn()), Reason.BRANCH_SHARED),
    "alpha": (lambda: Calls(lambda m, x: torch.add(m.a(x), m.b(x), alpha=2), a=conv_bn(), b=conv_bn()), Reason.ALPHA),
    "broadcast_channels": (
        lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv_bn(outputs=C), b=conv(outputs=1)),
        Reason.BROADCAST,
    ),
    "broadcast_input": (lambda: Calls(lambda m, x: m.a(x) + x, a=nn.Conv2d(1, C, 3, padding=1)), Reason.BROADCAST),
    "input_written": (lambda: Calls(written_between, a=conv_bn(), b=conv_bn()), Reason.MUTATED),
    "weight_written": (lambda: Calls(weight_written, a=conv_bn(), b=conv_bn()), Reason.MUTATED),
}


@pytest.mark.parametrize("codegen", [False, True])
@pytest.mark.parametrize("name", DECLINED)
def test_declines(name: str, codegen: bool) -> None:
    make, reason = DECLINED[name]
    model, x = made(make)
    x = x[:, :1] if name == "broadcast_input" else x
    with torch.no_grad():
        expected = copy.deepcopy(model)(x.clone())
        run, findings, _ = rewritten(copied := copy.deepcopy(model), x.clone(), codegen=codegen)
        assert not findings.sums
        assert reason in [decline.reason for decline in findings.sum_declines]
        copied.load_state_dict(model.state_dict())  # its forward may have written to it
        assert_same({"y": run(x.clone())}, {"y": expected})


NOT_LINEAR: dict[str, Callable[[], nn.Module]] = {
    "gate": lambda: Calls(lambda m, x: m.a(x) * x.mean((2, 3), keepdim=True) + m.b(x), a=conv_bn(), b=conv_bn()),
    "map_of_factors": lambda: Calls(lambda m, x: m.g(m.a(x)) + m.b(x), a=conv_bn(), b=conv_bn(), g=Factor((C, 7, 8))),
    "factor_along_width": lambda: Calls(lambda m, x: m.g(m.a(x)) + m.b(x), a=conv_bn(), b=conv_bn(), g=Factor((8,))),
    "constant": lambda: Calls(lambda m, x: m.a(x) + 1.0 + m.b(x), a=conv_bn(), b=conv_bn()),
    "reflected": lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv_bn(padding_mode="reflect"), b=conv_bn(1, 0)),
    "transposed": lambda: Calls(
        lambda m, x: m.a(x) + m.b(x), a=nn.ConvTranspose2d(C, C, 3, padding=1), b=conv_bn(1, 0)
    ),
    "training": lambda: Calls(lambda m, x: m.a(x) + m.norm(x), a=conv_bn(), norm=nn.BatchNorm2d(C).train()),
    "instance_norm": lambda: Calls(lambda m, x: m.a(x) + m.norm(x), a=conv_bn(), norm=nn.InstanceNorm2d(C)),
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_no_branch_stays(name: str) -> None:
    model, x = made(NOT_LINEAR[name])
    for module in model.modules():
        if name == "training" and isinstance(module, nn.BatchNorm2d) and module is model.norm:
            module.train()
    expected = copy.deepcopy(model)(x)
    run, findings, _ = rewritten(model, x)
    assert not findings.sums
    if name != "training":
        assert_same({"y": run(x).detach()}, {"y": expected.detach()})


def test_numbers_that_dynamo_captures_as_symbols() -> None:
    """With ``dynamic=True`` it tries so first. The merged sum is guarded by them, and another value is not merged."""

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.share = conv_bn(), conv_bn(1, 0), 0.75

        def forward(self, x: Tensor) -> Tensor:
            return self.share * self.a(x) + self.b(x)

    model, x = made(Weighted)
    run = torch.compile(model, backend="triton_convbn_eager", dynamic=True)
    for share, eps in ((0.75, 1e-3), (0.25, 0.5)):
        model.share = share
        model.a[1].eps = eps
        assert_same(gradients(run, model, x), gradients(model, model, x))
    assert counters["triton_convbn"]["merged"] == 1
    assert run(x[:1]).shape == (1, *x.shape[1:])


def test_part_of_a_sum() -> None:
    """The terms of one input merge where they are a sum by themselves. The rest of the sum stays."""
    model, x = made(lambda: Calls(lambda m, x: (m.a(x) + m.b(x)) + x.relu(), a=conv_bn(), b=conv_bn(1, 0)))
    run, findings, graph = rewritten(model, x)
    assert len(findings.sums) == 1
    assert [decline.reason for decline in findings.sum_declines] == [Reason.OTHER_INPUT]
    assert convolutions(graph) == 1
    assert_same(gradients(run, model, x), gradients(model, model, x))


def test_chain_of_blocks() -> None:
    """A block that reads another block's output."""
    block = MERGED["repvgg"][0]
    model, x = made(lambda: nn.Sequential(block(), nn.ReLU(), block(), block()))
    for codegen in (False, True):
        torch._dynamo.reset()
        run, findings, graph = rewritten(model, x, codegen=codegen)
        assert len(findings.sums) == 3
        assert convolutions(graph) == 3
        assert_same(gradients(run, model, x), gradients(model, model, x))


def test_convolution_of_a_convolution() -> None:
    """y is linear in x as well, but it is the input of the other term."""
    model, x = made(lambda: Calls(lambda m, x: m.b(y := m.a(x)) + y, a=conv_bn(), b=conv_bn()))
    run, findings, graph = rewritten(model, x)
    assert [len(branch.convs) for branch in findings.sums] == [1]
    assert convolutions(graph) == 2
    assert_same(gradients(run, model, x), gradients(model, model, x))


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims: int) -> None:
    layer, norm = (nn.Conv1d, nn.BatchNorm1d) if dims == 1 else (nn.Conv3d, nn.BatchNorm3d)
    torch.manual_seed(0)
    model = Calls(
        lambda m, x: m.a(x) + m.b(x) + m.c(x),
        a=nn.Sequential(layer(C, C, 3, padding=1), norm(C)),
        b=nn.Sequential(layer(C, C, 1, bias=False), norm(C)),
        c=norm(C),
    )
    model = scramble(model.eval(), 1e-3).double()
    x = torch.randn(2, C, *(4,) * dims, dtype=torch.float64)
    run, findings, _ = rewritten(model, x)
    assert len(findings.sums) == 1
    assert_same(gradients(run, model, x), gradients(model, model, x))


def test_explain_has_a_row_for_each_block() -> None:
    model, x = made(blocks)
    explanation = explain(model, x)
    assert [(row.batch_norm, row.conv) for row in explanation.rows] == [
        ("0.a.1, 0.b.1, 0.c", "0.a.0, 0.b.0"),
        ("2.a.1, 2.b.1, 2.norm", "2.a.0, 2.b.0"),
        ("4.a.1, 4.norm", "4.a.0, 4.b"),
    ]
    assert explanation.rows[1].detail == "4 branches become one convolution"
    assert (explanation.folded, explanation.calls) == (8, 8)
    assert "8 of 8 fold" in str(explanation)


@pytest.mark.parametrize("export", [False, True], ids=["module", "program"])
def test_explain_names_the_sums_that_stay(export: bool) -> None:
    model, x = made(lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv_bn(), b=conv_bn(groups=2)))
    explanation = explain(torch.export.export(model, (x,)) if export else model, x)
    assert (explanation.folded, explanation.calls) == (2, 2)
    (stays,) = explanation.unmerged
    assert (stays.reason, stays.why, stays.detail) == ("other_groups", Reason.OTHER_GROUPS.text, "b.0")
    assert f"the sum is not merged: other_groups: {stays.why} (b.0)" in str(explanation)


def test_a_residual_is_no_sum_of_branches() -> None:
    model, x = made(lambda: Calls(lambda m, x: m.b(m.a(x).relu()) + x, a=conv_bn(), b=conv_bn()))
    assert explain(model, x).unmerged == ()


def test_declined_sums_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model, x = made(lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv_bn(), b=conv_bn(groups=2)))
    with caplog.at_level(logging.DEBUG, "triton_convbn"):
        rewritten(model, x)
    assert Reason.OTHER_GROUPS.text in caplog.text


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fold_exported_merges_once(dtype: torch.dtype, decomposed: bool) -> None:
    model, x = made(blocks, torch.float32)
    model, x = model.to(dtype), x.to(dtype)
    program = torch.export.export(model, (x,))
    program = program.run_decompositions() if decomposed else program
    folded = fold_exported(program)
    assert convolutions(folded.graph_module.graph) == 3
    assert set(folded.state_dict) == {
        f"{path}.folded_{kind}" for path in ("0", "2", "4.norm") for kind in ("weight", "bias")
    }
    exact = copy.deepcopy(model).double()(x.double())
    error, eager = ((run(x).double() - exact).abs().max() for run in (folded.module(), model))
    assert error <= eager + 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert explain(program).folded == 8


def test_fold_exported_leaves_a_sum_of_computed_weights() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_bn(), conv(1, 0)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + F.conv2d(x, self.b.weight * x.mean())

    model, x = made(Computed)
    folded = fold_exported(torch.export.export(model, (x,)))
    assert convolutions(folded.graph_module.graph) == 2
    assert_same({"y": folded.module()(x).detach()}, {"y": model(x).detach()})


class Doubled(Tensor):
    """Multiplies what it is a part of by two, which no convolution knows."""


def test_subclasses_decline() -> None:
    model, x = made(MERGED["repvgg"][0])
    model.b[0].weight = nn.Parameter(model.b[0].weight.detach().as_subclass(Doubled))
    _, findings, _ = rewritten(model, x, "modules")
    assert not findings.sums


def test_long_chains() -> None:
    """Nothing recurses once for each operation of a chain."""

    def chain(m: Calls, x: Tensor) -> Tensor:
        y = m.a(x)
        for _ in range(600):
            y = y * 1.0001
        for _ in range(600):
            y = 1.0001 * y + 0.001 * x
        for _ in range(600):
            y = y + x
        return y

    model, x = made(lambda: Calls(chain, a=conv_bn()))
    with torch.no_grad():
        run, _, _ = rewritten(model, x, "modules")
        assert_same({"y": run(x)}, {"y": model(x)})
