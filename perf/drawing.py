"""The two kinds of plots, a metric against the batch size and by layer, as matplotlib figures. Nothing is written."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from .labels import PROVIDERS, label, providers, scale, source

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RATIO = "time_over_"

# Okabe and Ito's colours, which the colour-blind tell apart, without their yellow, which white paper swallows, and two
# greys. A provider has its own in every plot, and a marker besides.
_COLOURS = ("#000000", "#6e6e6e", "#a8a8a8", "#e69f00", "#d55e00", "#cc79a7", "#0072b2", "#56b4e9", "#009e73")
_MARKERS = "Xs^DvhoP*"
STYLE = {
    "svg.hashsalt": "triton_convbn",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 150,
}


def by_batch(rows: pd.DataFrame) -> "Figure":
    """One metric of one case and mode against the batch size, a panel for each dtype and layout."""
    panels = list(rows.groupby(["dtype", "layout"], sort=False))
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = _figure(3.3 * columns + 2.6, 2.7 * lines + 1.1)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    metric, unit = rows["metric"].iloc[0], rows.loc[rows["p50"].notna(), "unit"].iloc[0]
    shown = providers(rows["provider"])
    divisor, unit = scale(float(rows["p50"].max()), unit)
    batches, ratio = sorted(set(rows["batch"])), metric.startswith(RATIO)
    ends = _ends(rows)
    named = ratio or len(batches) == 1  # on the axis: names side by side, not numbers
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (key, part) in zip(grid.flat, panels, strict=False):
        axes.set_title(", ".join(filter(None, map(str, key))), fontsize=9)
        for index, provider in enumerate(shown):
            own = part[(part["provider"] == provider) & part["p50"].notna()].sort_values("batch")
            # Points of one batch a little apart, so that error bars do not hide one another; on an axis of numbers,
            # where that would be wrong, what lies under another one is wider and can be seen behind it.
            wider = 0.0 if ratio else 3 * (1 - (index + 1) / len(shown))
            apart = 0.3 * ((index + 0.5) / len(shown) - 0.5)
            x = [batches.index(batch) + apart if named else batch for batch in own["batch"]]
            colour, marker = _look(provider, shown)
            axes.errorbar(
                x,
                own["p50"] / divisor,
                yerr=_bars(own, ends, divisor),
                label=provider,
                color=colour,
                marker=marker,
                markersize=5 + wider,
                linewidth=1.4 + wider,
                elinewidth=1,
                capsize=2.5,
            )
        axes.set_xlabel("batch size")
        axes.grid(visible=False, axis="x")
        if named:
            axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
            axes.set_xlim(-0.4, len(batches) - 0.6)
        else:  # bytes and times grow with the batch: a straight line is to look like one
            axes.set_xticks(_spaced(batches))
            axes.set_xlim(left=-0.03 * batches[-1])
        if ratio:
            axes.axhline(1, color="#444444", linewidth=1, linestyle="--", zorder=1)
    if not ratio:  # only now: it ends the scaling of the axis that all panels share
        grid.flat[0].set_ylim(bottom=0)
    for axes in grid[:, 0]:
        axes.set_ylabel(label(metric) + (f" ({unit})" if unit else ""))
    _legend(figure, grid.flat[0])
    _words(figure, rows, ", ".join(filter(None, (rows["case"].iloc[0], rows["mode"].iloc[0]))))
    return figure


def _spaced(batches: Sequence[int]) -> list[int]:
    """Those that have room for their number on an axis from 0, from the largest down."""
    kept: list[int] = []
    for batch in reversed(batches):
        if not kept or kept[-1] - batch >= 0.08 * batches[-1]:
            kept.append(batch)
    return kept[::-1]


def by_layer(rows: pd.DataFrame) -> "Figure":
    """One metric of the layers of one network: a group of bars for each layer, a bar for each provider."""
    layers, shown = list(dict.fromkeys(rows["case"])), providers(rows["provider"])
    figure = _figure(8.2, 1.5 + len(layers) * (0.17 * len(shown) + 0.16))
    axes = figure.subplots()
    metric, unit = rows["metric"].iloc[0], rows.loc[rows["p50"].notna(), "unit"].iloc[0]
    divisor, unit = scale(float(rows["p50"].max()), unit)
    ends, height = _ends(rows), 0.8 / len(shown)
    for index, provider in enumerate(shown):
        own = rows[rows["provider"] == provider]
        y = [layers.index(case) + height * (index + 0.5) - 0.4 for case in own["case"]]
        axes.barh(y, own["p50"] / divisor, height * 0.92, label=provider, color=_look(provider, shown)[0])
        for colour, width in ("white", 2.4), ("#333333", 0.9):  # the first shows the second on a dark bar
            axes.errorbar(
                own["p50"] / divisor, y, xerr=_bars(own, ends, divisor), fmt="none", ecolor=colour, elinewidth=width
            )
        for at, status in zip(y, own["status"], strict=True):
            if status in ("failed", "skipped"):
                axes.text(0, at, f" {provider}: {status}", va="center", fontsize=6.5, color="#333333")
    axes.set_yticks(range(len(layers)), [layer.rpartition("/")[2] for layer in layers])
    axes.set_ylim(len(layers) - 0.45, -0.55)
    axes.set_xlim(left=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(label(metric) + (f" ({unit})" if unit else ""))
    if metric.startswith(RATIO):
        axes.axvline(1, color="#444444", linewidth=1, linestyle="--")
    _legend(figure, axes)
    head = rows.iloc[0]
    batch = f"batch {head['batch']}" if head["batch"] else ""
    parts = f"layers of {head['group']}", head["mode"], head["dtype"], head["layout"], batch
    _words(figure, rows, ", ".join(filter(None, parts)))
    return figure


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _ends(rows: pd.DataFrame) -> tuple[str, str]:
    """The columns where the error bars of a plot end: confidence intervals where it has any, or the spread."""
    return ("low", "high") if rows["low"].notna().any() else ("p20", "p80")


def _bars(rows: pd.DataFrame, ends: tuple[str, str], divisor: float) -> tuple[pd.Series, pd.Series] | None:
    """How far the error bars reach below and above; None where no figure has a spread."""
    low, high = ends
    below, above = rows["p50"] - rows[low].fillna(rows["p50"]), rows[high].fillna(rows["p50"]) - rows["p50"]
    return (below.clip(lower=0) / divisor, above.clip(lower=0) / divisor) if (above + below > 0).any() else None


def _look(provider: str, shown: Sequence[str]) -> tuple[str, str]:
    """Colour and marker; all providers that are not known here are brown."""
    if provider in PROVIDERS:
        index = PROVIDERS.index(provider)
        return _COLOURS[index], _MARKERS[index]
    others = [name for name in shown if name not in PROVIDERS]
    return "#7b4a2d", "p<>8"[others.index(provider) % 4]


def _legend(figure: "Figure", axes: "Axes") -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")


def _words(figure: "Figure", rows: pd.DataFrame, title: str) -> None:
    """The title, and below the plot where it was measured, or that it was not, and what is missing."""
    kind = rows["kind"].iloc[0]
    marks = {"measured": "", "stubbed": " (STUBBED DRIVER)"}
    title += marks.get(kind, f" ({kind.upper()}, NOT MEASURED)")
    width = figure.get_figwidth()
    # The legend has the right upper corner.
    figure.suptitle(textwrap.fill(title, int((width - 2.3) * 12)), fontsize=11, x=0.01, ha="left")
    text = source(rows) + "."
    if _bars(rows, _ends(rows), 1) is not None:
        interval = "low" in _ends(rows)
        text += f" Error bars: {'95 % confidence interval of the median' if interval else '20 % to 80 % range'}."
    gone = rows[rows["p50"].isna()]
    if len(gone) and not rows["case"].str.contains("/").any():
        cells = gone[["provider", "dtype", "layout", "batch", "status"]].to_dict("records")
        text += f" No point: {'; '.join(' '.join(str(v) for v in cell.values() if v) for cell in cells)}."
    figure.supxlabel(textwrap.fill(text, int(width * 16)), fontsize=7, color="#444444", x=0.01, ha="left")
