"""Lower `triton_convbn::fold` and `triton_convbn::fold_backward` to launches in Inductor's generated code.

The graph keeps the two functional operators, so passes and other compilers see no difference. Inductor's code allocates
the outputs and has one line for each launch, `fold_16_0.run(primals_1, ..., buf2, ..., stream=stream0)`, which takes
about 20 us. The operators are Python: a call of 16 pairs took 0.3 to 1.6 ms of host time with an H200, and ResNet-50's
training step makes 12 calls.

If the kernels cannot take a group, it stays a call of the operator, which is counted as ``operator:<reason>``.
"""

import functools
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..counters import count
from ..dispatch import interpreting, kernel_runs
from ..kernels.inputs import OUTPUTS, FoldInputs, Unsupported, device_of, grad_spec_of, is_channels_last, spec_of
from ..kernels.tuned import kernels_for
from ..ops.library import fold_backward_op, fold_op
from ..ops.packed_pairs import PackedPairs, grad_pairs, needs_of
from .launches import Boxes, empty, empty_vectors, launch


class _OnCpu(Unsupported):
    """The tensors are on the CPU, where the operator is meant to run. Not counted."""


@functools.cache
def register() -> None:
    """Register the lowerings of both operators with Inductor, once a process."""
    from torch._inductor.lowering import register_lowering

    register_lowering(fold_op, type_promotion_kind=None, broadcast=False)(_fold)
    register_lowering(fold_backward_op, type_promotion_kind=None, broadcast=False)(_fold_backward)


def _fold(*arguments: Any) -> Boxes:
    """Lower one `triton_convbn::fold`. Its arguments are `PackedPairs` of Inductor's tensors."""
    node = current_node()
    try:
        packed, example = PackedPairs(*arguments), PackedPairs(*examples(node.args))
        outputs: list[Tensor] = node.meta["val"]
        pairs = _checked(example.unpack())
        # The outputs get the strides of the graph's examples.
        pairs = [
            pair._replace(memory_format=_format_of(out))
            for pair, (out, *_) in zip(pairs, example.by_pair(outputs), strict=True)
        ]
        biases = _read_biases(node, example)
        specs = tuple(replace(spec_of(pair), out_bias=bias) for pair, bias in zip(pairs, biases, strict=True))
    except Unsupported as error:
        return call_operator(fold_op, arguments, error)
    packed = packed._replace(
        weights=as_in_graph(packed.weights, example.weights), vectors=as_in_graph(packed.vectors, example.vectors)
    )
    device = example.weights[0].device
    kernels = kernels_for(specs, device)
    boxes: Boxes = [None] * len(outputs)
    positions = packed.by_pair(range(len(outputs)))
    for part, _ in kernels:
        vectors = []
        for (weight, bias, power), is_read in zip(positions[part], biases[part], strict=True):
            boxes[weight] = empty(outputs[weight])
            if is_read:
                vectors.append(bias)
            else:
                boxes[bias] = empty(outputs[bias])  # which Inductor drops
            if power is not None:
                vectors.append(power)
        for position, box in zip(vectors, empty_vectors([outputs[position] for position in vectors]), strict=True):
            boxes[position] = box
    fields = [
        pair._asdict() | dict(zip(OUTPUTS, written, strict=True))
        for pair, written in zip(packed.unpack(), packed.by_pair(boxes), strict=True)
    ]
    launch(kernels, fields, device)
    return boxes


def _fold_backward(grads: Boxes, given: list[int], wanted: list[int], powers: Boxes, *rest: Any) -> Boxes:
    """Lower one `triton_convbn::fold_backward`."""
    node = current_node()
    arguments = (grads, given, wanted, powers, *rest)
    try:
        example_grads, _, _, _, *columns = examples(node.args)
        packed, example = PackedPairs(*rest), PackedPairs(*columns)
        outputs: list[Tensor] = node.meta["val"]
        pairs = _checked(example.unpack())
        needs = needs_of(wanted)
        grads, found = dense(grads, example_grads)
        every = zip(pairs, grad_pairs(found, given), needs, strict=True)
        specs = tuple(grad_spec_of(pair, *own, need) for pair, own, need in every)
    except Unsupported as error:
        return call_operator(fold_backward_op, arguments, error)
    packed = packed._replace(
        weights=as_in_graph(packed.weights, example.weights), vectors=as_in_graph(packed.vectors, example.vectors)
    )
    boxes = [empty(output) for output in outputs]
    written, fields = iter(boxes), []
    for pair, own, power, need in zip(
        packed.unpack(), grad_pairs(grads, given), packed.each_power(powers), needs, strict=True
    ):
        values: dict[str, Any] = pair._asdict()
        values |= {"grad_weight": own[0], "grad_bias": own[1], "power": power}
        values |= {f"d_{name}": next(written) for name, wants in need._asdict().items() if wants}
        fields.append(values)
    device = example.weights[0].device
    launch(kernels_for(specs, device), fields, device)
    return boxes


# ---- from Inductor's tensors to specs ------------------------------------------------------------------------------


def _read_biases(node: fx.Node, packed: PackedPairs) -> list[bool]:
    """Return for each pair of a fold whether its folded bias is read. A backward needs the folded weight alone.

    Inductor does not drop one output of a kernel. In ResNet-50's backward 53 biases were allocated and written, from
    106 arguments that served them alone.
    """
    outputs = packed.by_pair(range(len(node.meta["val"])))
    read = {user.args[1] if user.target is operator.getitem else None for user in node.users}
    return [None in read or bias in read for _, bias, _ in outputs]


def current_node() -> fx.Node:
    """Return the node that Inductor is lowering."""
    from torch._inductor.virtualized import V

    return V.graph.current_node


def examples(arguments: Any) -> Any:
    """Return the arguments of a node, with examples instead of nodes."""
    return fx.map_arg(arguments, lambda node: node.meta["val"])


def _checked(pairs: list[FoldInputs]) -> list[FoldInputs]:
    """Return the pairs. Raise Unsupported if no kernel can run on them."""
    if not pairs:
        raise Unsupported("no pairs")
    check_device(device_of(pairs))
    for pair in pairs:
        for tensor in pair[:6]:
            _check_static(tensor)
    return pairs


def check_device(device: torch.device) -> None:
    """Raise Unsupported if no kernel can run on it."""
    if device.type == "cpu":
        raise _OnCpu("no kernel runs on cpu")
    if interpreting() or not kernel_runs(device):
        raise Unsupported(f"no kernel runs on {device.type}")


def _check_static(tensor: Tensor | None) -> None:
    """Raise Unsupported for symbolic sizes or strides: a kernel's text has constants."""
    if tensor is not None and not all(isinstance(each, int) for each in (*tensor.shape, *tensor.stride())):
        raise Unsupported("a size that is not known when compiling")


def _format_of(tensor: Tensor) -> torch.memory_format:
    last = is_channels_last(tensor)
    if last is None:
        raise Unsupported(f"a folded weight with strides {tensor.stride()}")
    if not last:
        return torch.contiguous_format
    return torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d


def as_in_graph(boxes: Boxes, examples: Sequence[Tensor]) -> Boxes:
    """Return the tensors with the strides of the graph, copied if Inductor has chosen others."""
    from torch._inductor.ir import ExternKernel

    return [
        ExternKernel.require_exact_strides(box, list(example.stride()))
        for box, example in zip(boxes, examples, strict=True)
    ]


def dense(grads: Boxes, examples: Sequence[Tensor]) -> tuple[Boxes, list[Tensor]]:
    """Return the memory of the gradients, and examples of them in the layouts that Inductor has chosen.

    A gradient that is neither contiguous nor channels_last, such as an expanded one, is copied.
    """
    from torch._inductor.ir import ExternKernel
    from torch._inductor.lowering import TensorBox
    from torch._inductor.virtualized import V

    boxes: Boxes = []
    found: list[Tensor] = []
    for grad, example in zip(grads, examples, strict=True):
        _check_static(example)
        value = ExternKernel.realize_input(grad)
        value.freeze_layout()
        with V.fake_mode:
            as_laid_out = torch.empty_strided(
                tuple(example.shape),
                tuple(int(stride) for stride in value.get_stride()),
                dtype=example.dtype,
                device=example.device,
            )
        if is_channels_last(as_laid_out) is None:
            value = ExternKernel.require_contiguous(value)
            as_laid_out = torch.empty_like(as_laid_out, memory_format=torch.contiguous_format)
        boxes.append(value if isinstance(value, TensorBox) else TensorBox(value))
        found.append(as_laid_out)
    return boxes, found


def call_operator(operator: Any, arguments: Sequence[Any], error: Unsupported) -> Boxes:
    """Lower to a call of the operator, as Inductor does for operators without a lowering."""
    from torch._inductor.lowering import constrain_to_fx_strides, fallback_handler

    if not isinstance(error, _OnCpu):
        count(f"operator:{error}")
    if torch.Tag.flexible_layout not in operator.tags:
        arguments, _ = constrain_to_fx_strides(current_node(), *arguments)
    return fallback_handler(operator, add_to_fallback_set=False)(*arguments)
