"""Plots as PNG files, in colours that colour-blind people can distinguish; the curves and times of a run."""

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from batteries.report.history import StageSpan

MARK = "batteries report.py"  # in each file of a report: a file that contains it may be replaced

# The palette of Okabe and Ito for colour-blind people (jfly.uni-koeln.de/color).
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
    "text.parse_math": False,  # the name of a class may be $x$
}
WIDTH = 5.4  # inches
HEIGHT = 3.5  # inches
DPI = 160  # pixels per inch: sharp at half the width of a report
LABEL_CHARACTERS = 64  # that fit above a plot, for the names of the stages
MAX_MARKED_EPOCHS = 40  # of a curve with a dot per epoch


class Plot(NamedTuple):
    """A plot.

    Attributes:
        name: The name of its file, without .png.
        png: The contents of the file.
        alt: What it shows, for readers who cannot see it.
        is_wide: Whether it is not readable at half the width of a report.
    """

    name: str
    png: bytes
    alt: str
    is_wide: bool = False


class Line(NamedTuple):
    """A curve over epochs.

    Attributes:
        label: Its name in the legend; empty for none.
        values: One value per epoch.
        colour: Its colour.
        style: Its line style.
        best: The epoch to mark, from 1.
    """

    label: str
    values: Sequence[float]
    colour: str
    style: str = "-"
    best: int | None = None


def draw_plot(
    name: str,
    alt: str,
    draw: Callable[[Any], None],
    width: float = WIDTH,
    height: float = HEIGHT,
    *,
    wide: bool = False,
) -> Plot:
    """Draw a figure without a display.

    Args:
        name: The name of the file, without .png.
        alt: What the plot shows.
        draw: A function that draws on a matplotlib Figure.
        width: The width in inches.
        height: The height in inches.
        wide: Whether the plot is not readable at half the width of a report.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about characters that the font does not have
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": MARK})
    return Plot(name, file.getvalue(), alt, wide)


def draw_curves(
    name: str,
    title: str,
    label: str,
    lines: Sequence[Line],
    spans: Sequence[StageSpan] = (),
    *,
    may_be_log: bool = False,
) -> Plot:
    """Draw curves over epochs, with the boundaries of stages.

    Args:
        name: The name of the file, without .png.
        title: The title of the plot.
        label: The label of the y axis.
        lines: The curves.
        spans: The stages.
        may_be_log: Whether to use a log scale if the values span a wide range.
    """
    visible = [line for line in lines if np.isfinite(line.values).any()]
    finite = [value for line in visible for value in line.values if math.isfinite(value)]
    is_log = may_be_log and _spans_wide_range(finite)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for line in visible:
            _draw_line(axes, line)
        if is_log:
            _use_log_scale(axes)
        else:  # a common factor of the labels would be drawn over the name of the first stage
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.10g}")
        axes.set(title=title, xlabel="epoch, over all stages", ylabel=f"{label}, log scale" if is_log else label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _draw_stage_boundaries(axes, spans)
        _draw_legend(figure, axes, visible)

    return draw_plot(name, f"{title} over epochs", draw)


def _draw_line(axes: Any, line: Line) -> None:
    epochs = range(1, len(line.values) + 1)
    marker = "." if len(line.values) <= MAX_MARKED_EPOCHS else ""
    axes.plot(epochs, line.values, line.style, color=line.colour, label=legend_label(line.label), marker=marker)
    if line.best:
        value = line.values[line.best - 1]
        axes.plot(line.best, value, "o", color=line.colour, markersize=9, markerfacecolor="none", markeredgewidth=1.8)


def _spans_wide_range(values: Sequence[float]) -> bool:
    """Return whether all values are positive and the largest is over 20 times the smallest."""
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)


def _use_log_scale(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_stage_boundaries(axes: Any, spans: Sequence[StageSpan]) -> None:
    """Draw the name of each stage above its epochs, and a line between two stages."""
    if len(spans) < 2:
        return
    for span in spans:
        room = LABEL_CHARACTERS * (span.last - span.first + 1) // spans[-1].last
        if span.first > 1:
            axes.axvline(span.first - 0.5, color=GREY, linewidth=0.8, linestyle=":")
        axes.annotate(
            shorten(span.name, max(2, min(12, room))),
            ((span.first + span.last) / 2, 1.0),
            xycoords=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8,
            color=GREY,
        )


def _draw_legend(figure: Any, axes: Any, lines: Sequence[Line]) -> None:
    """Draw the legend below the plot, or a note if `lines` is empty."""
    if not lines:
        axes.annotate("no finite value", (0.5, 0.5), xycoords="axes fraction", ha="center", color=GREY)
        return
    handles, labels = axes.get_legend_handles_labels()  # of lines with a label only
    if any(line.best for line in lines):
        from matplotlib.lines import Line2D

        handles.append(Line2D([], [], color=GREY, marker="o", linestyle="", markersize=8, markerfacecolor="none"))
        labels.append("best epoch")
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8.5)


def draw_times(timings: Sequence[dict[str, Any]], spans: Sequence[StageSpan]) -> list[Plot]:
    """Draw the seconds of training per epoch, with the time spent waiting for data, and the throughput.

    Args:
        timings: The lines of timings.jsonl.
        spans: The stages.
    """
    epochs = range(1, len(timings) + 1)
    seconds = [line["seconds"] for line in timings]
    waits = [line["data_wait_seconds"] for line in timings]
    rates = [line["samples_per_second"] for line in timings]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        computing = np.subtract(seconds, waits)
        axes.bar(epochs, computing, color="#0072B2", label="computing")
        axes.bar(epochs, waits, bottom=computing, color="#E69F00", label="waiting for data")
        axes.set(title="Training time", xlabel="epoch, over all stages", ylabel="seconds")
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside lower center", ncols=2, fontsize=8.5)

    return [
        draw_plot("time", "seconds of training in each epoch", draw),
        draw_curves("throughput", "Throughput", "samples per second", [Line("", rates, "#0072B2")], spans),
    ]


def file_name(kind: str, name: str) -> str:
    """Return the name of a plot; the characters of `name` that a file name cannot have are replaced."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", f"{kind}_{name}")


def legend_label(text: str) -> str:
    """Return a label that the legend shows: matplotlib hides labels that begin with an underscore."""
    return shorten(f" {text}" if text.startswith("_") else text, 28)


def shorten(text: str, most: int) -> str:
    """Return a text of at most `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
