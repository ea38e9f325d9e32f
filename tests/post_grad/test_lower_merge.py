"""Check that Inductor launches the kernels that merge sums, in code generated for a pretended GPU."""

from pathlib import Path
from typing import Any

import generated
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from triton_convbn.ops.merge_library import merge_backward_op, merge_op
from triton_convbn.ops.reference import FLOATING


def arguments(dtype: torch.dtype, last: bool) -> list[Any]:
    torch.manual_seed(0)
    weights = [torch.randn(size).to(dtype) for size in ((8, 8, 3, 3), (8, 8, 1, 1), (12, 1, 3, 3), (12, 1, 1, 3))]
    if last:
        weights = [weight.contiguous(memory_format=torch.channels_last) for weight in weights]
    number = FLOATING.index(dtype)
    return [weights, [torch.randn(3, 8), torch.randn(2, 12)], [2, 2], [number, number]]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_generated_code_has_the_operators_bits(
    dtype: torch.dtype, last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = arguments(dtype, last)
    grads = [torch.randn(8, 8, 3, 3).to(dtype), torch.randn(12, 1, 3, 3).to(dtype)]
    for operator, given, tensors in (
        (merge_op, packed, [*packed[0], *packed[1]]),
        (merge_backward_op, [grads, [7, 6], *packed], [*grads, *packed[0], *packed[1]]),
    ):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        text = generated.of_operator(operator, given)
        assert "torch.ops.triton_convbn" not in text
        found: list[Tensor] = generated.run(text, tensors, tmp_path, monkeypatch)
        for one, other in zip(found, operator(*given), strict=True):
            assert one.equal(other)
            assert one.stride() == other.stride()


def test_what_a_kernel_does_not_take_calls_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides that no kernel reads; counted, with the reason."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    counters.clear()
    weights, *rest = arguments(torch.float32, last=False)
    weights[0] = weights[0].transpose(2, 3)
    assert "torch.ops.triton_convbn.merge.default" in generated.of_operator(merge_op, [weights, *rest])
    (reason,) = [key for key in counters["triton_convbn"] if key.startswith("operator:")]
    assert "strides" in reason
