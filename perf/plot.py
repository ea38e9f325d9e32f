"""Plots of the benchmark's rows, with matplotlib: no window, no state, the same file for the same rows."""

import io
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from triton_convbn.kernels.files import write_atomically

from triton_convbn.errors import UsageError, choose

from .frame import ENVIRONMENT, LINE, LOST, latest, read, select
from .labels import METRICS, PROVIDERS, RATIO, group, label, number, providers, scale, source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path("perf/results")
MEMORY = ("saved_for_backward", "peak_memory")
README = (
    ("cpu.csv", "CPU, fp32, contiguous, batch 4", "dtype=float32 layout=contiguous batch=4"),
    (
        "gpu_h200.csv",
        "H200, bf16 autocast, channels_last, batch 32",
        "dtype=autocast_bfloat16 layout=channels_last batch=32",
    ),
)
"""The panels of README's picture: file, title, setting."""

# Okabe and Ito's colours, which the colour-blind tell apart, without their yellow, which white paper swallows, and with
# greys. A provider has the same colour in every plot. The others are brown, and differ by their hatching.
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
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 150,
}


def plots(frame: pd.DataFrame, out: Path, formats: Sequence[str], metrics: Sequence[str] = ()) -> list[Path]:
    """Draw every plot of the rows, replace the files that exist, and return the files.

    Args:
        frame: Rows as `frame.read` returns them.
        formats: Of png and svg.
        metrics: Names as in the CSV, see `figures`.

    Raises:
        UsageError: If matplotlib is missing, no row has a metric, nothing is drawn, or `out` is not writable.
    """
    choose("metric", metrics, sorted(set(frame["metric"])))
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


def memory(path: Path) -> Path:
    """Draw the bytes that a training step of ResNet-50 keeps for backward, from the committed CSVs: README's picture.

    Text stays text in the SVG.
    """
    with _style():
        figure = _figure(4.4 * len(README), 2.4)
        figure.suptitle("Kept for backward by a training step of ResNet-50", fontsize=11, x=0.01, ha="left")
        for axes, (file, title, setting) in zip(figure.subplots(1, len(README)), README, strict=True):
            filters = ["case=resnet50", "mode=train", f"metric={MEMORY[0]}", *setting.split()]
            rows = latest(select(read([RESULTS / file]), filters)).dropna(subset="p50").set_index("provider")
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


def figures(frame: pd.DataFrame, metrics: Sequence[str] = ()) -> Iterator[tuple[str, "Figure"]]:
    """Yield each plot with the name of its file; rows of two kinds or environments are never in one.

    A whole model has each metric by batch size: by default the ratios of times, the bytes kept for backward and the
    peak. A network's layers have, by default, the ratios.
    """
    frame = frame.assign(group=frame["case"].map(group))
    environments = frame[["kind", *ENVIRONMENT]].drop_duplicates()
    alone = len(environments) == environments["kind"].nunique()
    ratios = [metric for metric in dict.fromkeys(frame["metric"]) if metric.startswith(RATIO)]
    for environment, rows in frame.groupby(["kind", *ENVIRONMENT], sort=False):
        kind, *where = map(str, environment)
        around = ["" if kind == "measured" else kind, *([] if alone else where)]
        for metric in metrics or [*ratios, *MEMORY]:
            shown = _rows_of(rows, metric)
            layers = shown["group"] != ""
            for key, part in shown[~layers].groupby(["case", "mode"], sort=False):
                if part["p50"].notna().any():
                    yield _name(*around, *key, metric), draw(part, key, ["dtype", "layout"], "batch")
            if not metrics and metric not in ratios:
                continue
            for key, part in shown[layers].groupby(["group", "mode", "dtype", "layout", "batch"], sort=False):
                if part["p50"].notna().any():
                    title = (f"layers of {key[0]}", *key[1:-1], f"batch {key[-1]}" if key[-1] else "")
                    name = _name(*around, key[0], "layers", *key[1:-1], f"batch{key[-1]}", metric)
                    yield name, draw(part, title, ["group"], "case")


def draw(rows: pd.DataFrame, title: Sequence[str], panels: list[str], category: str) -> "Figure":
    """Draw one metric as bars: a panel for each value of `panels`, a group of bars for each value of `category`.

    Error bars are the 95 % confidence interval of a ratio's median, or the 20 % to 80 % range. A provider that failed
    has the status in place of its bar.
    """
    shown, (divisor, unit) = providers(rows["provider"]), scale(rows)
    categories = sorted(set(rows[category])) if category == "batch" else list(dict.fromkeys(rows[category]))
    low, high = ("low", "high") if rows["low"].notna().any() else ("p20", "p80")
    parts = list(rows.groupby(panels, sort=False))
    figure = _figure(max(8.2, 4.1 * len(parts)), 1.5 + len(categories) * (0.17 * len(shown) + 0.16))
    height, metric, spreads = 0.8 / len(shown), rows["metric"].iloc[0], False
    for axes, (key, part) in zip(figure.subplots(1, len(parts), squeeze=False, sharex=True).flat, parts, strict=True):
        for index, provider in enumerate(shown):
            own = part[part["provider"] == provider]
            y = [categories.index(value) + height * (index + 0.5) - 0.4 for value in own[category]]
            figures = own["p50"] / divisor
            below = (figures - own[low] / divisor).clip(lower=0).fillna(0)
            above = (own[high] / divisor - figures).clip(lower=0).fillna(0)
            spreads |= bool((below + above > 0).any())
            axes.barh(y, figures, height * 0.92, label=provider, **_look(provider, shown))
            for colour, line in ("white", 2.4), ("#333333", 0.9):  # white makes the other visible on a dark bar
                axes.errorbar(
                    figures, y, xerr=(below.to_numpy(), above.to_numpy()), fmt="none", ecolor=colour, elinewidth=line
                )
            for at, status in zip(y, own["status"], strict=True):
                if status in LOST:
                    axes.text(0, at, f" {provider}: {status}", va="center", fontsize=6.5, color="#333333")
        axes.set_title(", ".join(filter(None, map(str, key))) if category == "batch" else "", fontsize=9)
        names = [f"batch {value}" if category == "batch" else value.rpartition("/")[2] for value in categories]
        axes.set_yticks(range(len(categories)), names)
        axes.set_ylim(len(categories) - 0.45, -0.55)
        axes.set_xlim(left=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(label(metric, unit))
        if metric.startswith(RATIO):
            axes.axvline(1, color="#444444", linewidth=1, linestyle="--")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    kind = rows["kind"].iloc[0]
    mark = {"measured": "", "stubbed": " (STUBBED DRIVER)"}.get(kind, f" ({kind.upper()}, NOT MEASURED)")
    heading = textwrap.fill(", ".join(filter(None, title)) + mark, int((figure.get_figwidth() - 2.3) * 12))
    figure.suptitle(heading, fontsize=11, x=0.01, ha="left")  # the legend takes the right upper corner
    bars = "95 % confidence interval of the median" if low == "low" else "20 % to 80 % range"
    footer = source(rows) + "." + (f" Error bars: {bars}." if spreads else "")
    footer = textwrap.fill(footer, int(figure.get_figwidth() * 16))
    figure.supxlabel(footer, fontsize=7, color="#444444", x=0.01, ha="left")
    return figure


def _rows_of(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the rows of a metric and of failed runs without it, because a plot says what is not in it."""
    own = rows[rows["metric"] == metric]
    failed = rows[(rows["status"] == "failed") & ~rows["metric"].isin(METRICS)]
    found = pd.concat([own, failed.assign(metric=metric, unit="")]).drop_duplicates(list(LINE))
    return found[found["provider"] != metric.removeprefix(RATIO)]


def _style() -> Any:
    try:
        from matplotlib import style
    except ImportError as error:
        raise UsageError("plots need matplotlib: pip install 'triton_convbn[plot]'") from error
    return style.context(["default", STYLE])


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _look(provider: str, shown: Sequence[str]) -> dict[str, str]:
    known = dict(zip(PROVIDERS, COLOURS, strict=False))
    if provider in known:
        return {"color": known[provider]}
    others = [name for name in shown if name not in known]
    return {"color": OTHERS, "hatch": HATCHES[others.index(provider) % len(HATCHES)], "edgecolor": "white"}


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
