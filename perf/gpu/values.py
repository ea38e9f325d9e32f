"""Check the folds and their gradients on the device against fp64, in ulps.

The cases cover dtypes, layouts, addresses, sizes, devices, streams and CUDA graphs. The oracle is `kernels.testing`, on
the CPU.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from triton_convbn.kernels.codegen import generate
from triton_convbn.kernels.inputs import FoldInputs
from triton_convbn.kernels.kernel_call import KernelCall
from triton_convbn.kernels.offline_cases import DTYPE_MIXES, backward_of, pair
from triton_convbn.kernels.spec import Needs
from triton_convbn.kernels.testing import MAX_ULPS, TORCH_DTYPES, errors_in_ulps, exact_fold, exact_gradients

from triton_convbn.ops import reference
from triton_convbn.ops.library import fold_backward, fold_op
from triton_convbn.ops.packed_pairs import PackedPairs

from .. import environment
from ..results import Key, Report
from .bench import Bench, by_kernel

BOTH = "forward and backward"

# (weight and conv bias, BatchNorm, output)
MIXES = DTYPE_MIXES | {
    "fp16_bn_fp32": ("fp16", "fp32", "fp16"),
    "fp32_to_bf16": ("fp32", "fp32", "bf16"),
    "bf16_bn_fp64": ("bf16", "fp64", "bf16"),
    "fp16_bn_bf16_to_fp32": ("fp16", "bf16", "fp32"),
}
OUTPUTS = ("folded weight", "folded bias", "power")
FIELDS = ("weight", "bias", "bn_weight", "bn_bias")
Grads = tuple[Tensor, Tensor]


class Shape(NamedTuple):
    """Shape of a weight, [rows, cols, *kernel], and how its convolution reads it."""

    rows: int
    cols: int
    kernel: tuple[int, ...] = ()
    transposed: bool = False
    groups: int = 1


SHAPES = {
    "conv": Shape(9, 5, (3, 3)),
    "depthwise": Shape(12, 0, (3, 3)),
    "linear": Shape(10, 13),
    "transposed_groups": Shape(6, 3, (3, 3), transposed=True, groups=3),
}
GROUP = (Shape(8, 3, (3, 3)), Shape(8, 8, (1, 1)), Shape(16, 8, (3, 3)), Shape(5, 16))


def random_pair(
    shape: Shape, mix: str, device: torch.device, scale: int = 1, channels_last: bool = False, seed: int = 0
) -> FoldInputs:
    """Return a pair with every parameter and rows and cols times `scale`. The values depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    weight_dtype, bn_dtype, out_dtype = (TORCH_DTYPES[name] for name in MIXES[mix])
    rows, cols = shape.rows * scale, max(1, shape.cols * scale)
    channels = cols * shape.groups if shape.transposed else rows

    def normal(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

    weight = normal(rows, cols, *shape.kernel, dtype=weight_dtype)
    if channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    bias, gamma, beta, mean = (normal(channels, dtype=d) for d in (weight_dtype, *[bn_dtype] * 3))
    var = torch.empty(channels, dtype=torch.float64).uniform_(-4, 4, generator=generator).exp().to(device, bn_dtype)
    prescale = out_dtype == torch.float16
    return FoldInputs(
        weight, bias, gamma, beta, mean, var, 1e-3, shape.transposed, shape.groups, out_dtype, prescale=prescale
    )


def random_grads(inputs: FoldInputs, seed: int = 0) -> Grads:
    """Return dW' and db' in the layout and dtype of the fold's outputs."""
    generator = torch.Generator().manual_seed(1000 + seed)
    dtype = inputs.out_dtype or inputs.weight.dtype

    def like(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, dtype=dtype).copy_(torch.randn(tensor.shape, generator=generator))

    return like(inputs.weight), like(inputs.running_mean)


def fold_and_gradients(inputs: FoldInputs, grads: Grads, kernel: bool = True) -> dict[str, Tensor]:
    """Return all outputs of the operator and its backward. kernel: raise if plain torch computes them."""
    leaves = [t.detach().requires_grad_() for t in inputs[:4] if t is not None]
    with by_kernel() if kernel else nullcontext():
        folded = fold_op(*PackedPairs.pack([FoldInputs(*leaves, *inputs[4:])]))
        gradients = torch.autograd.grad(folded[:2], leaves, grads)
    found = {name: out.detach() for name, out in zip(OUTPUTS, folded, strict=False)}
    return found | dict(zip(FIELDS, gradients, strict=True))


def check(report: Report, case: Key, found: dict[str, Tensor], inputs: FoldInputs, grads: Grads) -> None:
    """Report the largest error of the fold and the largest error of the gradients, relative to what is allowed."""
    on_cpu = FoldInputs(*(None if t is None else t.cpu() for t in inputs[:6]), *inputs[6:])
    power = found.get("power")
    q = None if power is None else power.cpu()
    exact = dict(zip(OUTPUTS, exact_fold(on_cpu, q), strict=False))
    exact |= exact_gradients(on_cpu, *(grad.cpu() for grad in grads), q)
    for mode, metric, names in (
        ("forward", "fold_error", OUTPUTS[:2]),
        ("backward", "gradient_error", FIELDS),
    ):
        errors = {name: errors_in_ulps(found[name], exact[name]).max().item() for name in names}
        share = {name: error / MAX_ULPS[found[name].dtype] for name, error in errors.items()}
        worst = max(share, key=lambda name: math.inf if math.isnan(share[name]) else share[name])
        limit = MAX_ULPS[found[worst].dtype]
        report.checked(case._replace(mode=mode), metric, "ulp", errors[worst], limit, worst)
    if power is not None:
        expected = reference.prescale(inputs.bn_weight, inputs.bn_bias, inputs.running_var, inputs.eps)
        off = (torch.log2(power.float()) - torch.log2(expected.float())).abs().max().item()
        report.checked(case._replace(mode="forward"), "headroom_difference", "powers of two", off, 1)


def check_pair(
    report: Report, case: Key, inputs: FoldInputs, seed: int = 0, kernel: bool = True, reruns: int = 0
) -> None:
    """Check one pair. reruns: fold again as often, and report the outputs that differ in any bit."""
    with report.keeping(case, "fold_error", "ulp"):
        grads = random_grads(inputs, seed)
        found = fold_and_gradients(inputs, grads, kernel)
        check(report, case, found, inputs, grads)
        if reruns:
            again = [fold_and_gradients(inputs, grads) for _ in range(reruns)]
            differing = sorted(name for name, t in found.items() if not all(torch.equal(t, run[name]) for run in again))
            report.checked(case, "runs_differ", "tensors", len(differing), 0, ", ".join(differing))


def versions(bench: Bench, report: Report, csv: str) -> None:
    """Record the machine beside the CSV, and fold once each way."""
    environment.note(Path(csv))
    check_pair(report, Key("fold_first", mode=BOTH, dtype="fp32"), random_pair(SHAPES["conv"], "fp32", bench.device))


def values(bench: Bench, report: Report, part: int, parts: int) -> None:
    """Check every dtype mix, shape and layout. Runs must agree in every bit."""
    cases = [
        (mix, name, layout)
        for mix in MIXES
        for name, shape in SHAPES.items()
        for layout in (("contiguous", "channels_last") if shape.kernel else ("contiguous",))
    ]
    for seed, (mix, name, layout) in list(enumerate(cases))[part::parts]:
        last = layout == "channels_last"
        inputs = random_pair(SHAPES[name], mix, bench.device, 1 if bench.dry else 8, last, seed)
        key = Key(f"fold_{name}", mode=BOTH, dtype=mix, layout=layout)
        check_pair(report, key, inputs, seed, reruns=1 if bench.dry else 2)


def special(bench: Bench, report: Report, names: list[str]) -> None:
    """Run the functions of this module that `names` lists."""
    for name in names:
        with report.keeping(Key(name), "run"):
            globals()[name](bench, report)


def unwritten(bench: Bench, report: Report) -> None:
    """Run kernels on outputs full of NaN: every element is written, and nothing around them."""
    for mix in DTYPE_MIXES:
        spec = pair(40, 24, 9, mix, conv_bias=True)
        for name, specs in (("fold", (spec,)), ("fold_backward", (backward_of(spec),))):
            case = Key(f"{name}_on_nan", dtype=mix)
            with report.keeping(case, "wrong_outputs", "tensors"):
                call = KernelCall(specs, bench.device)
                call.run([(slice(None), generate(specs))])
                wrong = call.wrong()
                report.checked(case, "wrong_outputs", "tensors", float(wrong is not None), 0, wrong or "")


def addresses(bench: Bench, report: Report) -> None:
    """Fold weights one element off an aligned address, and weights with gaps, which plain torch folds."""
    for mix in ("fp32", "fp16", "bf16", "fp32_to_bf16"):
        inputs = random_pair(SHAPES["conv"], mix, bench.device, 1 if bench.dry else 8, seed=3)
        fold_and_gradients(inputs, random_grads(inputs, 3))  # caches are filled for aligned tensors
        weight = inputs.weight
        shifted = torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(weight.shape)
        gaps = torch.stack([weight, weight], -1)[..., 0]
        for name, other in (("misaligned", shifted), ("with_gaps", gaps)):
            case = Key(f"fold_{name}", mode=BOTH, dtype=mix)
            check_pair(report, case, inputs._replace(weight=other), 3, kernel=name == "misaligned")


def huge(bench: Bench, report: Report) -> None:
    """Fold one weight of more than 2^31 elements. Check rows at both ends and around element 2^31."""
    case = Key("fold_huge", mode=BOTH, dtype="fp16")
    rows, cols = (40, 24) if bench.dry else (2**16 + 8, 2**15)
    if not bench.dry and torch.cuda.mem_get_info()[0] < 12 * rows * cols:  # W, W', dW' and dW, two bytes each
        report.skipped(case, "fold_error", "ulp", f"{torch.cuda.mem_get_info()[0] / 1e9:.0f} GB of the GPU are free")
        return
    with report.keeping(case, "fold_error", "ulp"):
        inputs = random_pair(Shape(rows, 1), "fp16", bench.device)
        torch.manual_seed(0)
        inputs = inputs._replace(weight=torch.randn(rows, cols, dtype=torch.float16, device=bench.device))
        grads = torch.randn_like(inputs.weight), torch.randn_like(inputs.running_mean)
        found = fold_and_gradients(inputs, grads)
        for name, part in (("first", slice(0, 8)), ("middle", slice(rows - 16, rows - 8)), ("last", slice(-8, None))):
            few = FoldInputs(*[t if t is None else t[part] for t in inputs[:6]], *inputs[6:])
            own = {field: tensor[part] for field, tensor in found.items()}
            check(report, case._replace(case=f"fold_huge_{name}"), own, few, (grads[0][part], grads[1][part]))


def second_device(bench: Bench, report: Report) -> None:
    """Fold tensors on a device that is not the current one."""
    case = Key("fold_second_device", mode=BOTH, dtype="fp32")
    if (device := bench.second) is None:
        report.skipped(case, "fold_error", "ulp", "there is one GPU")
        return
    with report.keeping(case, "fold_error", "ulp"):
        inputs = random_pair(SHAPES["conv"], "fp32", device, 1 if bench.dry else 8)
        grads = random_grads(inputs)
        found = fold_and_gradients(inputs, grads)
        bench.synchronize()
        if any(tensor.device != device for tensor in found.values()):
            raise RuntimeError(f"results on {sorted({str(tensor.device) for tensor in found.values()})}, not {device}")
        check(report, case, found, inputs, grads)


def side_stream(bench: Bench, report: Report) -> None:
    """Write the inputs late on a side stream: a fold launched on another stream reads them too early."""
    case = Key("fold_side_stream", mode=BOTH, dtype="fp32")
    with report.keeping(case, "fold_error", "ulp"):
        fresh = random_pair(SHAPES["conv"], "fp32", bench.device, seed=1)
        grads = random_grads(fresh, seed=1)
        late = fresh._replace(**{name: torch.ones_like(getattr(fresh, name)) for name in FIELDS})
        fold_and_gradients(late, grads)  # compile now, as compiling takes longer than the stream waits
        with bench.busy_side_stream():
            for name in FIELDS:
                getattr(late, name).copy_(getattr(fresh, name))
            found = fold_and_gradients(late, grads)
        check(report, case, found, fresh, grads)


def cuda_graph(bench: Bench, report: Report) -> None:
    """Capture a group once, forward and backward, and replay it on other values in the same tensors."""
    for mix in ("fp32", "fp32_to_fp16"):
        case = Key("fold_group_cuda_graph", mode=BOTH, dtype=mix)
        with report.keeping(case, "fold_error", "ulp"):
            pairs = [random_pair(shape, mix, bench.device, seed=i) for i, shape in enumerate(GROUP)]
            grads = [random_grads(each, i) for i, each in enumerate(pairs)]
            runs: list[list[Tensor]] = []
            call = _group_call(pairs, grads)
            replay = bench.replayable(partial(_append_result, runs, call))
            others = [random_pair(shape, mix, bench.device, seed=10 + i) for i, shape in enumerate(GROUP)]
            for each, other in zip(pairs, others, strict=True):
                for tensor, value in zip(each[:6], other[:6], strict=True):
                    if tensor is not None and value is not None:
                        tensor.copy_(value)
            replay()
            bench.synchronize()
            names = (*OUTPUTS[: 2 + pairs[0].prescale], *FIELDS)
            captured = runs[-1]
            for index, (each, grad) in enumerate(zip(pairs, grads, strict=True)):
                found = dict(zip(names, captured[len(names) * index :], strict=False))
                check(report, case._replace(case=f"{case.case}_{index}"), found, each, grad)
            direct = call()
            differing = sum(not torch.equal(a, b) for a, b in zip(captured, direct, strict=True))
            report.checked(case, "replay_differs_from_launch", "tensors", differing, 0)


def _append_result(results: list[list[Tensor]], call: Callable[[], list[Tensor]]) -> None:
    results.append(call())


def _group_call(pairs: list[FoldInputs], grads: list[Grads]) -> Callable[[], list[Tensor]]:
    """Return a call that folds the group and returns all results, pair by pair."""
    packed = PackedPairs.pack(pairs)

    def call() -> list[Tensor]:
        with torch.no_grad(), by_kernel():
            folded = fold_op(*packed)
            gradients = fold_backward(packed, grads, [Needs()] * len(pairs), folded[2 * len(pairs) :])
        both = zip(packed.by_pair(folded), gradients, strict=True)
        return [t for own, found in both for t in (*own, *found) if t is not None]

    return call
