"""Plots made from the benchmark's CSV, with matplotlib: no window, no state, the same file for the same rows."""

import io
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from triton_convbn.kernels.files import write_atomically

from triton_convbn.errors import UsageError

from .frame import ENVIRONMENT, LINE, check_metrics, latest
from .labels import METRICS, PROVIDERS, RATIO, group, label, number, providers, scale, source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
MEMORY = ("saved_for_backward", "peak_memory")

# Okabe and Ito's colours, which the colour-blind tell apart, without their yellow, which white paper swallows, and with
# greys. A provider has the same colour and marker in every plot.
_COLOURS = ("#000000", "#6e6e6e", "#a8a8a8", "#e69f00", "#d55e00", "#cc79a7", "#0072b2", "#56b4e9", "#009e73")
_MARKERS = "Xs^DvhoP*"
STYLE = {
    "svg.hashsalt": "triton_convbn",
    "svg.fonttype": "none",
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


def plots(frame: pd.DataFrame, out: Path, formats: Sequence[str] = FORMATS, metrics: Sequence[str] = ()) -> list[Path]:
    """Draw every plot of the rows, replace the files that exist, and return the files.

    A whole model has each metric against the batch size: by default the ratios of times, the bytes kept for backward
    and the peak. The layers of a network have bars, by default of the ratios. Error bars are the 95 % confidence
    interval of a ratio's median, and the 20 % to 80 % range of other figures.

    Args:
        frame: as `frame.read` returns it.
        formats: of FORMATS.
        metrics: names as in the CSV.

    Raises: UsageError if matplotlib is missing, no row has a metric, nothing is drawn, or `out` is not writable.
    """
    check_metrics(frame, metrics)
    taken: Counter[str] = Counter()
    written = []
    with _style():
        for name, figure in figures(latest(frame), metrics):
            taken[name] += 1  # file names cannot hold every difference between two cases
            name = name if taken[name] == 1 else f"{name}-{taken[name]}"
            written += [_write(figure, out / f"{name}.{ending}") for ending in formats]
    if not written:
        raise UsageError("nothing to plot: no row has a number of a metric that is drawn; --metric names another")
    return written


def memory(panels: dict[str, pd.DataFrame], path: Path) -> Path:
    """Draw the bytes that ResNet-50 keeps for backward as bars, a panel for each title, and return the file.

    Args: panels: rows of one setting for each title, as `frame.read` returns them. Text stays text in an SVG.
    """
    with _style():
        figure = _figure(4.4 * len(panels), 2.4)
        figure.suptitle("Kept for backward by a training step of ResNet-50", fontsize=11, x=0.01, ha="left")
        for axes, (title, rows) in zip(
            figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True
        ):
            rows = latest(rows[(rows["metric"] == MEMORY[0]) & rows["p50"].notna()]).set_index("provider")
            rows = rows.loc[providers(rows.index)[::-1]]
            divisor, unit = scale(rows)
            bars = axes.barh(
                rows.index, rows["p50"] / divisor, color=[_look(name, list(rows.index))[0] for name in rows.index]
            )
            axes.bar_label(bars, [number(value / divisor) for value in rows["p50"]], padding=3)
            axes.set_title(f"{title} ({unit})", fontsize=9, loc="left")
            axes.grid(visible=False)
            axes.spines["bottom"].set_visible(False)
            axes.set_xticks([])
        return _write(figure, path)


def figures(frame: pd.DataFrame, metrics: Sequence[str] = ()) -> Iterator[tuple[str, "Figure"]]:
    """Yield each plot with the name of its file; rows of two kinds or environments are never in one."""
    frame = frame.assign(group=frame["case"].map(group))
    environments = frame[["kind", *ENVIRONMENT]].drop_duplicates()
    alone = len(environments) == environments["kind"].nunique()
    default = [metric for metric in dict.fromkeys(frame["metric"]) if metric.startswith(RATIO) or metric in MEMORY]
    for environment, rows in frame.groupby(["kind", *ENVIRONMENT], sort=False):
        kind, *where = map(str, environment)
        around = ["" if kind == "measured" else kind, *([] if alone else where)]
        for metric in metrics or default:
            of = _rows_of(rows, metric)
            for key, part in of[of["group"] == ""].groupby(["case", "mode"], sort=False):
                if part["p50"].notna().any():
                    yield _name(*around, *key, metric), by_batch(part)
            if metric in MEMORY and not metrics:
                continue
            for key, part in of[of["group"] != ""].groupby(["group", "mode", "dtype", "layout", "batch"], sort=False):
                if part["p50"].notna().any():
                    yield _name(*around, key[0], "layers", *key[1:-1], f"batch{key[-1]}", metric), by_layer(part)


def by_batch(rows: pd.DataFrame) -> "Figure":
    """Draw one metric of one case and mode against the batch size, a panel for each dtype and layout."""
    panels = list(rows.groupby(["dtype", "layout"], sort=False))
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = _figure(3.3 * columns + 2.6, 2.7 * lines + 1.1)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    shown, (divisor, unit) = providers(rows["provider"]), scale(rows)
    batches, ratio = sorted(set(rows["batch"])), rows["metric"].iloc[0].startswith(RATIO)
    named = ratio or len(batches) == 1  # bytes and times grow with the batch, on an axis of numbers
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (key, part) in zip(grid.flat, panels, strict=False):
        axes.set_title(", ".join(filter(None, map(str, key))), fontsize=9)
        for index, provider in enumerate(shown):
            own = part[(part["provider"] == provider) & part["p50"].notna()].sort_values("batch")
            # Points of one batch are a little apart, so that error bars do not hide one another. On an axis of numbers,
            # where that would be wrong, the points below are larger and visible behind the others.
            apart = 0.3 * ((index + 0.5) / len(shown) - 0.5)
            x = [batches.index(batch) + apart if named else batch for batch in own["batch"]]
            larger = 0.0 if ratio else 3 * (1 - (index + 1) / len(shown))
            colour, marker = _look(provider, shown)
            spread = _spread(own, _ends(rows), divisor)
            points = {
                "marker": marker,
                "markersize": 5 + larger,
                "linewidth": 1.4 + larger,
                "elinewidth": 1,
                "capsize": 2.5,
            }
            axes.errorbar(x, own["p50"] / divisor, yerr=spread, label=provider, color=colour, **points)
        axes.set_xlabel("batch size")
        if named:
            axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
            axes.set_xlim(-0.4, len(batches) - 0.6)
        else:
            axes.set_xlim(left=0)
        axes.grid(visible=False, axis="x")
        if ratio:
            axes.axhline(1, color="#444444", linewidth=1, linestyle="--", zorder=1)
    if not ratio:  # last, because it ends the scaling of the axis that all panels share
        grid.flat[0].set_ylim(bottom=0)
    for axes in grid[:, 0]:
        axes.set_ylabel(label(rows["metric"].iloc[0], unit))
    return _with_text(figure, rows, (rows["case"].iloc[0], rows["mode"].iloc[0]))


def by_layer(rows: pd.DataFrame) -> "Figure":
    """Draw one metric of the layers of one network: a group of bars for each layer, a bar for each provider."""
    layers, shown = list(dict.fromkeys(rows["case"])), providers(rows["provider"])
    figure = _figure(8.2, 1.5 + len(layers) * (0.17 * len(shown) + 0.16))
    axes = figure.subplots()
    (divisor, unit), height = scale(rows), 0.8 / len(shown)
    for index, provider in enumerate(shown):
        own = rows[rows["provider"] == provider]
        y = [layers.index(case) + height * (index + 0.5) - 0.4 for case in own["case"]]
        width, spread = own["p50"] / divisor, _spread(own, _ends(rows), divisor)
        axes.barh(y, width, height * 0.92, label=provider, color=_look(provider, shown)[0])
        for colour, line in ("white", 2.4), ("#333333", 0.9):  # white makes the other visible on a dark bar
            axes.errorbar(width, y, xerr=spread, fmt="none", ecolor=colour, elinewidth=line)
        for at, status in zip(y, own["status"], strict=True):
            if status in ("failed", "skipped"):
                axes.text(0, at, f" {provider}: {status}", va="center", fontsize=6.5, color="#333333")
    axes.set_yticks(range(len(layers)), [layer.rpartition("/")[2] for layer in layers])
    axes.set_ylim(len(layers) - 0.45, -0.55)
    axes.set_xlim(left=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(label(rows["metric"].iloc[0], unit))
    if rows["metric"].iloc[0].startswith(RATIO):
        axes.axvline(1, color="#444444", linewidth=1, linestyle="--")
    head = rows.iloc[0]
    batch = f"batch {head['batch']}" if head["batch"] else ""
    return _with_text(figure, rows, (f"layers of {head['group']}", head["mode"], head["dtype"], head["layout"], batch))


def _style() -> Any:
    try:
        from matplotlib import style
    except ImportError as error:
        raise UsageError("plots need matplotlib: pip install 'triton_convbn[plot]'") from error
    return style.context(["default", STYLE])


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _rows_of(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the rows of a metric and of failed runs without it, because a plot says what is not in it."""
    own = rows[rows["metric"] == metric]
    failed = rows[(rows["status"] == "failed") & ~rows["metric"].isin(METRICS)]
    found = pd.concat([own, failed.assign(metric=metric, unit="")]).drop_duplicates(list(LINE))
    return found[found["provider"] != metric.removeprefix(RATIO)]


def _ends(rows: pd.DataFrame) -> tuple[str, str]:
    """Return the columns where error bars end: confidence intervals if there are any, or the spread."""
    return ("low", "high") if rows["low"].notna().any() else ("p20", "p80")


def _spread(rows: pd.DataFrame, ends: tuple[str, str], divisor: float) -> tuple[pd.Series, pd.Series] | None:
    """Return the lengths of the error bars below and above; None if no figure has a spread."""
    low, high = ends
    below, above = rows["p50"] - rows[low].fillna(rows["p50"]), rows[high].fillna(rows["p50"]) - rows["p50"]
    return (below.clip(lower=0) / divisor, above.clip(lower=0) / divisor) if (above + below > 0).any() else None


def _look(provider: str, shown: Sequence[str]) -> tuple[str, str]:
    """Return colour and marker; other providers are brown."""
    known = PROVIDERS[: len(_COLOURS)]
    if provider in known:
        return _COLOURS[known.index(provider)], _MARKERS[known.index(provider)]
    others = [name for name in shown if name not in known]
    return "#7b4a2d", "p<>8"[others.index(provider) % 4]


def _with_text(figure: "Figure", rows: pd.DataFrame, subject: Sequence[str]) -> "Figure":
    """Add the legend, the title, and below the plot where it was measured, or that it was not, and what is missing."""
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    kind = rows["kind"].iloc[0]
    marks = {"measured": "", "stubbed": " (STUBBED DRIVER)"}
    title = ", ".join(filter(None, subject)) + marks.get(kind, f" ({kind.upper()}, NOT MEASURED)")
    width = figure.get_figwidth()
    # The legend takes the right upper corner.
    figure.suptitle(textwrap.fill(title, int((width - 2.3) * 12)), fontsize=11, x=0.01, ha="left")
    text = source(rows) + "."
    if _spread(rows, _ends(rows), 1) is not None:
        interval = "low" in _ends(rows)
        text += f" Error bars: {'95 % confidence interval of the median' if interval else '20 % to 80 % range'}."
    gone = rows[rows["p50"].isna()]
    if len(gone) and not rows["case"].str.contains("/").any():
        cells = gone[["provider", "dtype", "layout", "batch", "status"]].to_dict("records")
        text += f" No point: {'; '.join(' '.join(str(v) for v in cell.values() if v) for cell in cells)}."
    figure.supxlabel(textwrap.fill(text, int(width * 16)), fontsize=7, color="#444444", x=0.01, ha="left")
    return figure


def _name(*parts: Any) -> str:
    texts = [re.sub(r"[^A-Za-z0-9._]+", "-", str(part)).strip("-.") for part in parts]
    return "-".join(text for text in texts if text)


def _write(figure: "Figure", path: Path) -> Path:
    """Write the file in one step, without a date or a version."""
    buffer = io.BytesIO()
    metadata = {"Software": None} if path.suffix == ".png" else {"Date": None, "Creator": None}
    figure.savefig(buffer, format=path.suffix[1:], metadata=metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue(), mode=0o644)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    return path
