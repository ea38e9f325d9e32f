"""The values that the GPU check looks at: dtypes, layouts, addresses, sizes, devices, streams, CUDA graphs."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from triton_convbn.kernels.codegen import generate
from triton_convbn.kernels.inputs import FoldInputs
from triton_convbn.kernels.kernel_call import KernelCall
from triton_convbn.kernels.offline_cases import DTYPE_MIXES, backward_of, pair
from triton_convbn.kernels.spec import Needs

from triton_convbn.ops.library import fold_backward, fold_op
from triton_convbn.ops.packed_pairs import PackedPairs

from . import environment
from .gpu_bench import Bench, by_kernel
from .gpu_oracle import FIELDS, GROUP, KINDS, MIXES, OUTPUTS, Grads, Kind, check, fold_and_gradients, make, make_grads
from .report import Report
from .table import Key

BOTH = "forward and backward"


def versions(bench: Bench, report: Report, csv: str) -> None:
    """Note the machine beside the CSV, and fold once each way."""
    environment.note(Path(csv))
    inputs = make(KINDS["conv"], "fp32", bench.device)
    grads = make_grads(inputs)
    check(report, Key("fold_first", mode=BOTH, dtype="fp32"), fold_and_gradients(inputs, grads), inputs, grads)


def values(bench: Bench, report: Report, part: int, parts: int) -> None:
    """Every dtype mix, kind and layout against fp64; three runs have to agree in every bit."""
    cases = [
        (mix, name, layout)
        for mix in MIXES
        for name, kind in KINDS.items()
        for layout in (("contiguous", "channels_last") if kind.kernel else ("contiguous",))
    ]
    for seed, (mix, name, layout) in list(enumerate(cases))[part::parts]:
        case = Key(f"fold_{name}", mode=BOTH, dtype=mix, layout=layout)
        with report.keeping(case, "fold_error", "ulp"):
            scale = 1 if bench.dry else 8
            inputs = make(KINDS[name], mix, bench.device, scale, layout == "channels_last", seed)
            grads = make_grads(inputs, seed)
            found = fold_and_gradients(inputs, grads)
            check(report, case, found, inputs, grads)
            differing: set[str] = set()
            for _ in range(1 if bench.dry else 2):
                again = fold_and_gradients(inputs, grads)
                differing |= {name for name, tensor in found.items() if not torch.equal(tensor, again[name])}
            report.checked(case, "runs_differ", "tensors", len(differing), 0, ", ".join(differing))


def special(bench: Bench, report: Report, names: list[str]) -> None:
    """Other checks of values, by the names of their functions here."""
    for name in names:
        with report.keeping(Key(name), "run"):
            globals()[name](bench, report)


def unwritten(bench: Bench, report: Report) -> None:
    """Kernels on outputs full of NaN: every element is written, and nothing beside them."""
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
    """Weights that begin one element after an aligned address, and weights with gaps, which plain torch folds."""
    for mix in ("fp32", "fp16", "bf16", "fp32_to_bf16"):
        inputs = make(KINDS["conv"], mix, bench.device, 1 if bench.dry else 8, seed=3)
        grads = make_grads(inputs, 3)
        fold_and_gradients(inputs, grads)  # whatever is remembered of such tensors is of aligned ones
        weight = inputs.weight
        shifted = torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(weight.shape)
        gaps = torch.stack([weight, weight], -1)[..., 0]
        for name, other in (("misaligned", shifted), ("with_gaps", gaps)):
            case = Key(f"fold_{name}", mode=BOTH, dtype=mix)
            with report.keeping(case, "fold_error", "ulp"):
                one = inputs._replace(weight=other)
                check(report, case, fold_and_gradients(one, grads, kernel=name == "misaligned"), one, grads)


def huge(bench: Bench, report: Report) -> None:
    """One weight of more than 2^31 elements. Compared are rows at both ends, and where 2^31 is passed."""
    case = Key("fold_huge", mode=BOTH, dtype="fp16")
    rows, cols = (40, 24) if bench.dry else (2**16 + 8, 2**15)
    if not bench.dry and torch.cuda.mem_get_info()[0] < 12 * rows * cols:  # W, W', dW' and dW, two bytes each
        report.skipped(case, "fold_error", "ulp", f"{torch.cuda.mem_get_info()[0] / 1e9:.0f} GB of the GPU are free")
        return
    with report.keeping(case, "fold_error", "ulp"):
        inputs = make(Kind(rows, 1), "fp16", bench.device)
        torch.manual_seed(0)
        inputs = inputs._replace(weight=torch.randn(rows, cols, dtype=torch.float16, device=bench.device))
        grads = torch.randn_like(inputs.weight), torch.randn_like(inputs.running_mean)
        found = fold_and_gradients(inputs, grads)
        for name, part in (("first", slice(0, 8)), ("middle", slice(rows - 16, rows - 8)), ("last", slice(-8, None))):
            few = FoldInputs(*[t if t is None else t[part] for t in inputs[:6]], *inputs[6:])
            own = {field: tensor[part] for field, tensor in found.items()}
            check(report, case._replace(case=f"fold_huge_{name}"), own, few, (grads[0][part], grads[1][part]))


def second_device(bench: Bench, report: Report) -> None:
    """Tensors on a device that is not the current one."""
    case = Key("fold_second_device", mode="forward and backward", dtype="fp32")
    device = bench.second
    if device is None:
        report.skipped(case, "fold_error", "ulp", "one GPU here")
        return
    with report.keeping(case, "fold_error", "ulp"):
        pair = make(KINDS["conv"], "fp32", device, 8 if not bench.dry else 1)
        grads = make_grads(pair)
        found = fold_and_gradients(pair, grads)
        bench.synchronize()
        if any(tensor.device != device for tensor in found.values()):
            raise RuntimeError(f"results on {sorted({str(tensor.device) for tensor in found.values()})}, not {device}")
        check(report, case, found, pair, grads)


def side_stream(bench: Bench, report: Report) -> None:
    """Inputs that are written late, on another stream than the default: a fold launched elsewhere reads them early."""
    case = Key("fold_side_stream", mode="forward and backward", dtype="fp32")
    with report.keeping(case, "fold_error", "ulp"):
        fresh = make(KINDS["conv"], "fp32", bench.device, seed=1)
        grads = make_grads(fresh, seed=1)
        late = fresh._replace(**{name: torch.ones_like(getattr(fresh, name)) for name in FIELDS})
        fold_and_gradients(late, grads)  # compiled ahead: a compile would take the time that the stream waits
        with bench.busy_side_stream():
            for name in FIELDS:
                getattr(late, name).copy_(getattr(fresh, name))
            found = fold_and_gradients(late, grads)
        check(report, case, found, fresh, grads)


def cuda_graph(bench: Bench, report: Report) -> None:
    """A group captured once, forward and backward, and replayed on other values in the same tensors."""
    for mix in ("fp32", "fp32_to_fp16"):
        case = Key("fold_group_cuda_graph", mode="forward and backward", dtype=mix)
        with report.keeping(case, "fold_error", "ulp"):
            pairs = [make(kind, mix, bench.device, seed=i) for i, kind in enumerate(GROUP)]
            grads = [make_grads(pair, i) for i, pair in enumerate(pairs)]
            outputs: list[list[Tensor]] = []
            replay = bench.replayable(_captured(pairs, grads, outputs))
            others = [make(kind, mix, bench.device, seed=10 + i) for i, kind in enumerate(GROUP)]
            for pair, other in zip(pairs, others, strict=True):
                for tensor, value in zip(pair[:6], other[:6], strict=True):
                    if tensor is not None and value is not None:
                        tensor.copy_(value)
            replay()
            bench.synchronize()
            names = (*OUTPUTS[: 2 + pairs[0].prescale], *FIELDS)
            captured = outputs[-1]
            for index, (pair, grad) in enumerate(zip(pairs, grads, strict=True)):
                found = dict(zip(names, captured[len(names) * index :], strict=False))
                check(report, case._replace(case=f"{case.case}_{index}"), found, pair, grad)
            direct: list[list[Tensor]] = []
            _captured(pairs, grads, direct)()
            differing = sum(not torch.equal(a, b) for a, b in zip(captured, direct[-1], strict=True))
            report.checked(case, "replay_differs_from_launch", "tensors", differing, 0)


def _captured(pairs: list[FoldInputs], grads: list[Grads], outputs: list[list[Tensor]]) -> Callable[[], None]:
    """A call that folds the group and computes its gradients; adds to `outputs` all results of each pair."""
    columns = PackedPairs.pack(pairs)

    def call() -> None:
        with torch.no_grad(), by_kernel():
            folded = fold_op(*columns)
            gradients = fold_backward(columns, grads, [Needs()] * len(pairs), folded[2 * len(pairs) :])
        flat: list[Tensor] = []
        for own, found in zip(columns.by_pair(folded), gradients, strict=True):
            flat += [t for t in (*own, *found) if t is not None]
        outputs.append(flat)

    return call
