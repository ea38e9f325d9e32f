"""What the pass counts, in torch's own counters (`torch._dynamo.utils.counters`).

``["triton_convbn"]["folded"]`` and ``["declined:<reason>"]`` count BatchNorms, one that folds into several convolutions
once. ``["operator:<why>"]`` counts folds that Inductor calls as an operator instead of launching them.
``["decomposed:<why>"]`` counts folds that the kernels do not take, so that plain torch computes them.
``["inductor"]["efficient_conv_bn_eval"]`` counts what folds too, as the host's own pass does.
"""


def count(name: str, group: str = "triton_convbn") -> None:
    from torch._dynamo.utils import counters  # a second of imports, for those who never count

    counters[group][name] += 1
