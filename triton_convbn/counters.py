"""Count what the pass does, in torch's own counters (`torch._dynamo.utils.counters`).

``["triton_convbn"]["folded"]`` and ``["declined:<reason>"]`` count BatchNorms. One that folds into several convolutions
counts once. ``["folded_forward"]`` counts those that fold into the layer after them, which ``["folded"]`` includes.
``["merged"]`` and ``["not_merged:<reason>"]`` count sums of branches.
``["operator:<why>"]`` counts folds that Inductor calls as an operator instead of launching their kernels.
``["decomposed:<why>"]`` counts folds that plain torch computes because the kernels do not support them.
``["inductor"]["efficient_conv_bn_eval"]`` counts folds too, as Inductor's own pass does.
A graph from autograd's cache has been through no pass in this process, and counts nothing.
"""

import functools
import logging
from typing import Any

log = logging.getLogger("triton_convbn")


def count(name: str, group: str = "triton_convbn") -> None:
    """Add one to a counter of ``torch._dynamo.utils.counters``."""
    from torch._dynamo.utils import counters  # lazy: importing takes a second

    counters[group][name] += 1


def log_cache_hits() -> None:
    """Log the first graph of this process that comes from autograd's cache. Dynamo's reset undoes this."""
    from torch._dynamo.callback import callback_handler

    if _log_hit not in callback_handler.end_callbacks:
        callback_handler.register_end_callback(_log_hit)


def _log_hit(_compiled: Any) -> None:
    from torch._dynamo.utils import counters

    if counters["aot_autograd"]["autograd_cache_hit"]:
        _log_once("a graph came from autograd's cache, where no pass runs: the counters do not have its folds")


@functools.cache
def _log_once(message: str) -> None:
    log.info(message)
