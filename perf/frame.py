"""Read the benchmark's CSVs as a DataFrame, keep the row that counts for every key, and label metrics and figures."""

import math
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from triton_convbn.errors import UsageError, choose

from .results import COLUMNS, OTHER_KINDS, PROVIDER_ORDER, Key, Row, read_rows

RATIO = "time_over_"

METRICS = {
    "time": "time",
    "time_over_eager": "time / eager",
    "time_over_inductor": "time / inductor",
    "time_over_inductor_efficient_conv_bn": "time / inductor_efficient_conv_bn",
    "saved_for_backward": "kept for backward",
    "saved_over_eager": "kept / eager",
    "saved_over_inductor": "kept / inductor",
    "saved_over_inductor_efficient_conv_bn": "kept / inductor_efficient_conv_bn",
    "peak_memory": "peak memory",
    "compile_time": "compile time",
    "output_error": "output error",
    "gradient_error": "gradient error",
    "output_error_over_eager": "output error / eager",
    "gradient_error_over_eager": "gradient error / eager",
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

LINE = Key._fields
"""The columns that all metrics of one run share."""

KEY = (*LINE, "metric")
NUMBERS = ["p50", "p20", "p80"]
LOST = ("failed", "skipped")
ENVIRONMENT = ("device", "torch", "triton")
"""The columns that tell measurements of one key apart. A later commit replaces an earlier one."""


def read(paths: Iterable[Path], filters: Iterable[str] = ()) -> pd.DataFrame:
    """Read the rows of all files, in their order, as `to_frame` returns them.

    Args:
        filters: Columns and their values, such as `case=resnet18,resnet50`. Rows that do not pass all are left out.

    Raises:
        UsageError: If a file cannot be read or has no row, or no row passes.
    """
    rows: list[Row] = []
    for path in paths:
        found = read_rows(path)
        if not found:
            raise UsageError(f"{path} holds no row")
        rows += found
    frame, filters = to_frame(rows), list(filters)
    for each in filters:
        column, _, values = each.partition("=")
        choose("column", [column], COLUMNS)
        frame = frame[frame[column].astype(str).isin(values.split(","))]
    if frame.empty:
        raise UsageError(f"no row has {' '.join(filters)}")
    return frame


def to_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Return the rows with a column `kind`: measured, or one of `OTHER_KINDS`.

    Failed and skipped rows have no number, and a row without a number has failed. Never show rows of two kinds
    together.
    """
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame[NUMBERS] = frame[NUMBERS].astype(float).where(frame[NUMBERS].abs() != float("inf"))
    # The device decides too: a failed plan is not a failed measurement.
    frame["kind"] = "measured"
    for kind in OTHER_KINDS:
        frame.loc[(frame["status"] == kind) | frame["device"].str.endswith(f"({kind})"), "kind"] = kind
    lost = frame["status"].isin(LOST)
    frame.loc[frame["p50"].isna() & ~lost, ["status", "error"]] = "failed", "no finite number"
    frame.loc[lost, NUMBERS] = float("nan")  # an error above its limit fails and has a number
    return frame


def latest(frame: pd.DataFrame, where: tuple[str, ...] = ENVIRONMENT) -> pd.DataFrame:
    """Return the last row of every key, kind and environment, in the order of the first; `where` is the environment.

    The rows `<metric>_low` and `<metric>_high` become the columns `low` and `high` of the row `<metric>` of the same
    commit: the 95 % confidence interval of its median, NaN if there is none. The column `network` is that of a layer:
    `resnet50` of the case `resnet50/layer1.0.conv1`. It is empty for a whole model.
    """
    line = [*LINE, "kind", *where]
    frame = frame.reset_index(drop=True)
    # A failure at a later commit invalidates the earlier figures of the same run, its ratios for example.
    failures = frame.index.to_series().where(frame["status"] == "failed")
    last = failures.groupby([frame[column] for column in line]).transform("max")
    frame = frame[~((frame.index < last) & (frame["commit"] != last.map(frame["commit"])))]
    first = frame.index.to_series().groupby([frame[column] for column in (*line, "metric")]).transform("min")
    frame = frame.assign(first=first).drop_duplicates([*line, "metric"], keep="last").sort_values("first")
    bound = frame["metric"].str.extract(rf"^(?P<metric>{RATIO}.+)_(?P<end>low|high)$")
    rows, keys = frame[bound["end"].isna()].drop(columns="first"), [*KEY, "kind", *ENVIRONMENT, "commit"]
    for end in ("low", "high"):
        side = frame[bound["end"] == end].assign(metric=bound["metric"])[[*keys, "p50"]]
        rows = rows.merge(side.rename(columns={"p50": end}), on=keys, how="left")
    return rows.assign(network=[case.rpartition("/")[0] for case in rows["case"]])


def label(metric: str, unit: str = "") -> str:
    """Return the title of a column or an axis."""
    return METRICS.get(metric, metric.replace("_", " ")) + (f" ({unit})" if unit else "")


def providers(found: Iterable[str]) -> list[str]:
    """Return each provider once, in the order in which they are shown."""
    places = {name: place for place, name in enumerate(PROVIDER_ORDER)}
    return sorted(dict.fromkeys(found), key=lambda name: places.get(name, len(places)))


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
