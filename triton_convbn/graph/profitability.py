"""Select the folds that are profitable. `when="profitable"` leaves the others as they are.

Inductor fuses an eval-mode BatchNorm, a multiplication and an addition per channel, into the kernel after the
convolution. A fold instead moves every weight once more, on every call. It is profitable

- if BatchNorm's scale trains. Its gradient is a sum over the convolution's output, which is saved for it. A fold
  computes it from the gradient of the weight. Before SiLU, whose gradient needs as large a tensor, that saves time and
  no memory, see docs/experiments.md. A FrozenBatchNorm2d, whose vectors are buffers, has no such sum;
- if a BatchNorm before a convolution folds into it, and its scale and the convolution's weight train: one activation
  less is saved, see `input_norm_gains`;
- if it merges two convolutions or more, see `branches`. There is less to compute then, in inference too;
- if the fold is computed once: under freezing the folded weights are constants;
- if a kernel folds and the weight has to be cast on every call anyway, as under autocast: one launch replaces the casts
  of many weights. ResNet-50's forward then has 57 launches instead of 106 (planned for an H100), and its kernels take
  0.81 of the time (measured on an H200). In fp32 they would take 0.97, with as many launches.

Host time does not change this while Inductor launches the folds: on the H200's host, three training steps took 0.81 to
0.92 of plain Inductor's host time.

docs/performance.md has the tables. In a graph that is rewritten by hand it is unknown what trains, and every pair is
folded. Under ``backend="triton_convbn_eager"``, where BatchNorm is a pass over the activations, see `gains_in_eager`.
"""

from dataclasses import replace

import torch
from torch import Tensor, fx
from torch._inductor import config

from ..compile_context import compiling
from ..dispatch import kernel_runs
from ..options import Options
from .branch import Branch
from .branches import merge_sums
from .calls import BatchNormCall, Value, captured_tensor, requires_grad, tensor_of
from .findings import Decline, Findings, Pair
from .fit import cancels
from .input_norms import InputNorm, fold_input_norms
from .match import drop_written, find
from .reasons import Reason


def select(graph: fx.Graph, options: Options) -> Findings:
    """Return every BatchNorm of the graph, each with the pairs that are to be folded or with a decline."""
    findings = find(graph)
    inductor = options.codegen and compiling()
    if inductor:
        findings = drop_written(findings, graph)
    findings = merge_sums(findings, graph, lambda branch: merge_gains(branch, graph, options), inputs_are_kept=inductor)
    findings = drop_unprofitable(findings, graph, options)

    def decline(norm: InputNorm) -> Decline | None:
        # Inductor's cache does not know the statistics: it would return a graph that was made for other ones.
        mean, var = (None if options.codegen else captured_tensor(each, graph) for each in norm.vectors[2:])
        if cancels(mean, var, norm.bn.eps):
            return Decline(norm.bn, Reason.CANCELS)
        return None if input_norm_gains(norm, graph, options) else Decline(norm.bn, Reason.DOES_NOT_PAY)

    return fold_input_norms(findings, graph, decline, inputs_are_kept=inductor)


def drop_unprofitable(findings: Findings, graph: fx.Graph, options: Options) -> Findings:
    """Return the findings with the unprofitable pairs among the declines.

    Inductor's own flag for its conv-BN pass asks for every pair.
    """
    if _every(options):
        return findings
    gains = gains_under_inductor if options.codegen else gains_in_eager
    left: list[Pair] = []

    def decline(pairs: list[Pair]) -> Decline | None:
        if all(gains(pair, graph) for pair in pairs):
            return None
        left.extend(pairs)
        return Decline(pairs[0].bn, Reason.DOES_NOT_PAY)

    return replace(findings.drop(decline), unprofitable=left)


def _every(options: Options) -> bool:
    """Return whether all that can fold is to be folded."""
    return options.when == "always" or config.efficient_conv_bn_eval_fx_passes or not compiling()


def merge_gains(branch: Branch, graph: fx.Graph, options: Options) -> bool:
    """Return whether it is profitable to merge a sum.

    It is if two convolutions or more become one. With one convolution and the input, it is if the convolution's own
    fold is: under Inductor the sum itself is part of the next kernel.
    """
    output, weight = tensor_of(branch.node, graph), tensor_of(branch.largest[0].weight, graph)
    if len(branch.convs) > 1 or _every(options) or output is None or weight is None:
        return True
    if not options.codegen:
        return _gains_in_eager(output, weight)
    if requires_grad(output):
        return any(_scale_trains(bn, graph) for bn in branch.norms)
    return _are_frozen(*(conv.weight for conv, _ in branch.convs), *(v for bn in branch.norms for v in bn.vectors))


def input_norm_gains(norm: InputNorm, graph: fx.Graph, options: Options) -> bool:
    """Return whether it is profitable to fold a BatchNorm into the convolution after it.

    If its scale and the convolution's weight train, both its input and its output are saved, the one for the gradient
    of the scale and the other for that of the weight. The fold saves the input. If only the scale trains, a convolution
    for the gradient of the weight, from which that of the scale follows, replaces a sum.
    """
    output, weight = tensor_of(norm.bn.output, graph), tensor_of(norm.conv.weight, graph)
    if _every(options) or output is None or weight is None:
        return True
    convolved = tensor_of(norm.conv.node, graph)
    if convolved is not None and requires_grad(convolved):
        scale_trains, weight_trains = _scale_trains(norm.bn, graph), requires_grad(weight)
        return weight_trains if scale_trains else not options.codegen
    if not options.codegen:
        return _gains_in_eager(output, weight)
    return _are_frozen(norm.conv.weight, *norm.bn.vectors)


def gains_under_inductor(pair: Pair, graph: fx.Graph) -> bool:
    """Return whether the fold of a pair is profitable in a graph that Inductor compiles."""
    output = tensor_of(pair.bn.output, graph)
    if output is None:
        return True
    if requires_grad(output):
        if any(_scale_trains(bn, graph) for bn in pair.norms):
            return True
    elif _are_frozen(pair.conv.weight, *(v for bn in pair.norms for v in bn.vectors)):
        return True
    weight = tensor_of(pair.conv.weight, graph)
    is_cast = weight is not None and pair.dtype not in (None, weight.dtype)
    return is_cast and weight is not None and kernel_runs(weight.device)


def gains_in_eager(pair: Pair, graph: fx.Graph) -> bool:
    """Return whether the fold of a pair is profitable in a graph that runs as it is.

    BatchNorm is a pass over the convolution's output there, and autograd saves that output whatever trains. Without a
    backward, one pass over the weight replaces it, which is profitable if the weight is smaller.
    """
    output, weight = tensor_of(pair.bn.output, graph), tensor_of(pair.conv.weight, graph)
    return output is None or weight is None or _gains_in_eager(output, weight)


def _gains_in_eager(output: Tensor, weight: Tensor) -> bool:
    if requires_grad(output):
        return True
    size = output.numel()
    known = size.node.hint if isinstance(size, torch.SymInt) else size  # a comparison would become a guard
    return known is None or known > weight.numel()


def _are_frozen(*values: Value) -> bool:
    """Return whether freezing computes once what depends on these values.

    It makes constants of the graph's attributes, not of its inputs. Dynamo makes parameters attributes if freezing is
    on in the configuration when it traces. As an option of `torch.compile` it comes too late, and a fold runs on every
    call: ResNet-50 then took 1.06 times Inductor's time (batch 1, measured on a CPU).
    """
    pending = [value for value in values if isinstance(value, fx.Node)]
    seen = set(pending)
    while config.freezing and pending:
        node = pending.pop()
        if node.op == "placeholder":
            return False
        pending += (found := set(node.all_input_nodes) - seen)
        seen |= found
    return config.freezing


def _scale_trains(bn: BatchNormCall, graph: fx.Graph) -> bool:
    """Return whether the scale of a BatchNorm requires a gradient."""
    vectors = tensor_of(bn.weight, graph), tensor_of(bn.running_var, graph)
    return any(vector is not None and requires_grad(vector) for vector in vectors)
