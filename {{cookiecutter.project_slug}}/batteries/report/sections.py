"""The sections of a report: of one run without its predictions, and of several runs side by side."""

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from batteries.core.config_io import flatten
from batteries.core.metric_names import is_lower_better
from batteries.core.text import count_of
from batteries.report.history import RunHistory, StageSpan, unique
from batteries.report.html import Html, Section, Tile, collapsible, make_table, make_tiles, tag
from batteries.report.plots import COLOURS, STYLES, Line, Plot, draw_curves, draw_times, file_name

NONE = "–"
LINE_STYLES = ("-", "--", "-.", ":")
CUSTOM_SPLIT_STYLE = ("#CC79A7", ":")  # of a split that is not in STYLES
PER_RUN_OPTIONS = ("logdir",)  # options that differ between all runs
REPEAT_OPTIONS = {"fold", "seed"}  # runs that differ only in these are repetitions, so their scores have a mean


def render_tiles(run: RunHistory, of_predictions: Sequence[Tile] = ()) -> Html:
    """Build the row of key numbers.

    Args:
        run: The run.
        of_predictions: The key numbers of the predictions of the valid split, if there are any.
    """
    best = run.best_epoch()
    score = format_number(run.value(best, run.ranked_split, run.main_metric))
    tiles = [Tile(f"best {run.main_metric}", score, f"{run.ranked_split}, {run.describe_epoch(best) or 'no epoch'}")]
    if "loss" in run.metrics and run.main_metric != "loss":
        tiles.append(Tile("loss", format_number(run.value(best, run.ranked_split, "loss")), "in that epoch"))
    tiles += of_predictions
    training = format_seconds(run.training_seconds())
    tiles.append(Tile("time", format_seconds(run.total_seconds()), f"of which training {training}"))
    if run.timings:
        tiles.append(Tile("throughput", f"{run.samples_per_second():,.0f}", "training samples per second"))
    return make_tiles(tiles)


def render_curves_section(run: RunHistory) -> Section:
    """Build the section with each metric over epochs on each split, and the learning rate."""
    if not run.epochs:
        return Section("Curves", [tag("p", "Curves appear after the first complete epoch.")])
    plots = [_draw_metric(run, metric) for metric in run.metrics]
    plots.append(_draw_learning_rates([run], [Line("", run.learning_rates(), COLOURS[0])], run.stage_spans()))
    return Section("Curves", plots)


def _draw_learning_rates(runs: Sequence[RunHistory], lines: Sequence[Line], spans: Sequence[StageSpan] = ()) -> Plot:
    is_highest = any("max_lr" in line for run in runs for line in run.epochs)  # earlier versions recorded the last one
    label = "highest of each epoch" if is_highest else "at the end of each epoch"
    return draw_curves("learning_rate", "learning rate", label, lines, spans)


def _draw_metric(run: RunHistory, metric: str) -> Plot:
    """Draw one metric on each split, with the best epoch marked on the split that ranks epochs."""
    best = run.best_epoch()
    lines = []
    for split in run.splits:
        if run.has(split, metric):
            colour, style = STYLES.get(split, CUSTOM_SPLIT_STYLE)
            marked = best if split == run.ranked_split else None
            lines.append(Line(split, run.curve(split, metric), colour, style, marked))
    name = file_name("curve", metric)
    return draw_curves(name, metric, metric, lines, run.stage_spans(), may_be_log=is_lower_better(metric))


def render_scores_section(run: RunHistory, scores: Mapping[str, Mapping[str, float]]) -> Section:
    """Build the section with the best epoch of each stage, and the scores of predictions.

    Args:
        run: The run.
        scores: The scores by metric, by the name of the predictions.
    """
    content: list[Html] = []
    if run.epochs:
        content += [tag("h3", "Best epoch of each stage"), _render_stage_table(run)]
    if scores:
        metrics = unique(metric for values in scores.values() for metric in values)
        rows = [[name, *(format_number(values.get(metric)) for metric in metrics)] for name, values in scores.items()]
        content += [tag("h3", "Predictions of complete splits"), make_table(["", *metrics], rows)]
    if not content:
        content = [tag("p", "Scores appear after the first complete epoch.")]
    return Section("Scores", content)


def _render_stage_table(run: RunHistory) -> Html:
    rows = []
    for span in run.stage_spans():
        best = run.best_epoch(span)
        if best is None:
            continue
        for split in run.splits:
            values = [format_number(run.value(best, split, metric)) for metric in run.metrics]
            rows.append([span.name, split, run.epochs[best - 1]["epoch"], *values])
    if not rows:
        return tag("p", f"No {run.ranked_split} {run.main_metric} is finite.")
    return make_table(["stage", "split", "epoch", *run.metrics], rows, text_columns=2)


def render_time_section(run: RunHistory) -> Section:
    """Build the section with the training time of each stage, and the fraction spent waiting for data."""
    if not run.timings:
        return Section("Time", [tag("p", "Times appear after the first complete epoch.")])
    rows = []
    for stage in unique(line["stage"] for line in run.timings):
        lines = [line for line in run.timings if line["stage"] == stage]
        seconds = sum(line["seconds"] for line in lines)
        waits = sum(line["data_wait_seconds"] for line in lines)
        rate = statistics.median(line["samples_per_second"] for line in lines)
        memory = max(line["peak_memory_bytes"] for line in lines) / 1e9
        fraction = waits / seconds if seconds else 0
        rows.append([stage, len(lines), format_seconds(seconds), f"{fraction:.1%}", f"{rate:,.0f}", f"{memory:.2f}"])
    header = ["stage", "epochs", "training", "waiting for data", "median samples/s", "peak memory, GB"]
    return Section("Time", [*draw_times(run.timings, run.stage_spans()), make_table(header, rows)])


def render_metadata_section(run: RunHistory) -> Section:
    """Build the section with the contents of run.json, and the size of git.diff."""
    rows = [[name, format_value(value)] for name, value in flatten(run.metadata)]
    changes = run.directory / "git.diff"
    if changes.is_file():
        lines = changes.read_bytes().count(b"\n")
        rows.append(["git.diff", f"{count_of(lines, 'line')} of uncommitted changes"])
    if not rows:
        return Section("Run metadata", [tag("p", "run.json does not exist.")])
    return Section("Run metadata", [make_table(["run.json", ""], rows, text_columns=2)])


def render_options_section(columns: Mapping[str, Mapping[str, Any]]) -> Section:
    """Build the section with options side by side: those that differ first and highlighted, the others collapsed.

    Args:
        columns: Configs, by the header of their column.
    """
    configs = {name: dict(flatten(config)) for name, config in columns.items()}
    differing = find_differences(list(configs.values()))
    names = unique(name for config in configs.values() for name in config)
    same = [name for name in names if name not in differing and name not in PER_RUN_OPTIONS]
    first = tag("p", "No option differs.")
    if differing:
        first = _render_options_table(differing, configs, highlighted=True)
    rest = _render_options_table(same, configs, highlighted=False)
    return Section("Options", [first, collapsible("Options with equal values", rest)])


def _render_options_table(names: Sequence[str], configs: Mapping[str, Mapping[str, Any]], *, highlighted: bool) -> Html:
    rows = [
        [name, *(format_value(config[name]) if name in config else "not set" for config in configs.values())]
        for name in names
    ]
    header = ["option", *configs]
    return make_table(header, rows, text_columns=len(header), highlighted=highlighted)


def find_differences(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the options that differ between flat configs, except PER_RUN_OPTIONS; a missing option differs."""
    first = configs[0]
    missing = object()
    names = unique(name for config in configs for name in config)
    return [
        name
        for name in names
        if name not in PER_RUN_OPTIONS
        and any(config.get(name, missing) != first.get(name, missing) for config in configs)
    ]


def render_runs_section(runs: Sequence[RunHistory], directory: Path) -> Section:
    """Build the section with one row per run, and the mean score if the runs are repetitions.

    Args:
        runs: The runs.
        directory: The directory of this report. Runs that have a report are linked to it.
    """
    rows = []
    scores = []
    for run in runs:
        best = run.best_epoch()
        score = run.value(best, run.ranked_split, run.main_metric)
        scores.append(score)
        rows.append(
            [
                _link_to_report(run, directory),
                run.outcome(),
                run.describe_epoch(best) or NONE,
                run.main_metric,
                format_number(score),
                len(run.epochs),
                format_seconds(run.training_seconds()),
                f"{run.samples_per_second():,.0f}" if run.timings else NONE,
                str(run.metadata.get("git_commit") or NONE)[:7],
            ]
        )
    header = ["run", "outcome", "best epoch", "metric", "score", "epochs", "training", "samples/s", "commit"]
    content = [make_table(header, rows, text_columns=4)]
    if _are_repetitions(runs) and all(map(math.isfinite, scores)):
        text = (
            f"These runs differ only in fold or seed: {runs[0].main_metric} has mean {statistics.mean(scores):.4f}, "
            f"standard deviation {statistics.stdev(scores):.4f} (n - 1)."
        )
        content.append(tag("p", text))
    return Section("Runs", content)


def _link_to_report(run: RunHistory, directory: Path) -> Html:
    report = run.directory / "report.html"
    if not report.is_file():
        return tag("span", run.name)
    return tag("a", run.name, href=quote(os.path.relpath(report.resolve(), directory.resolve())))


def _are_repetitions(runs: Sequence[RunHistory]) -> bool:
    return set(find_differences([dict(flatten(run.config)) for run in runs])) <= REPEAT_OPTIONS


def render_curves_comparison(runs: Sequence[RunHistory]) -> Section:
    """Build the section with the curves of all runs: per metric a plot of the ranked split and a plot of train."""
    plots = []
    for metric in unique(metric for run in runs for metric in run.metrics):
        for split in ("valid", "train"):
            lines = _lines_of_runs(runs, metric, split)
            if lines:
                name = file_name(split, metric)
                title = f"{metric}, {split}"
                plots.append(draw_curves(name, title, metric, lines, may_be_log=is_lower_better(metric)))
    rates = [Line(run.name, run.learning_rates(), *_line_style(number)) for number, run in enumerate(runs)]
    plots.append(_draw_learning_rates(runs, rates))
    return Section("Curves", plots)


def _lines_of_runs(runs: Sequence[RunHistory], metric: str, split: str) -> list[Line]:
    """Return one curve per run that has the metric; "valid" is the split that ranks its epochs."""
    lines = []
    for number, run in enumerate(runs):
        own_split = run.ranked_split if split == "valid" else split
        best = run.best_epoch() if split == "valid" else None
        if run.has(own_split, metric):
            colour, style = _line_style(number)
            lines.append(Line(run.name, run.curve(own_split, metric), colour, style, best))
    return lines


def _line_style(number: int) -> tuple[str, str]:
    """Return a colour and a line style that are unique among the first 28 runs, so that equal curves are visible."""
    return COLOURS[number % len(COLOURS)], LINE_STYLES[number % len(LINE_STYLES)]


def format_number(value: float | None) -> str:
    """Format a number with four decimals; a dash if it is missing or not finite."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.4f}"


def format_seconds(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours with one decimal; a dash if it is not finite."""
    if not math.isfinite(seconds):
        return NONE
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def format_value(value: Any) -> str:
    """Format an option or a value of run.json."""
    if isinstance(value, list | tuple):
        return ", ".join(format_value(item) for item in value) or NONE
    return NONE if value is None else str(value)
