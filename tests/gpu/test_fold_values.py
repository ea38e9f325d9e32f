"""Check the folds and their gradients on the device against the fp64 oracle of `kernels.testing`.

The cases cover dtypes, layouts, addresses, sizes, devices, streams and CUDA graphs. Folds go through the operators, as
in compiled models. Each test records its figures as properties, which `gpu-check` turns into rows; errors are in ulps.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_convbn.kernels.codegen import generate
from triton_convbn.kernels.inputs import OUTPUTS, FoldInputs
from triton_convbn.kernels.kernel_call import KernelCall
from triton_convbn.kernels.offline_cases import DTYPE_MIXES
from triton_convbn.kernels.spec import Needs, PairSpec, backward_of
from triton_convbn.perf.gpu.device import by_kernel, synchronize
from triton_convbn.perf.results import Key

from triton_convbn.measure import replayable
from triton_convbn.ops.library import fold_backward, fold_op
from triton_convbn.ops.packed_pairs import PackedPairs

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

# (weight and conv bias, BatchNorm, output)
MIXES = DTYPE_MIXES | {
    "fp16_bn_fp32": ("fp16", "fp32", "fp16"),
    "fp32_to_bf16": ("fp32", "fp32", "bf16"),
    "bf16_bn_fp64": ("bf16", "fp64", "bf16"),
    "fp16_bn_bf16_to_fp32": ("fp16", "bf16", "fp32"),
}
SHAPES: dict[str, dict[str, Any]] = {
    "conv": {"rows": 33, "cols": 21, "taps": 9},
    "depthwise": {"rows": 60, "cols": 1, "taps": 9},
    "linear": {"rows": 50, "cols": 65, "taps": 1},
    "transposed_groups": {"rows": 30, "cols": 15, "taps": 9, "transposed": True, "groups": 3},
}
LAYOUTS = ("contiguous", "channels_last")
GRADIENTS = tuple(f"d_{name}" for name in Needs._fields)

modes = pytest.mark.parametrize("mode", ["forward", "backward"])
some_mixes = pytest.mark.parametrize("mix", ["fp32", "fp16", "bf16", "fp32_to_bf16"])

Check = Callable[..., None]


@pytest.fixture
def check(device: torch.device, record_property: Callable[[str, object], None]) -> Check:
    """Return a function that checks one group of pairs. Its arguments are those of `run_check`."""
    return partial(run_check, device, record_property)


def run_check(
    device: torch.device,
    record: Callable[[str, object], None],
    case: str,
    compute: Callable[[KernelCall], object],
    mode: str,
    mix: str = "fp32",
    shapes: Sequence[str] = ("conv",),
    layout: str = "contiguous",
    rerun: bool = True,
    kernel: bool = True,
    seed: int = 0,
) -> None:
    """Check the folds of a group or its gradients, and record the largest error.

    Args:
        compute: Fills the outputs of a call. Its result is kept until they have been read.
        mode: forward or backward.
        mix: A name of MIXES.
        shapes: Names of SHAPES; several form a group.
        layout: The layout of the weights.
        rerun: Compare with further calls of the operator, which must return the same bits.
        kernel: Fail if plain torch computes the fold.
    """
    metric = "fold_error" if mode == "forward" else "gradient_error"
    record("key", list(Key(case, mode=mode, dtype=mix, layout=layout)))  # plain values, which xdist can send
    pairs = [spec(name, mix, layout == "channels_last") for name in shapes]
    with by_kernel() if kernel else nullcontext():
        call = KernelCall(pairs if mode == "forward" else list(map(backward_of, pairs)), device, seed)
        kept = compute(call)
        synchronize(device)
        first = results(call)
        every = [(errors.max().item(), allowed, name) for name, errors, allowed in call.errors()]
        error, allowed, name = max(every, key=lambda each: (not each[0] <= each[1], each[0] / max(each[1], 1.0)))
        record(metric, ("ulp", error, allowed, name))
        differing: set[str] = set()
        for _ in range(2 if rerun else 0):
            operator(call)
            differing |= {name for name, found in results(call).items() if not torch.equal(found, first[name])}
        if rerun:
            record("runs_differ", ("tensors", len(differing), 0, ", ".join(sorted(differing))))
        del kept
    assert error <= allowed, name
    assert not differing


def spec(name: str, mix: str, last: bool) -> PairSpec:
    """Return a pair with every parameter."""
    weight, bn, out = MIXES[mix]
    dtypes = {"weight": weight, "bias": weight, "out": out}
    dtypes |= dict.fromkeys(("bn_weight", "bn_bias", "running_mean", "running_var"), bn)
    return PairSpec(**SHAPES[name], **dtypes, weight_last=last, out_last=last, prescale=out == "fp16", eps=1e-3)


def results(call: KernelCall) -> dict[str, Tensor]:
    """Return the outputs of a call by name."""
    names = (*OUTPUTS, *GRADIENTS)
    every = {f"{name} of pair {i}": values.get(name) for i, values in enumerate(call.values) for name in names}
    return {name: value for name, value in every.items() if value is not None}


def change(call: KernelCall, function: Callable[[Tensor], Tensor]) -> None:
    """Replace every tensor of a call by what the function returns."""

    def changed(value: Any) -> Any:
        return function(value) if isinstance(value, Tensor) else value

    call.pairs = [FoldInputs(*map(changed, pair)) for pair in call.pairs]
    call.values = [{name: changed(value) for name, value in values.items()} for values in call.values]


def operator(call: KernelCall) -> None:
    """Fold or compute the gradients with the operator. Its results replace the call's outputs."""
    packed = PackedPairs.pack(call.pairs)
    with torch.no_grad():
        if isinstance(call.specs[0], PairSpec):
            names: tuple[str, ...] = OUTPUTS
            found: Sequence[Sequence[Tensor | None]] = packed.by_pair(fold_op(*packed))
        else:
            grads = [(values["grad_weight"], values["grad_bias"]) for values in call.values]
            powers = [values["power"] for values in call.values if "power" in values]
            names, found = GRADIENTS, fold_backward(packed, grads, [Needs()] * len(grads), powers)
    for values, own in zip(call.values, found, strict=True):
        values.update(zip(names, own, strict=True))


def overwrite(call: KernelCall) -> Callable[[], None]:
    """Fill the parameters with zeros. Return a function that restores their values in place."""
    tensors = [tensor for pair in call.pairs for tensor in pair[:4] if tensor is not None]
    values = [tensor.clone() for tensor in tensors]
    torch._foreach_zero_(tensors)
    return lambda: torch._foreach_copy_(tensors, values)


def test_first(check: Check) -> None:
    """Fold once each way."""
    for mode in ("forward", "backward"):
        check("fold_first", operator, mode)


@modes
@pytest.mark.parametrize(
    ("seed", "mix", "shape", "layout"),
    [(seed, *each) for seed, each in enumerate(product(MIXES, SHAPES, LAYOUTS))],
    ids=["-".join(each) for each in product(MIXES, SHAPES, LAYOUTS)],
)
def test_dtypes(check: Check, seed: int, mix: str, shape: str, layout: str, mode: str) -> None:
    check(f"fold_{shape}", operator, mode, mix, (shape,), layout, seed=seed)


@modes
@pytest.mark.parametrize("mix", DTYPE_MIXES)
def test_on_nan(check: Check, mix: str, mode: str) -> None:
    """Launch the kernel on outputs full of NaN: it writes every element, and nothing around them."""

    def on_nan(call: KernelCall) -> None:
        call.run([(slice(None), generate(tuple(call.specs)))])
        assert call.wrong() is None

    check("fold_on_nan", on_nan, mode, mix, rerun=False)


@modes
@some_mixes
def test_misaligned(check: Check, mix: str, mode: str) -> None:
    """Fold tensors one element off an aligned address, after caches are filled for aligned ones."""

    def misaligned(call: KernelCall) -> None:
        operator(call)
        change(call, lambda tensor: torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape))
        operator(call)

    check("fold_misaligned", misaligned, mode, mix)


@modes
@some_mixes
def test_with_gaps(check: Check, mix: str, mode: str) -> None:
    """Fold weights with gaps, which plain torch does."""

    def with_gaps(call: KernelCall) -> None:
        gaps = [torch.stack([pair.weight, pair.weight], -1)[..., 0] for pair in call.pairs]
        call.pairs = [pair._replace(weight=weight) for pair, weight in zip(call.pairs, gaps, strict=True)]
        operator(call)

    check("fold_with_gaps", with_gaps, mode, mix, kernel=False)


@modes
def test_second_device(check: Check, device: torch.device, mode: str) -> None:
    """Fold tensors on a device that is not the current one. The interpreter has one device."""
    others = [index for index in range(torch.cuda.device_count()) if index != device.index]

    def second_device(call: KernelCall) -> None:
        if device.type == "cuda" and not others:
            pytest.skip("there is one GPU")
        other = torch.device("cuda", others[0]) if others else device
        change(call, lambda tensor: tensor.to(other))
        operator(call)
        synchronize(other)
        assert {value.device for value in results(call).values()} == {other}

    check("fold_second_device", second_device, mode)


@modes
def test_side_stream(check: Check, device: torch.device, mode: str) -> None:
    """Write the parameters late on a side stream: a fold launched on another stream reads them too early."""

    def side_stream(call: KernelCall) -> None:
        restore = overwrite(call)
        operator(call)  # compile now, as compiling takes longer than the stream waits
        stream = torch.cuda.Stream() if device.type == "cuda" else None
        with torch.cuda.stream(stream):
            if stream is not None:
                stream.wait_stream(torch.cuda.default_stream())
                torch.cuda._sleep(100_000_000)  # clock cycles, some 50 ms
            restore()
            operator(call)

    check("fold_side_stream", side_stream, mode)


@modes
@pytest.mark.parametrize("mix", ["fp32", "fp32_to_fp16"])
def test_cuda_graph(check: Check, device: torch.device, mix: str, mode: str) -> None:
    """Capture the call, and replay it on other values in the same tensors. The graph owns the results."""

    def cuda_graph(call: KernelCall) -> object:
        restore = overwrite(call)
        replay = replayable(partial(operator, call), device)
        restore()
        replay()
        return replay

    check("fold_group_cuda_graph", cuda_graph, mode, mix, tuple(SHAPES))


@modes
def test_huge(check: Check, device: torch.device, mode: str) -> None:
    """Fold a weight of more than 2^31 elements. Compare rows at both ends and around element 2^31."""
    on_gpu = device.type == "cuda"

    def huge(call: KernelCall) -> None:
        rows, cols = (2**16 + 8, 2**15) if on_gpu else (40, 24)
        if on_gpu and (free := torch.cuda.mem_get_info()[0]) < 12 * rows * cols:  # W, W', dW' and dW, 2 bytes each
            pytest.skip(f"{free / 1e9:.0f} GB of the GPU are free")
        pair = replace(spec("conv", "fp16", False), rows=rows, cols=1, taps=1)
        whole = KernelCall([pair if isinstance(call.specs[0], PairSpec) else backward_of(pair)], device)
        weight = torch.randn(rows, cols, dtype=torch.float16, device=device)
        call.pairs, call.values = [whole.pairs[0]._replace(weight=weight)], whole.values
        if "grad_weight" in call.values[0]:
            call.values[0]["grad_weight"] = torch.randn_like(weight)
        operator(call)
        change(call, lambda tensor: torch.cat([tensor[:8], tensor[-24:-8], tensor[-8:]]))

    check("fold_huge", huge, mode, "fp16", rerun=False)


@modes
@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_wrong_results_fail(device: torch.device, factor: float, mode: str) -> None:
    """Record errors above the limit, and outputs that change from run to run."""
    recorded: dict[str, Any] = {}

    def wrong(call: KernelCall) -> None:
        operator(call)
        for name in results(call):
            call.values[0][name.partition(" ")[0]].mul_(factor)

    with pytest.raises(AssertionError):
        run_check(device, recorded.__setitem__, "fold", wrong, mode, kernel=False)
    _, error, allowed, _ = recorded["fold_error" if mode == "forward" else "gradient_error"]
    assert not error <= allowed
    assert recorded["runs_differ"][1] > 0
