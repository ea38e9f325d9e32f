"""Count what the pass does, in torch's own counters (`torch._dynamo.utils.counters`).

``["triton_convbn"]["folded"]`` and ``["declined:<reason>"]`` count BatchNorms. One that folds into several convolutions
counts once. ``["merged"]`` and ``["not_merged:<reason>"]`` count sums of branches.
``["operator:<why>"]`` counts folds that Inductor calls as an operator instead of launching their kernels.
``["decomposed:<why>"]`` counts folds that plain torch computes because the kernels do not support them.
``["inductor"]["efficient_conv_bn_eval"]`` counts folds too, as Inductor's own pass does.
"""


def count(name: str, group: str = "triton_convbn") -> None:
    from torch._dynamo.utils import counters  # a second of imports, for those who never count

    counters[group][name] += 1
