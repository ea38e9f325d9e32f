"""Check that Inductor launches the fold kernels itself, in code generated for a pretended GPU."""

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import generated
import pytest
import torch
from tiers import few
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import ir
from triton_convbn.kernels import tuned
from triton_convbn.kernels.config import KernelConfig
from triton_convbn.kernels.inputs import FoldInputs

import triton_convbn
from triton_convbn.models import randomize
from triton_convbn.ops.library import fold_backward_op, fold_op
from triton_convbn.ops.packed_pairs import PackedPairs


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is interpreted unless a test says so."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    counters.clear()


def convolutions() -> nn.Sequential:
    """Ordinary, grouped, depthwise and 1x1 convolutions; one has a bias."""
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=4, bias=False), nn.BatchNorm2d(16, eps=1e-3), nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8),
    )  # fmt: skip
    randomize(model)
    return model.eval()


def transposed() -> nn.Sequential:
    model = nn.Sequential(nn.ConvTranspose2d(8, 16, 3, stride=2, groups=2), nn.BatchNorm2d(16), nn.ReLU())
    randomize(model)
    return model.eval()


def linear() -> nn.Sequential:
    model = nn.Sequential(nn.Flatten(), nn.Linear(8 * 144, 16), nn.BatchNorm1d(16), nn.ReLU())
    randomize(model)
    return model.eval()


def operators_in(code: generated.Generated) -> list[str]:
    """The calls of operators of this package that are left in Inductor's graph."""
    names = [str(getattr(each, "op_overload", "")) for each in code.graph.operations]
    return [name for name in names if "triton_convbn" in name]


def without_comments(text: str, mark: str = "#") -> str:
    return "\n".join(line for line in text.splitlines() if not line.strip().startswith(mark))


def launches(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip().startswith("fold_") and ".run(" in line]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("build", [convolutions, transposed, linear])
@pytest.mark.parametrize("layout", few([torch.contiguous_format, torch.channels_last], 1))
def test_no_operator_is_called(
    build: Callable[[], nn.Module], autocast: torch.dtype | None, layout: torch.memory_format
) -> None:
    x = torch.randn(2, 8, 12, 12).to(memory_format=layout)
    forward, backward = generated.of_model(build().to(memory_format=layout), x, train=True, autocast=autocast)
    for code in (forward, backward):
        assert operators_in(code) == []
        assert "torch.ops.triton_convbn" not in without_comments(code.text)
    # In forward a fold in fp32 that is no copy is left to the kernel after the convolution.
    assert len(launches(forward.text)) == (1 if autocast or build is linear else len(launches(forward.text)))
    assert [line.startswith("fold_backward") for line in launches(backward.text)].count(True) == 1
    assert not [key for key in counters["triton_convbn"] if key.startswith(("operator:", "decomposed:"))]


def test_a_batch_that_changes() -> None:
    """Sizes of activations may be symbols, those of parameters are not."""
    model = convolutions()
    x = torch.randn(2, 8, 12, 12)
    torch._dynamo.mark_dynamic(x, 0)
    codes = generated.of_model(model, x, train=True)
    assert [operators_in(code) for code in codes] == [[], []]


def test_several_warps_and_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tuned configuration says how many threads a kernel has, and how many pairs go into a launch."""
    monkeypatch.setattr(tuned, "config_for", lambda specs, device: KernelConfig(threads=256, pairs_per_launch=2))
    x = torch.randn(2, 8, 12, 12)
    forward, _ = generated.of_model(convolutions(), x, train=True, autocast=torch.bfloat16)
    assert len(launches(forward.text)) == 2
    assert "'num_warps': 8" in forward.text


def test_what_a_kernel_does_not_take_calls_the_operator() -> None:
    """A folded weight whose strides no kernel writes; it is counted, with the reason."""
    weight = torch.randn(4, 3, 3, 3).transpose(2, 3)
    pair = FoldInputs(weight, None, torch.rand(4), None, torch.randn(4), torch.rand(4), 1e-5)
    text = generated.of_operator(fold_op, PackedPairs.pack([pair]))
    assert "torch.ops.triton_convbn.fold.default" in text
    (reason,) = [key for key in counters["triton_convbn"] if key.startswith("operator:")]
    assert "strides" in reason


# ---- values --------------------------------------------------------------------------------------------------------


def random_pairs(dtype: torch.dtype, out: torch.dtype, last: bool) -> list[FoldInputs]:
    torch.manual_seed(0)

    def pair(*shape: int, channels: int, **static: Any) -> FoldInputs:
        weight = torch.randn(shape, dtype=torch.float64).to(dtype)
        if last and weight.ndim == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        vectors = [torch.randn(channels, dtype=torch.float64).to(dtype) for _ in range(4)]
        variance = torch.rand(channels, dtype=torch.float64).add(0.1).to(dtype)
        prescale = out == torch.float16
        return FoldInputs(weight, *vectors, variance, 1e-3 / 3, out_dtype=out, prescale=prescale, **static)

    return [
        pair(16, 5, 3, 3, channels=16),
        pair(8, 16, channels=8),
        pair(6, 4, 3, 3, channels=12, transposed=True, groups=3),
        pair(12, 1, 3, 3, channels=12)._replace(bias=None, bn_weight=None),
    ]


MIXES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
]


def tensors_of(arguments: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tuple(arguments), is_leaf=lambda value: isinstance(value, Tensor))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("dtype", "out"), MIXES)
def test_generated_code_has_the_operators_bits(
    dtype: torch.dtype, out: torch.dtype, last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels that Inductor writes into its code, interpreted, against the operators, interpreted too."""
    columns = PackedPairs.pack(random_pairs(dtype, out, last))
    forward = generated.of_operator(fold_op, columns)
    count = len(columns.weights)
    like = [tensor for pair in columns.unpack() for tensor in (pair.weight, pair.running_mean)]
    grads = [torch.randn(tensor.shape).to(out) for tensor in like]
    given = [3] * count
    wanted = [0b1111 if present == 7 else 0b1001 for present in columns.present]
    with monkeypatch.context() as inside:
        inside.setenv("TRITON_INTERPRET", "1")
        folded = fold_op(*columns)
    arguments = (grads, given, wanted, folded[2 * count :], *columns)
    backward = generated.of_operator(fold_backward_op, arguments)
    for text in (forward, backward):
        assert "torch.ops.triton_convbn" not in without_comments(text)
    found = generated.run(forward, tensors_of(columns), tmp_path, monkeypatch)
    gradients = generated.run(backward, tensors_of(arguments), tmp_path, monkeypatch)
    for ours, expected in ((found, folded), (gradients, fold_backward_op(*arguments))):
        assert len(ours) == len(expected)
        for one, other in zip(ours, expected, strict=True):
            assert one.stride() == other.stride()
            assert torch.equal(one, other)


aten = torch.ops.aten


@pytest.mark.parametrize(
    ("size", "view"),
    [
        ((3, 2, 8), (aten.view.default, [6, 8])),
        ((24,), (aten.slice.Tensor, 0, 0, 8)),
        ((24,), (aten.slice.Tensor, 0, 16, 24)),
        ((3, 8), (aten.select.int, 0, 1)),
    ],
    ids=["reshaped", "beginning", "end", "row"],
)
def test_a_view_is_not_made(
    size: tuple[int, ...], view: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel adds to a pointer. The gradient of a bias is a view here, of more memory or of another shape."""
    _, pair, *_ = random_pairs(torch.float32, torch.float32, last=False)
    columns = PackedPairs.pack([pair])
    grads = [torch.randn(8, 16), torch.randn(size)]
    function, *more = view
    text = generated.of_operator(fold_backward_op, (grads, [3], [0b1111], [], *columns), views={1: view})
    (line,) = launches(text)
    assert "reinterpret_tensor" not in line
    found = generated.run(text, tensors_of((grads, *columns)), tmp_path, monkeypatch)
    seen = [grads[0], function(grads[1], *more)]
    for one, other in zip(found, fold_backward_op(seen, [3], [0b1111], [], *columns), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("autocast", [None, torch.float16], ids=["fp32", "fp16"])
def test_backward_writes_no_bias(autocast: torch.dtype | None) -> None:
    """Its fold reads weight, bn_weight and variance, with prescale the BatchNorm's bias too. It writes W' and all q."""
    x = torch.randn(2, 8, 12, 12)
    _, backward = generated.of_model(convolutions(), x, train=True, autocast=autocast)
    (fold_again,) = [line for line in launches(backward.text) if not line.startswith("fold_backward")]
    pairs = int(fold_again.split("_")[1])
    inputs, outputs = (re.findall(rf"\b{name}\d+", fold_again) for name in ("primals_", "buf"))
    assert len(inputs) == pairs * (4 if autocast else 3)
    assert len(outputs) == pairs + (autocast is not None)


@pytest.mark.parametrize("out", [torch.float32, torch.float16])
def test_biases_that_nothing_reads_are_not_written(
    out: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = PackedPairs.pack(random_pairs(torch.float32, out, False))
    with monkeypatch.context() as inside:
        inside.setenv("TRITON_INTERPRET", "1")
        folded = fold_op(*columns)
    read = [index for index in range(len(folded)) if index not in (1, 5, 7)]  # of the biases the second pair's alone
    text = generated.of_operator(fold_op, columns, read)
    assert set(re.findall(r"\bout_bias_\d+", text)) == {"out_bias_1"}
    assert len(re.findall(r"= empty_strided_cuda", text)) == len(columns.weights) + 1  # the vectors are in one buffer
    found = generated.run(text, tensors_of(columns), tmp_path, monkeypatch)
    assert all(map(torch.equal, found, [folded[index] for index in read]))


# ---- deployment ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    find_spec("torch._inductor.runtime.triton_lazy_compile") is None,
    reason="it runs kernels to generate C++",
)
def test_cpp_wrapper_launches_the_kernels() -> None:
    options = {"cpp_wrapper": True, "triton.autotune_at_compile_time": False}
    x = torch.randn(2, 8, 12, 12)
    forward, backward = generated.of_model(convolutions(), x, train=True, autocast=torch.bfloat16, inductor=options)
    assert "call_fold_4_0(" in forward.text
    assert "call_fold_backward_4_" in backward.text
    for code in (forward, backward):
        assert "triton_convbn" not in without_comments(code.text, "//")


def test_ahead_of_time_on_a_gpu_has_no_python_operator() -> None:
    """Only a fallback of Inductor's graph can become a call of a Python operator, and none is ours."""
    x = torch.randn(2, 8, 12, 12)
    (code,) = generated.of_model(convolutions(), x, "triton_convbn_always", autocast=torch.bfloat16)
    assert operators_in(code) == []
    assert [type(each) for each in code.graph.operations].count(ir.UserDefinedTritonKernel) == 1
    assert "fold_4_0.run(" in code.text


@pytest.mark.slow
def test_ahead_of_time_on_the_cpu(tmp_path: Path) -> None:
    """The package that comes out holds no operator of this package, and returns what the model returns."""
    model, x = convolutions(), torch.randn(2, 8, 12, 12)
    program = torch.export.export(model, (x,))
    with triton_convbn.patched(when="always"):
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert counters["triton_convbn"]["folded"] == 4
    with ZipFile(path) as package:
        sources = [package.read(name).decode() for name in package.namelist() if name.endswith((".cpp", ".h"))]
    assert sources
    assert not [text for text in sources if "triton_convbn" in without_comments(text, "//")]
    with torch.no_grad():
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), model(x))
