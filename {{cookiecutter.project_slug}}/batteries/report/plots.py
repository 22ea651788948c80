"""Plots."""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from batteries.evaluation.error_analysis import Bin
from batteries.report.history import Span

MARK = "batteries report.py"  # in each file of a report: what has it may be replaced

# Okabe and Ito's colours, which colour-blind people can tell apart (jfly.uni-koeln.de/color).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = {"train": ("#D55E00", "--"), "valid": ("#0072B2", "-"), "valid_ema": ("#009E73", "-.")}
GREY = "#8a8a8a"
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.titlesize": 11,
    "font.size": 9.5,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "text.parse_math": False,  # a class may be called $x$
}
WIDTH, HEIGHT, DPI = 5.4, 3.5, 160  # inches, and pixels each: sharp at the width of half a page
MOST_CLASSES = 24  # in a confusion matrix whose names can be read
MOST_NARROW = 12  # in one that can be read at half the width of a page


class Plot(NamedTuple):
    """A PNG file, and what it shows in words."""

    name: str  # of the file, without .png
    png: bytes
    says: str
    is_wide: bool = False  # not to be read at half the width of a page


class Line(NamedTuple):
    """A curve over the epochs of a run, with a label where there are others; `best` is an epoch to mark, from 1."""

    label: str
    values: Sequence[float]
    colour: str
    style: str = "-"
    best: int | None = None


@contextmanager
def _drawing(name: str, says: str, made: list[Plot], width: float = WIDTH, height: float = HEIGHT) -> Iterator[Any]:
    """A figure without a screen, which becomes the one Plot in `made`."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font does not have
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": MARK})
        made.append(Plot(name, file.getvalue(), says))


def draw_curves(
    name: str, title: str, label: str, lines: Sequence[Line], spans: Sequence[Span] = (), *, may_be_log: bool = False
) -> Plot:
    """Lines over epochs, with the borders of stages; on a log scale where that `may_be_log` and the range is wide."""
    made: list[Plot] = []
    drawn = [line for line in lines if np.isfinite(line.values).any()]
    with _drawing(name, f"{title} over epochs", made) as figure:
        axes = figure.subplots()
        for line in drawn:
            _draw_line(axes, line)
        log = may_be_log and _is_wide([value for line in drawn for value in line.values if math.isfinite(value)])
        if log:
            _use_log(axes)
        axes.set(title=title, xlabel="epoch, over all stages", ylabel=f"{label}, log scale" if log else label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _draw_spans(axes, spans)
        _explain(figure, axes, drawn)
    return made[0]


def _draw_line(axes: Any, line: Line) -> None:
    epochs = range(1, len(line.values) + 1)
    marker = "." if len(line.values) <= 40 else ""
    axes.plot(epochs, line.values, line.style, color=line.colour, label=_legend(line.label), marker=marker)
    if line.best:
        value = line.values[line.best - 1]
        axes.plot(line.best, value, "o", color=line.colour, markersize=9, markerfacecolor="none", markeredgewidth=1.8)


def _is_wide(values: Sequence[float]) -> bool:
    """Whether a log scale shows more: all values are over 0, and the largest is many times the smallest."""
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)


def _use_log(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_spans(axes: Any, spans: Sequence[Span]) -> None:
    """The name of each stage over its epochs, and a line between two of them."""
    for span in spans if len(spans) > 1 else ():
        if span.first > 1:
            axes.axvline(span.first - 0.5, color=GREY, linewidth=0.8, linestyle=":")
        where = {"xycoords": axes.get_xaxis_transform(), "ha": "center", "va": "bottom", "fontsize": 8, "color": GREY}
        axes.annotate(_cut(span.name, 12), ((span.first + span.last) / 2, 1.0), **where)


def _explain(figure: Any, axes: Any, lines: Sequence[Line]) -> None:
    """The legend below, and a word where there is nothing to see."""
    if not lines:
        axes.annotate("no finite value", (0.5, 0.5), xycoords="axes fraction", ha="center", color=GREY)
        return
    handles, labels = axes.get_legend_handles_labels()  # of the lines that have a label
    if any(line.best for line in lines):
        from matplotlib.lines import Line2D

        handles.append(Line2D([], [], color=GREY, marker="o", linestyle="", markersize=8, markerfacecolor="none"))
        labels.append("best epoch")
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8.5)


def draw_confusions(counts: np.ndarray, samples: np.ndarray, classes: Sequence[str], title: str) -> Plot:
    """Counts (C, C) of targets (rows) and predictions, coloured by their share of the `samples` (C,) of the target.

    The colour goes with the square root of the share, so that a few per cent are seen.
    """
    from matplotlib.colors import PowerNorm

    made: list[Plot] = []
    across = 0.34 * len(classes)
    shares = counts / np.maximum(samples, 1)[:, None]
    with _drawing("confusion", title, made, max(WIDTH, across + 2.6), max(4.6, across + 1.9)) as figure:
        axes = figure.subplots()
        axes.grid(visible=False)
        image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
        names = [_cut(name, 14) for name in classes]
        slanted = max(map(len, names)) > 2
        axes.set_xticks(range(len(names)), names, rotation=90 if slanted else 0, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.tick_params(length=0)
        axes.set(title=title, xlabel="prediction", ylabel="target")
        figure.colorbar(image, ax=axes, shrink=0.7, label="share of the target's samples")
        _write_counts(axes, counts, shares)
    return made[0]._replace(is_wide=len(classes) > MOST_NARROW)


def _write_counts(axes: Any, counts: np.ndarray, shares: np.ndarray) -> None:
    for row, column in np.argwhere(counts):
        colour = "white" if shares[row, column] > 0.3 else "black"
        text = f"{counts[row, column]:,}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7.5 if len(text) < 4 else 6)


def draw_reliability(bins: Sequence[Bin], error: float) -> Plot:
    """How often predictions of each confidence are right, over how many of them there are."""
    made: list[Plot] = []
    middles, widths = [(one.low + one.high) / 2 for one in bins], [one.high - one.low for one in bins]
    with _drawing("calibration", f"reliability diagram, expected calibration error {error:.4f}", made) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.bar(middles, [one.accuracy for one in bins], widths, color="#56B4E9", edgecolor="white", label="accuracy")
        above.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, label="perfect calibration")
        where = [one.confidence for one in bins], [one.accuracy for one in bins]
        above.plot(*where, "o", color="#D55E00", markersize=4, label="at the mean confidence")
        above.set(title=f"Calibration: expected error {error:.4f}", ylabel="share right", ylim=(0, 1.02), xlim=(0, 1))
        figure.legend(loc="outside lower center", ncols=3, fontsize=8.5)
        below.bar(middles, [one.samples for one in bins], widths, color=GREY, edgecolor="white")
        below.set(xlabel="confidence: the largest probability", ylabel="samples, log", yscale="log", ylim=(0.5, None))
        below.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return made[0]


def draw_times(timings: Sequence[dict[str, Any]], spans: Sequence[Span]) -> list[Plot]:
    """Seconds of each epoch's training, with the wait for data, and samples a second."""
    made: list[Plot] = []
    epochs = range(1, len(timings) + 1)
    seconds, waits, rates = (
        [line[name] for line in timings] for name in ("seconds", "data_wait_seconds", "samples_per_second")
    )
    with _drawing("time", "seconds of training in each epoch", made) as figure:
        axes = figure.subplots()
        work = np.subtract(seconds, waits)
        axes.bar(epochs, work, color="#0072B2", label="computing")
        axes.bar(epochs, waits, bottom=work, color="#E69F00", label="waiting for data")
        axes.set(title="Time of training", xlabel="epoch, over all stages", ylabel="seconds")
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside lower center", ncols=2, fontsize=8.5)
    rate = Line("", rates, "#0072B2")
    return [*made, draw_curves("throughput", "Throughput", "samples a second", [rate], spans)]


def _legend(text: str) -> str:
    """A label as the legend shows it: it hides what begins with an underscore."""
    return _cut(f" {text}" if text.startswith("_") else text, 28)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
