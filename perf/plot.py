"""Plots of the benchmark's rows, with matplotlib: no window, no state, the same file for the same rows."""

import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from triton_convbn.errors import UsageError, choose, pip_install, usage_error_from

from .frame import ENVIRONMENT, LINE, METRICS, RATIO, label, latest, number, providers, read, scale, source
from .results import PROVIDER_ORDER

try:
    from matplotlib import style
    from matplotlib.figure import Figure
except ImportError as error:
    raise UsageError(f"plots need matplotlib: {pip_install('plot')}") from error

RESULTS = Path("perf/results")
MEMORY = ("saved_for_backward", "peak_memory")
README = {
    "CPU, fp32, contiguous, batch 4": "cpu.csv dtype=float32 layout=contiguous batch=4",
    "H200, bf16 autocast, channels_last, batch 32": (
        "gpu_h200.csv dtype=autocast_bfloat16 layout=channels_last batch=32"
    ),
}
"""The panels of README's picture: file and setting by title."""

# Okabe and Ito's colours for the colour-blind, with greys, and without yellow, which is invisible on white. The first
# providers have the same colour in every plot. The others are brown, and differ by their hatching.
COLOURS = ("#000000", "#6e6e6e", "#a8a8a8", "#e69f00", "#d55e00", "#cc79a7", "#0072b2", "#56b4e9", "#009e73")
OTHERS = "#7b4a2d"
HATCHES = ("", "////", "....", "xxxx")
STYLE = {
    "svg.hashsalt": "triton_convbn",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def plots(frame: pd.DataFrame, out: Path, formats: Sequence[str], metrics: Sequence[str] = ()) -> list[Path]:
    """Draw every plot of the rows, replace the files that exist, and return the files.

    Args:
        frame: Rows as `frame.read` returns them.
        formats: Of png and svg.
        metrics: Names as in the CSV, see `figures`.

    Raises:
        UsageError: If no row has a metric, nothing is drawn, or `out` is not writable.
    """
    choose("metric", metrics, sorted(set(frame["metric"])))
    taken: Counter[str] = Counter()
    written = []
    with style.context(["default", STYLE]):
        for name, figure in figures(latest(frame), metrics):
            taken[name] += 1  # file names cannot hold every difference between two cases
            name = name if taken[name] == 1 else f"{name}-{taken[name]}"
            written += [_write(figure, out / f"{name}.{ending}") for ending in formats]
    if not written:
        raise UsageError("nothing to plot: no row has a number of a metric that is drawn; --metric names another")
    return written


def memory(path: Path) -> Path:
    """Draw the bytes that a training step of ResNet-50 keeps for backward, from the committed CSVs: README's picture.

    Text stays text in the SVG.
    """
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(4.4 * len(README), 2.4), layout="constrained")
        figure.suptitle("Kept for backward by a training step of ResNet-50", fontsize=11, x=0.01, ha="left")
        for axes, (title, setting) in zip(figure.subplots(1, len(README)), README.items(), strict=True):
            file, *filters = setting.split()
            filters += ["case=resnet50", "mode=train", f"metric={MEMORY[0]}"]
            rows = latest(read([RESULTS / file], filters)).dropna(subset="p50").set_index("provider")
            rows = rows.loc[providers(rows.index)[::-1]]
            divisor, unit = scale(rows)
            colours = [_look(name, rows.index)["color"] for name in rows.index]
            bars = axes.barh(rows.index, rows["p50"] / divisor, color=colours)
            axes.bar_label(bars, [number(value / divisor) for value in rows["p50"]], padding=3)
            axes.set_title(f"{title} ({unit})", fontsize=9, loc="left")
            axes.grid(visible=False)
            axes.spines["bottom"].set_visible(False)
            axes.set_xticks([])
        return _write(figure, path)


def figures(frame: pd.DataFrame, metrics: Sequence[str] = ()) -> Iterator[tuple[str, Figure]]:
    """Yield each plot with the name of its file; rows of two kinds or environments are never in one.

    A whole model has each metric by batch size: by default the ratios of times, the bytes kept for backward and the
    peak. A network's layers have, by default, the ratios.
    """
    environments = frame[["kind", *ENVIRONMENT]].drop_duplicates()
    alone = len(environments) == environments["kind"].nunique()
    ratios = [metric for metric in dict.fromkeys(frame["metric"]) if metric.startswith(RATIO)]
    for (kind, *where), rows in frame.groupby(["kind", *ENVIRONMENT], sort=False):
        around = ["" if kind == "measured" else kind, *([] if alone else where)]
        # Failed runs that have no row of the metric: a plot says what is not in it.
        failed = rows[(rows["status"] == "failed") & ~rows["metric"].isin(METRICS)]
        for metric in metrics or [*ratios, *MEMORY]:
            found = pd.concat([rows[rows["metric"] == metric], failed.assign(metric=metric, unit="")])
            shown = found.drop_duplicates(list(LINE))
            shown = shown[shown["provider"] != metric.removeprefix(RATIO)].sort_values("batch", kind="stable")
            for key, part in shown[shown["network"] == ""].groupby(["case", "mode"], sort=False):
                if part["p50"].notna().any():
                    group = "batch " + part["batch"].astype(str)
                    yield _name(*around, *key, metric), draw(part.assign(group=group), key)
            columns = ["network", "mode", "dtype", "layout", "batch"]
            for (network, mode, dtype, layout, batch), part in shown.groupby(columns, sort=False):
                if network and part["p50"].notna().any() and (metrics or metric in ratios):
                    name = _name(*around, network, "layers", mode, dtype, layout, f"batch{batch}", metric)
                    title = f"layers of {network}", mode, f"batch {batch}" if batch else ""
                    yield name, draw(part.assign(group=part["case"].str.removeprefix(f"{network}/")), title)


def draw(rows: pd.DataFrame, title: Sequence[str]) -> Figure:
    """Draw one metric as bars: a panel for each dtype and layout, a group of bars for each value of the column `group`.

    Error bars are the 95 % confidence interval of a ratio's median, or the 20 % to 80 % range. A provider that failed
    has the status in place of its bar.
    """
    shown, (divisor, unit) = providers(rows["provider"]), scale(rows)
    groups, metric, height = list(dict.fromkeys(rows["group"])), rows["metric"].iloc[0], 0.8 / len(shown)
    low, high = ("low", "high") if rows["low"].notna().any() else ("p20", "p80")
    rows = rows.assign(
        figure=rows["p50"] / divisor,
        below=((rows["p50"] - rows[low]) / divisor).clip(lower=0).fillna(0),
        above=((rows[high] - rows["p50"]) / divisor).clip(lower=0).fillna(0),
        y=rows["group"].map(groups.index) + height * (rows["provider"].map(shown.index) + 0.5) - 0.4,
    )
    parts = list(rows.groupby(["dtype", "layout"], sort=False))
    size = max(8.2, 4.1 * len(parts)), 1.5 + len(groups) * (0.17 * len(shown) + 0.16)
    figure = Figure(figsize=size, layout="constrained")
    for axes, (key, part) in zip(figure.subplots(1, len(parts), squeeze=False, sharex=True).flat, parts, strict=True):
        for provider in shown:
            own = part[part["provider"] == provider]
            axes.barh(own["y"], own["figure"], height * 0.92, label=provider, **_look(provider, shown))
        for colour, line in ("white", 2.4), ("#333333", 0.9):  # white makes the other visible on a dark bar
            ends = part[["below", "above"]].to_numpy().T
            axes.errorbar(part["figure"], part["y"], xerr=ends, fmt="none", ecolor=colour, elinewidth=line)
        for lost in part[part["figure"].isna()].itertuples():
            axes.text(0, lost.y, f" {lost.provider}: {lost.status}", va="center", fontsize=6.5, color="#333333")
        axes.set_title(", ".join(filter(None, key)), fontsize=9)
        axes.set_yticks(range(len(groups)), groups)
        axes.set(xlabel=label(metric, unit), xlim=(0, None), ylim=(len(groups) - 0.45, -0.55))
        if metric.startswith(RATIO):
            axes.axvline(1, color="#444444", linewidth=1, linestyle="--")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    kind = rows["kind"].iloc[0]
    mark = {"measured": "", "stubbed": " (STUBBED DRIVER)"}.get(kind, f" ({kind.upper()}, NOT MEASURED)")
    heading = textwrap.fill(", ".join(filter(None, title)) + mark, int((size[0] - 2.3) * 12))
    figure.suptitle(heading, fontsize=11, x=0.01, ha="left")  # the legend takes the right upper corner
    bars = "95 % confidence interval of the median" if low == "low" else "20 % to 80 % range"
    spreads = (rows["below"] + rows["above"] > 0).any()
    footer = textwrap.fill(source(rows) + "." + (f" Error bars: {bars}." if spreads else ""), int(size[0] * 16))
    figure.supxlabel(footer, fontsize=7, color="#444444", x=0.01, ha="left")
    return figure


def _look(provider: str, shown: Sequence[str]) -> dict[str, str]:
    known = dict(zip(PROVIDER_ORDER, COLOURS, strict=False))
    if provider in known:
        return {"color": known[provider]}
    others = [name for name in shown if name not in known]
    return {"color": OTHERS, "hatch": HATCHES[others.index(provider) % len(HATCHES)], "edgecolor": "white"}


def _name(*parts: Any) -> str:
    return "-".join(filter(None, (re.sub(r"[^A-Za-z0-9._]+", "-", str(part)).strip("-.") for part in parts)))


def _write(figure: Figure, path: Path) -> Path:
    """Write the file, without a date or a version."""
    metadata = {"Software": None} if path.suffix == ".png" else {"Date": None, "Creator": None}
    with usage_error_from(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata=metadata)
    return path
