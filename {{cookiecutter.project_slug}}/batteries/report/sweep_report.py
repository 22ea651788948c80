"""The report of a sweep: a table of the trials, and plots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from batteries.report.html import Section, Tile, make_report, make_table, make_tiles, plots_of, write_report
from batteries.report.plots import COLOURS, GREY, Plot, draw_plot


class ScoredTrial(NamedTuple):
    """A trial that ended with a score.

    Attributes:
        number: Its number.
        score: Its score.
        positions: For each option that is varied, where its value is between the bounds, 0 to 1.
    """

    number: int
    score: float
    positions: Sequence[float]


class Axis(NamedTuple):
    """An option that is varied.

    Attributes:
        name: Its name.
        ticks: The positions, 0 to 1, and the texts of the values that are shown.
    """

    name: str
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class SweepReport:
    """The contents of the report.

    Attributes:
        subtitle: The line below the heading.
        header: The names of the columns of the table.
        rows: Its rows.
        trials: The trials with a score, the best one first.
        axes: The options that are varied.
        metric: The main metric.
        importance: The importance of each option, or None.
        best: The number of the best trial and its values.
    """

    subtitle: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    trials: Sequence[ScoredTrial]
    axes: Sequence[Axis]
    metric: str
    importance: Mapping[str, float] | None
    best: str


def write_sweep_report(path: Path, contents: SweepReport) -> None:
    """Write the report to `path`, and its plots next to it."""
    lead = []
    plots: list[Any] = []
    if contents.trials:
        lead = [make_tiles([Tile(f"best {contents.metric}", f"{contents.trials[0].score:.4f}", contents.best)])]
        plots = [
            draw_history(contents.trials, contents.metric),
            draw_parallel_coordinates(contents.trials, contents.axes, contents.metric),
        ]
    if contents.importance is not None:
        plots.append(draw_importance(contents.importance, contents.metric))
    rows = Section("Trials", [make_table(contents.header, contents.rows, text_columns=2)])
    sections = [Section("Plots", plots), rows] if plots else [rows]
    footer = "Written by tools/sweep.py. optuna-dashboard opens study.db in the same directory."
    report = make_report(f"Sweep {path.parent.name}", contents.subtitle, lead, sections, footer)
    write_report(path, report, plots_of(sections))


def draw_history(trials: Sequence[ScoredTrial], metric: str) -> Plot:
    """Draw the score of each trial, and the best one so far."""
    ordered = sorted(trials, key=lambda trial: trial.number)
    numbers = [trial.number for trial in ordered]
    scores = [trial.score for trial in ordered]
    best = trials[0].score
    so_far = np.minimum.accumulate(scores) if best == min(scores) else np.maximum.accumulate(scores)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(numbers, scores, "o", color=COLOURS[0], label="trial")
        axes.step(numbers, so_far, where="post", color=COLOURS[1], label="best so far")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="trial", ylabel=metric, title="History")
        axes.legend()

    return draw_plot("history", f"The {metric} of each trial, and the best one so far", draw)


def draw_importance(importance: Mapping[str, float], metric: str) -> Plot:
    """Draw the fraction of the variance of the score that each option explains."""
    names = list(importance)[::-1]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.barh(names, [importance[name] for name in names], color=COLOURS[0])
        axes.set(xlabel=f"importance for {metric}", title="Importance (fANOVA)", xlim=(0, 1))
        axes.grid(visible=False, axis="y")

    return draw_plot("importance", f"The importance of each option for {metric}", draw)


def draw_parallel_coordinates(trials: Sequence[ScoredTrial], options: Sequence[Axis], metric: str) -> Plot:
    """Draw a line for each trial through the values of its options and its score; good ones are dark."""
    scores = np.array([trial.score for trial in trials])
    columns = [np.array([trial.positions[place] for trial in trials]) for place in range(len(options))]
    spread = np.ptp(scores)
    columns.append((scores - scores.min()) / spread if spread else np.full(len(scores), 0.5))
    rank = np.linspace(1, 0, len(trials)) if len(trials) > 1 else np.ones(1)  # the best one is the first

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        places = range(len(columns))
        for values, order in sorted(zip(zip(*columns, strict=True), rank, strict=True), key=lambda line: line[1]):
            colour = COLOURS[1] if order == 1 else COLOURS[0]
            axes.plot(places, values, color=colour, alpha=0.15 + 0.75 * order, linewidth=1 + order)
        axes.set_xticks(places, [*(option.name for option in options), metric])
        axes.set_yticks([])
        axes.set(title="Parallel coordinates (the best trial in orange)", ylim=(-0.12, 1.12))
        for place, option in enumerate(options):
            for position, text in option.ticks:
                axes.annotate(
                    text, (place, position), fontsize=7.5, color=GREY, xytext=(3, 0), textcoords="offset points"
                )
        axes.annotate(f"{scores.min():.4g}", (len(options), 0), fontsize=7.5, color=GREY)
        axes.annotate(f"{scores.max():.4g}", (len(options), 1), fontsize=7.5, color=GREY)

    alt = f"A line for each trial through the values of its options and its {metric}"
    return draw_plot("parallel_coordinates", alt, draw, wide=len(options) > 3)
