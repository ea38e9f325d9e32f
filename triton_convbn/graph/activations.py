"""Tell which activations need their input for the gradient.

ReLU, sigmoid and tanh know it from their output, which the next convolution keeps anyway. A fold before them saves the
convolution's output. SiLU or PReLU need their input. Before them BatchNorm's scale needs the convolution's output, the
activation needs BatchNorm's, and each is a function of the other: one is kept, with a fold or without.

This decides what is profitable and never what is right, so functions, methods, modules and operators are told apart by
their names.
"""

from torch import fx

from .dialects import read_passthrough

_NEED_INPUT = frozenset(
    [
        "celu",
        "clamp",
        "clampmax",
        "clampmin",
        "clip",
        "cos",
        "elu",
        "erf",
        "gelu",
        "glu",
        "hardshrink",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "leakyrelu",
        "logsigmoid",
        "mish",
        "pow",
        "prelu",
        "relu6",
        "rrelu",
        "selu",
        "silu",
        "sin",
        "softplus",
        "softshrink",
        "softsign",
        "square",
        "tanhshrink",
        "threshold",
    ]
)
_PRODUCTS = ("div", "imul", "itruediv", "mul", "multiply", "truediv")


def needs_input(node: fx.Node) -> bool:
    """Return whether some reader of the node needs it for its own gradient."""
    waiting, seen = [node], {node}
    while waiting:
        for user in waiting.pop().users:
            if read_passthrough(user) is not None:
                waiting += {user} - seen
                seen.add(user)
                continue
            name = _name(user)
            is_product = name in _PRODUCTS and not any(isinstance(each, int | float) for each in user.args)
            if name in _NEED_INPUT or is_product:
                return True
    return False


def _name(node: fx.Node) -> str:
    """Return what a node calls, in lower case and without underscores: leakyrelu."""
    target = node.target
    if node.op == "call_module":
        owner = node.graph.owning_module
        target = type(owner.get_submodule(str(target))) if owner is not None else target
    name = target if isinstance(target, str) else getattr(getattr(target, "overloadpacket", target), "__name__", "")
    return name.lower().replace("_", "")
