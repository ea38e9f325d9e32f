"""Lower `triton_convbn::merge` and `triton_convbn::merge_backward` to launches, see `lower_to_triton`."""

import functools
from typing import Any

from torch import Tensor

from ..kernels.inputs import Unsupported
from ..kernels.merge_inputs import merge_grad_spec_of, merge_spec_of
from ..ops.merge_library import merge_backward_op, merge_op
from ..ops.merge_plan import PackedSums, Wanted, fields_of, merge_kernels
from .launches import Boxes, empty, launch
from .lower_to_triton import as_in_graph, call_operator, check_device, current_node, dense, examples


@functools.cache
def register() -> None:
    """Register the lowerings of both operators with Inductor, once a process."""
    from torch._inductor.lowering import register_lowering

    register_lowering(merge_op, type_promotion_kind=None, broadcast=False)(_merge)
    register_lowering(merge_backward_op, type_promotion_kind=None, broadcast=False)(_merge_backward)


def _merge(*arguments: Any) -> Boxes:
    """Lower one `triton_convbn::merge`. Its arguments are `PackedSums` of Inductor's tensors."""
    node = current_node()
    example = PackedSums(*examples(node.args))
    outputs: list[Tensor] = node.meta["val"]
    try:
        check_device(example.weights[0].device)
        specs = tuple(merge_spec_of(*one) for one in example.unpack())
    except Unsupported as error:
        return call_operator(merge_op, arguments, error)
    boxes = [empty(output) for output in outputs]
    fields = [own | {"out": box} for own, box in zip(_read(arguments, example), boxes, strict=True)]
    launch(merge_kernels(specs), fields, example.weights[0].device)
    return boxes


def _merge_backward(grads: Boxes, wanted: list[int], *rest: Any) -> Boxes:
    """Lower one `triton_convbn::merge_backward`."""
    node = current_node()
    example_grads, _, *given = examples(node.args)
    example = PackedSums(*given)
    outputs: list[Tensor] = node.meta["val"]
    needs = [Wanted.of(mask, number) for mask, number in zip(wanted, example.counts, strict=True)]
    try:
        check_device(example.weights[0].device)
        sums = [merge_spec_of(*one) for one in example.unpack()]
        boxes, found = dense(grads, example_grads)
        every = zip(sums, found, needs, strict=True)
        specs = tuple(merge_grad_spec_of(one, grad, *need) for one, grad, need in every)
    except Unsupported as error:
        return call_operator(merge_backward_op, (grads, wanted, *rest), error)
    written = [empty(output) for output in outputs]
    names = iter(written)
    fields = _read(rest, example)
    for own, grad, need in zip(fields, boxes, needs, strict=True):
        own["grad"] = grad
        own |= {f"d_weight_{k}": next(names) for k, wants in enumerate(need.weights) if wants}
        own |= {"d_scales": next(names)} if need.scales else {}
    launch(merge_kernels(specs), fields, example.weights[0].device)
    return written


def _read(arguments: Any, example: PackedSums) -> list[dict[str, Any]]:
    """Return the weights and scales of each sum by field, with the strides of the graph."""
    packed = PackedSums(*arguments)
    weights = packed.each(as_in_graph(packed.weights, example.weights))
    scales = as_in_graph(packed.scales, example.scales)
    return [fields_of(*own) for own in zip(weights, scales, strict=True)]
