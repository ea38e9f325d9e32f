"""`when="profitable"`: what is left alone under Inductor, and that nothing else is."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from checking import check, scramble
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

from triton_convbn import ConvBNPass, explain, patched


@pytest.fixture(autouse=True)
def uncached() -> Iterator[None]:
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield


def model() -> nn.Module:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    return scramble(nn.Sequential(*layers).eval())


def decided(net: nn.Module, context: Any = None, **options: Any) -> tuple[int, int]:
    """How many pairs were folded and how many left alone because they do not pay, in a compile by Dynamo."""
    counters.clear()
    torch._dynamo.reset()

    def backend(gm: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        ConvBNPass(**options)(gm.graph)
        gm.recompile()
        return gm.forward

    with context or nullcontext():
        torch.compile(net, backend=backend)(torch.randn(2, 3, 8, 8))
    ours = counters["triton_convbn"]
    return ours["folded"], ours["declined:does_not_pay"]


def frozen(net: nn.Module, *suffixes: str) -> nn.Module:
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.endswith(suffixes))
    return net


def test_a_trained_affine_always_folds() -> None:
    assert decided(model()) == (2, 0)
    assert decided(frozen(model(), "0.weight", "3.weight")) == (2, 0)


def test_inference_and_frozen_affine_do_not_pay() -> None:
    assert decided(model(), torch.no_grad()) == (0, 2)
    assert decided(model().requires_grad_(False)) == (0, 2)
    assert decided(frozen(model(), "1.weight", "1.bias", "4.weight", "4.bias")) == (0, 2)
    # A bias alone needs no convolution's output for its gradient.
    assert decided(frozen(model(), "1.weight", "4.weight")) == (0, 2)
    # One BatchNorm of two: each is decided by itself.
    assert decided(frozen(model(), "4.weight")) == (1, 1)


def test_always_is_always() -> None:
    assert decided(model(), torch.no_grad(), when="always") == (2, 0)
    assert decided(model().requires_grad_(False), when="always") == (2, 0)


def test_inductors_own_flag_asks_for_every_pair() -> None:
    with inductor_config.patch(efficient_conv_bn_eval_fx_passes=True):
        assert decided(model(), torch.no_grad()) == (2, 0)


@pytest.mark.slow
def test_backend_takes_inductors_flag_for_always() -> None:
    counters.clear()
    options = {"efficient_conv_bn_eval_fx_passes": True}
    with torch.no_grad():
        torch.compile(model(), backend="triton_convbn", options=options)(torch.randn(2, 3, 8, 8))
    assert counters["triton_convbn"]["folded"] == 2


def test_frozen_weights_are_folded_once_and_pay() -> None:
    with inductor_config.patch(freezing=True):
        assert decided(model(), torch.no_grad()) == (2, 0)


@pytest.mark.slow
def test_weights_that_freezing_leaves_inputs_do_not_pay() -> None:
    """With gradients enabled, or with freezing as an option of the backend, Dynamo freezes no parameter."""
    with inductor_config.patch(freezing=True):
        assert decided(model().requires_grad_(False)) == (0, 2)
    counters.clear()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model(), backend="triton_convbn", options={"freezing": True})(torch.randn(2, 3, 8, 8))
    assert (counters["triton_convbn"]["folded"], counters["triton_convbn"]["declined:does_not_pay"]) == (0, 2)


@pytest.mark.parametrize("interpret", [False, True])
def test_a_kernel_that_also_casts_pays(interpret: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast the weight is cast on every call whatever happens; a kernel folds and casts in one pass."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpret else "0")

    def decide(autocast: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
            return decided(model())

    for dtype in (torch.bfloat16, torch.float16):
        assert decide(autocast=True, dtype=dtype) == ((2, 0) if interpret else (0, 2))
    assert decide(autocast=False) == (0, 2)


def test_by_hand_every_fold_is_made() -> None:
    """A graph that no compiler has asked about may run in eager, where every BatchNorm is a pass over its input."""
    gm = torch.fx.symbolic_trace(model().requires_grad_(False))
    with torch.no_grad():
        ConvBNPass()(gm.graph)
    called = [gm.get_submodule(str(node.target)) for node in gm.graph.nodes if node.op == "call_module"]
    assert not [module for module in called if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("on_decline", ["warn", "raise"])
def test_no_complaint_where_it_could_fold(on_decline: str, recwarn: pytest.WarningsRecorder) -> None:
    assert decided(model(), torch.no_grad(), on_decline=on_decline) == (0, 2)
    assert not [warning for warning in recwarn if "BatchNorm" in str(warning.message)]


def test_explain_says_so() -> None:
    x = torch.randn(2, 3, 8, 8)
    assert [row.reason for row in explain(model(), x).rows] == ["", ""]
    with torch.no_grad():
        assert [row.reason for row in explain(model(), x).rows] == ["does_not_pay"] * 2
        with patched(when="always"):
            assert [row.reason for row in explain(model(), x).rows] == ["", ""]
    rows = explain(frozen(model(), "4.weight", "4.bias"), x).rows
    assert [(row.batch_norm, row.reason) for row in rows] == [("1", ""), ("4", "does_not_pay")]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["profitable", "always"])
def test_mixed_values(when: str) -> None:
    """One pair folds and the other stays: values and gradients are those of eager all the same."""
    net, x = frozen(model(), "4.weight", "4.bias"), torch.randn(2, 3, 8, 8)
    check(torch.compile(net, backend="triton_convbn", options={"when": when}), net, x)


@pytest.mark.slow
def test_the_mode_may_change_after_compiling() -> None:
    """One compiled model in training, then in inference: decided anew for each, values right in both."""
    net, x = model(), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(net, backend="triton_convbn")
    counters.clear()
    check(compiled, net, x)
    assert counters["triton_convbn"]["folded"] == 2
    with torch.no_grad():
        wanted: Tensor = net(x)
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-5)
    assert counters["triton_convbn"]["declined:does_not_pay"] == 2
