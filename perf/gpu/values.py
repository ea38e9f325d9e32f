"""Check the folds and their gradients on the device against the fp64 oracle of `kernels.testing`.

The cases cover dtypes, layouts, addresses, sizes, devices, streams and CUDA graphs. Folds go through the operators, as
in compiled models. Errors are in ulps.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton_convbn.kernels.codegen import generate
from triton_convbn.kernels.fold import OUTPUTS
from triton_convbn.kernels.inputs import FoldInputs
from triton_convbn.kernels.kernel_call import KernelCall
from triton_convbn.kernels.offline_cases import DTYPE_MIXES
from triton_convbn.kernels.spec import Needs, PairSpec, backward_of

from triton_convbn.ops.library import fold_backward, fold_op
from triton_convbn.ops.packed_pairs import PackedPairs

from .. import environment
from ..results import Key, Report
from .bench import Bench, by_kernel

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
GRADIENTS = tuple(f"d_{name}" for name in Needs._fields)


class Skipped(Exception):
    """Raised for a way to compute that this machine does not have. The message says why."""


def check(
    bench: Bench,
    report: Report,
    case: Key,
    compute: Callable[[Bench, KernelCall], object],
    mixes: Sequence[str] = ("fp32",),
    shapes: Sequence[str] = ("conv",),
    rerun: bool = True,
    kernel: bool = True,
    seed: int = 0,
) -> None:
    """Check the folds of a group and its gradients.

    Args:
        case: With the layout of the weights.
        compute: Fills the outputs of a call. Its result is kept until they have been read.
        mixes: Names of MIXES, checked one after the other.
        shapes: Names of SHAPES; several form a group.
        rerun: Compare with further calls of the operator, which must return the same bits.
        kernel: Fail if plain torch computes the fold.
    """
    for mix, mode in product(mixes, ("forward", "backward")):
        case, metric = case._replace(dtype=mix, mode=mode), "fold_error" if mode == "forward" else "gradient_error"
        pairs = [spec(name, mix, case.layout == "channels_last") for name in shapes]
        with report.keeping(case, metric, "ulp"), by_kernel() if kernel else nullcontext():
            call = KernelCall(pairs if mode == "forward" else list(map(backward_of, pairs)), bench.device, seed)
            try:
                kept = compute(bench, call)
            except Skipped as why:
                report.skipped(case, metric, "ulp", str(why))
                continue
            bench.synchronize()
            first = results(call)
            every = [(errors.max().item(), allowed, name) for name, errors, allowed in call.errors()]
            error, allowed, name = max(every, key=lambda each: (not each[0] <= each[1], each[0] / max(each[1], 1.0)))
            report.checked(case, metric, "ulp", error, allowed, name)
            if rerun:
                differing = set()
                for _ in range(2):
                    operator(bench, call)
                    differing |= {name for name, found in results(call).items() if not torch.equal(found, first[name])}
                report.checked(case, "runs_differ", "tensors", len(differing), 0, ", ".join(sorted(differing)))
            del kept


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


# ---- ways ------------------------------------------------------------------------------------------------------------


def operator(_bench: Bench, call: KernelCall) -> None:
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


def on_nan(_bench: Bench, call: KernelCall) -> None:
    """Launch the kernel on outputs full of NaN: it writes every element, and nothing around them."""
    call.run([(slice(None), generate(tuple(call.specs)))])
    if wrong := call.wrong():
        raise RuntimeError(wrong)


def misaligned(bench: Bench, call: KernelCall) -> None:
    """Fold tensors one element off an aligned address, after caches are filled for aligned ones."""
    operator(bench, call)
    change(call, lambda tensor: torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape))
    operator(bench, call)


def with_gaps(bench: Bench, call: KernelCall) -> None:
    """Fold weights with gaps, which plain torch does."""
    gaps = [torch.stack([pair.weight, pair.weight], -1)[..., 0] for pair in call.pairs]
    call.pairs = [pair._replace(weight=weight) for pair, weight in zip(call.pairs, gaps, strict=True)]
    operator(bench, call)


def second_device(bench: Bench, call: KernelCall) -> None:
    """Fold tensors on a device that is not the current one. A dry run has one device."""
    others = [index for index in range(torch.cuda.device_count()) if index != bench.device.index]
    if not others and not bench.dry:
        raise Skipped("there is one GPU")
    device = bench.device if bench.dry else torch.device("cuda", others[0])
    change(call, lambda tensor: tensor.to(device))
    operator(bench, call)
    bench.synchronize(device)
    if elsewhere := [name for name, value in results(call).items() if value.device != device]:
        raise RuntimeError(f"not on {device}: {', '.join(elsewhere)}")


def overwrite(call: KernelCall) -> Callable[[], None]:
    """Fill the parameters with zeros. Return a function that restores their values in place."""
    tensors = [tensor for pair in call.pairs for tensor in pair[:4] if tensor is not None]
    values = [tensor.clone() for tensor in tensors]
    torch._foreach_zero_(tensors)
    return lambda: torch._foreach_copy_(tensors, values)


def side_stream(bench: Bench, call: KernelCall) -> None:
    """Write the parameters late on a side stream: a fold launched on another stream reads them too early."""
    restore = overwrite(call)
    operator(bench, call)  # compile now, as compiling takes longer than the stream waits
    stream = None if bench.dry else torch.cuda.Stream()
    with torch.cuda.stream(stream):
        if stream is not None:
            stream.wait_stream(torch.cuda.default_stream())
            torch.cuda._sleep(100_000_000)  # clock cycles, some 50 ms
        restore()
        operator(bench, call)


def cuda_graph(bench: Bench, call: KernelCall) -> object:
    """Capture the call, and replay it on other values in the same tensors. Return the graph, which owns the results."""
    restore = overwrite(call)
    replay = bench.replayable(partial(operator, bench, call))
    restore()
    replay()
    return replay


def huge(bench: Bench, call: KernelCall) -> None:
    """Fold a weight of more than 2^31 elements. Keep rows at both ends and around element 2^31."""
    rows, cols = (40, 24) if bench.dry else (2**16 + 8, 2**15)
    if not bench.dry and (free := torch.cuda.mem_get_info()[0]) < 12 * rows * cols:  # W, W', dW' and dW, 2 bytes each
        raise Skipped(f"{free / 1e9:.0f} GB of the GPU are free")
    pair = replace(spec("conv", "fp16", False), rows=rows, cols=1, taps=1)
    whole = KernelCall([pair if isinstance(call.specs[0], PairSpec) else backward_of(pair)], bench.device)
    weight = torch.randn(rows, cols, dtype=torch.float16, device=bench.device)
    call.pairs, call.values = [whole.pairs[0]._replace(weight=weight)], whole.values
    if "grad_weight" in call.values[0]:
        call.values[0]["grad_weight"] = torch.randn_like(weight)
    operator(bench, call)
    change(call, lambda tensor: torch.cat([tensor[:8], tensor[-24:-8], tensor[-8:]]))


SOME = ("fp32", "fp16", "bf16", "fp32_to_bf16")
WAYS: dict[str, dict[str, Any]] = {
    "on_nan": {"compute": on_nan, "mixes": tuple(DTYPE_MIXES), "rerun": False},
    "misaligned": {"compute": misaligned, "mixes": SOME},
    "with_gaps": {"compute": with_gaps, "mixes": SOME, "kernel": False},
    "second_device": {"compute": second_device},
    "side_stream": {"compute": side_stream},
    "group_cuda_graph": {"compute": cuda_graph, "mixes": ("fp32", "fp32_to_fp16"), "shapes": tuple(SHAPES)},
    "huge": {"compute": huge, "mixes": ("fp16",), "rerun": False},
}
"""Special cases: arguments of `check`."""


# ---- tasks of the check ----------------------------------------------------------------------------------------------


def versions(bench: Bench, report: Report, csv: str) -> None:
    """Record the machine beside the CSV, and fold once each way."""
    environment.note(Path(csv))
    check(bench, report, Key("fold_first"), operator)


def values(bench: Bench, report: Report, part: int, parts: int) -> None:
    """Check one part of all dtype mixes, shapes and layouts."""
    cases = list(product(MIXES, SHAPES, ("contiguous", "channels_last")))
    for seed, (mix, name, layout) in list(enumerate(cases))[part::parts]:
        check(bench, report, Key(f"fold_{name}", layout=layout), operator, (mix,), (name,), seed=seed)


def special(bench: Bench, report: Report, names: list[str]) -> None:
    """Check the named ways."""
    for name in names:
        check(bench, report, Key(f"fold_{name}"), **WAYS[name])
