"""The names, units and order in which tables and plots show providers, metrics and figures."""

import math
from collections.abc import Iterable

import pandas as pd

RATIO = "time_over_"

PROVIDERS = (
    *("eager", "eager_folded", "frozen_bn"),
    *("inductor", "inductor_efficient_conv_bn", "inductor_freezing"),
    *("inductor_reduce_overhead", "inductor_efficient_conv_bn_reduce_overhead"),
    *("triton_convbn", "triton_convbn_always", "triton_convbn_keep", "triton_convbn_freezing"),
    *("triton_convbn_reduce_overhead", "triton_convbn_eager"),
)
"""In the order of every table and legend; unknown providers follow."""

METRICS = {
    "time": "time",
    "time_over_eager": "time / eager",
    "time_over_inductor": "time / inductor",
    "time_over_inductor_efficient_conv_bn": "time / inductor_efficient_conv_bn",
    "saved_for_backward": "kept for backward",
    "peak_memory": "peak memory",
    "compile_time": "compile time",
    "output_error": "output error",
    "gradient_error": "gradient error",
    "pairs_folded": "pairs folded",
    "launches_forward": "launches, forward",
    "launches_backward": "launches, backward",
    "folds_forward": "fold launches, forward",
    "folds_backward": "fold launches, backward",
    "convolutions": "convolutions",
    "bytes_forward": "moved in forward",
    "bytes_backward": "moved in backward",
    "gpu_time": "time on the GPU",
    "kernels": "kernels",
    "host": "host time",
    "latency": "latency",
    "throughput": "ms a step, without waiting",
    "host_time": "host time",
    "operator_calls": "Python operators",
    "share_of_copy_of_same_size": "bandwidth / copy of that size",
    "time_over_separate": "time / separate kernels",
    "time_min": "shortest time",
    "time_rounds": "timed rounds",
}
"""In the order of the columns of a table."""


def label(metric: str, unit: str = "") -> str:
    """Return the title of a column or an axis."""
    return METRICS.get(metric, metric.replace("_", " ")) + (f" ({unit})" if unit else "")


def providers(found: Iterable[str]) -> list[str]:
    """Return each provider once, in the order in which they are shown."""
    unique = list(dict.fromkeys(found))
    return sorted(unique, key=lambda name: PROVIDERS.index(name) if name in PROVIDERS else len(PROVIDERS))


def group(case: str) -> str:
    """Return the network of a layer: `resnet50` of `resnet50/layer1.0.conv1`; empty for a whole model."""
    return case.rpartition("/")[0]


def scale(rows: pd.DataFrame) -> tuple[float, str]:
    """Return the divisor and the unit that make a metric's rows readable: bytes become kB or MB."""
    known = rows[rows["p50"].notna()]  # an early failure may not know its unit
    unit = (known if len(known) else rows)["unit"].iloc[0]
    largest = float(known["p50"].abs().max()) if len(known) else 0.0
    if unit == "bytes":
        return next(((size, name) for size, name in ((1e6, "MB"), (1e3, "kB")) if largest >= size), (1.0, "bytes"))
    return 1.0, "" if unit in ("1", "launches", "pairs") else unit


def number(value: float) -> str:
    """Return three significant digits, and every digit of a whole number."""
    if value == int(value):
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def source(rows: pd.DataFrame) -> str:
    """Return where rows of one kind and environment were measured, or what they are instead."""
    (kind,), (device,) = set(rows["kind"]), set(rows["device"])
    device = device.removesuffix(f"({kind})").strip() or "a device without a name"
    what = {
        "measured": f"Measured on {device}",
        "planned": f"Not measured: planned for {device}",
        "interpreted": f"Not measured: interpreted on {device}",
        "compiled": f"Not measured: compiled for {device}",
        "stubbed": f"Measured on {device} under a CUDA driver that does nothing",
    }[kind]
    versions = {column: list(filter(None, dict.fromkeys(rows[column]))) for column in ("torch", "triton", "commit")}
    return ", ".join([what, *(f"{name} {' and '.join(found)}" for name, found in versions.items() if found)])
