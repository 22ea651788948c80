"""The sections of a report: what is said of a run, of what it predicts, and of several runs side by side."""

import math
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from batteries.core.config_io import flatten
from batteries.core.metric_names import LOWER_IS_BETTER
from batteries.evaluation.error_analysis import (
    bin_by_confidence,
    calibration_error,
    count_confusions,
    least_certain,
    most_confused,
    most_mistaken,
    score_classes,
    worst_mistakes,
)
from batteries.evaluation.predictions import Predictions
from batteries.report.history import History, unique
from batteries.report.html import Aside, Html, Section, fold, make_image, make_table, make_tiles, size_of, tag
from batteries.report.plots import (
    COLOURS,
    MOST_CLASSES,
    STYLES,
    Line,
    Plot,
    draw_confusions,
    draw_curves,
    draw_reliability,
    draw_times,
)

MOST_SAMPLES = 12  # pictures in a row of samples
SMALL = 64  # pixels on a side: such a picture is shown with its pixels, a larger one smoothed
NONE = "–"
OTHER = ("#CC79A7", ":")  # how a split of your own is drawn
OF_A_RUN = ("logdir",)  # the knobs that are another for each run
REPEATS = {"fold", "seed"}  # the knobs that runs of one recipe may differ in, so that their scores have a mean


def show_tiles(run: History, predictions: Predictions | None) -> Html:
    """The numbers to see first."""
    best = run.best()
    tiles = [
        (
            f"best {run.metric}",
            say_number(run.value(best, run.ranked_part, run.metric)),
            f"{run.ranked_part}, {run.place(best) or 'no epoch'}",
        )
    ]
    if "loss" in run.metrics and run.metric != "loss":
        tiles.append(("loss", say_number(run.value(best, run.ranked_part, "loss")), "in that epoch"))
    if predictions is not None:
        error = calibration_error(bin_by_confidence(predictions))
        tiles.append(("calibration error", say_number(error), "of valid; 0 is perfect"))
    tiles.append(("time", say_seconds(run.format_duration()), f"{say_seconds(run.seconds())} of it training"))
    if run.timings:
        tiles.append(("speed", f"{run.samples_per_second():,.0f}", "samples a second in training"))
    return make_tiles(tiles)


def show_curves(run: History) -> Section:
    """Each metric over the epochs on each split, and the learning rate."""
    if not run.epochs:
        return Section("Curves", [tag("p", "No epoch has ended, so there are no curves.")])
    plots = [_draw_metric(run, metric) for metric in run.metrics]
    rates = Line("", run.rates(), COLOURS[0])
    plots.append(draw_curves("learning_rate", "learning rate", "at the end of each epoch", [rates], run.spans()))
    return Section("Curves", plots)


def _draw_metric(run: History, metric: str) -> Plot:
    """Its curve on each split, the best epoch marked on the one that ranks them."""
    best = run.best()
    lines = [
        Line(part, run.curve(part, metric), *STYLES.get(part, OTHER), best if part == run.ranked_part else None)
        for part in run.parts
        if run.has(part, metric)
    ]
    return draw_curves(_file_name("curve", metric), metric, metric, lines, run.spans(), may_be_log=_is_loss(metric))


def show_scores(run: History, scores: Mapping[str, Mapping[str, float]]) -> Section:
    """The best epoch of each stage, and scores of predictions by the name of these."""
    parts = [tag("h3", "The best epoch of each stage"), _stage_table(run)] if run.epochs else []
    if scores:
        metrics = unique(metric for values in scores.values() for metric in values)
        rows = [(name, *(say_number(values.get(metric)) for metric in metrics)) for name, values in scores.items()]
        parts += [tag("h3", "Predictions of whole splits"), make_table(["", *metrics], rows)]
    return Section("Scores", parts or [tag("p", "No epoch has ended, so there are no scores.")])


def _stage_table(run: History) -> Html:
    bests = [(span.name, best) for span in run.spans() if (best := run.best(span)) is not None]
    if not bests:
        return tag("p", f"No {run.ranked_part} {run.metric} is finite.")
    rows = [
        (name, part, run.epochs[best - 1]["epoch"], *(say_number(run.value(best, part, one)) for one in run.metrics))
        for name, best in bests
        for part in run.parts
    ]
    return make_table(["stage", "split", "epoch", *run.metrics], rows, texts=2)


def show_classes(predictions: Predictions) -> Section:
    """Which classes are taken for which, and how well each is found."""
    counts, classes = count_confusions(predictions), predictions.classes
    chosen = most_mistaken(counts, MOST_CLASSES)
    few = f"The {len(chosen)} of {len(classes):,} classes with the most mistakes"
    plot = draw_confusions(
        counts[np.ix_(chosen, chosen)],
        counts.sum(1)[chosen],
        [classes[index] for index in chosen],
        "Confusions" if len(chosen) == len(classes) else few,
    )
    rows = [
        (row.name, row.taken_for, f"{row.samples:,}", f"{row.recall:.3f}", f"{row.precision:.3f}", f"{row.f1:.3f}")
        for row in score_classes(counts, classes)
    ]
    table = make_table(["class", "most often taken for", "samples", "recall", "precision", "F1"], rows, texts=2)
    beside = _confused_table(counts, classes)
    return Section("Classes", [plot, beside, tag("h3", "Each class, the lowest F1 first"), table])


def _confused_table(counts: np.ndarray, classes: Sequence[str]) -> Aside:
    pairs = most_confused(counts, classes)
    if not pairs:
        return Aside(tag("p", f"None of {counts.sum():,} samples is taken for another class."))
    rows = [(one.target, one.prediction, f"{one.samples:,}", f"{one.share:.1%}") for one in pairs]
    table = make_table(["target", "taken for", "samples", "of the target's"], rows, texts=2)
    return Aside(tag("div", tag("h3", "Most often confused"), table))


def show_calibration(predictions: Predictions) -> Section:
    """How far confidence can be believed."""
    bins = bin_by_confidence(predictions)
    error = calibration_error(bins)
    words = (
        f"Of the predictions that are given a probability of 0.9, 90% should be right. Over {len(predictions.ids):,} "
        f"samples the two are {error:.4f} apart: the expected calibration error, over bins of equal width."
    )
    rows = [
        (f"{one.low:.2f} to {one.high:.2f}", f"{one.samples:,}", f"{one.confidence:.4f}", f"{one.accuracy:.4f}")
        for one in bins
    ]
    table = make_table(["confidence", "samples", "mean confidence", "share right"], rows)
    return Section("Calibration", [draw_reliability(bins, error), Aside(tag("div", tag("p", words), table))])


def show_samples(predictions: Predictions, look: Callable[[str], bytes | None]) -> Section:
    """The worst mistakes and the least certain samples; `look` gives the picture of an id as a PNG file, or None."""
    wrong = worst_mistakes(predictions, MOST_SAMPLES)
    parts = [tag("h3", "The worst mistakes: the least probability for the target")]
    parts.append(_strip(predictions, wrong, look) if len(wrong) else tag("p", "There is no mistake."))
    parts.append(tag("h3", "The least certain: the least probability for the prediction, right or wrong"))
    return Section("Samples", [*parts, _strip(predictions, least_certain(predictions, MOST_SAMPLES), look)])


def _strip(predictions: Predictions, rows: np.ndarray, look: Callable[[str], bytes | None]) -> Html:
    return tag("ul", *(_sample(predictions, row, look) for row in rows.tolist()), class_="samples")


def _sample(predictions: Predictions, row: int, look: Callable[[str], bytes | None]) -> Html:
    """A picture, what it is, and what it was taken for, each with its probability."""
    assert predictions.targets is not None
    values, target, name = predictions.probabilities[row], int(predictions.targets[row]), predictions.ids[row]
    taken = int(values.argmax())
    png = look(name)
    picture = Html("")
    if png is not None:
        picture = make_image(png, f"sample {name}", "large" if max(size_of(png)) > SMALL else None)
    what, sure = f"{predictions.classes[target]}, right", f"with {values[target]:.3f}"
    if taken != target:
        what = f"{predictions.classes[target]} taken for {predictions.classes[taken]}"
        sure = f"{values[target]:.3f} against {values[taken]:.3f}"
    return tag("li", picture, tag("b", what), tag("span", sure), tag("small", name))


def show_time(run: History) -> Section:
    """How long each stage took, and how much of that was waiting for data."""
    if not run.timings:
        return Section("Time", [tag("p", "No epoch has ended, so there are no times.")])
    rows = []
    for stage in unique(line["stage"] for line in run.timings):
        lines = [line for line in run.timings if line["stage"] == stage]
        seconds, waits = (sum(line[name] for line in lines) for name in ("seconds", "data_wait_seconds"))
        rate = statistics.median(line["samples_per_second"] for line in lines)
        memory = max(line["peak_memory_bytes"] for line in lines) / 1e9
        share = waits / seconds if seconds else 0
        rows.append((stage, len(lines), say_seconds(seconds), f"{share:.1%}", f"{rate:,.0f}", f"{memory:.2f}"))
    header = ["stage", "epochs", "training", "waiting for data", "median samples a second", "peak memory, GB"]
    return Section("Time", [*draw_times(run.timings, run.spans()), make_table(header, rows)])


def show_record(run: History) -> Section:
    """What ran, on what, and how it ended; what was not committed."""
    rows = [(name, say_value(value)) for name, value in flatten(run.record)]
    if (changes := run.folder / "git.diff").is_file():
        lines = changes.read_bytes().count(b"\n")
        rows.append(("git.diff", f"{lines:,} lines on what was not committed"))
    if not rows:
        return Section("Record", [tag("p", "run.json is not there.")])
    return Section("Record", [make_table(["run.json", ""], rows, texts=2)])


def show_knobs(columns: Mapping[str, Mapping[str, Any]]) -> Section:
    """Configs side by side, by the heads of their columns: the knobs that differ first, and marked."""
    configs = {name: dict(flatten(config)) for name, config in columns.items()}
    differing = differences(list(configs.values()))
    same = [name for name in unique(name for one in configs.values() for name in one) if name not in differing]
    first = _knob_table(differing, configs, marked=True) if differing else tag("p", "No knob differs.")
    rest = _knob_table([name for name in same if name not in OF_A_RUN], configs, marked=False)
    return Section("Knobs", [first, fold("The knobs that are the same", rest)])


def _knob_table(names: Sequence[str], configs: Mapping[str, Mapping[str, Any]], *, marked: bool) -> Html:
    rows = [
        (name, *(say_value(one[name]) if name in one else "not there" for one in configs.values())) for name in names
    ]
    return make_table(["knob", *configs], rows, texts=len(configs) + 1, marked=range(len(rows)) if marked else ())


def differences(knobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names that do not have one value in all configs, but for those that every run has for itself."""
    first, absent = knobs[0], object()
    names = unique(name for one in knobs for name in one)
    return [
        name
        for name in names
        if name not in OF_A_RUN and any(one.get(name, absent) != first.get(name, absent) for one in knobs)
    ]


def show_runs(runs: Sequence[History], folder: Path) -> Section:
    """A row for each run: how it ended, its best score, time and speed; and their mean where they repeat one recipe.

    A run that has a page of its own is linked to it; this one will be in `folder`.
    """
    bests = [run.best() for run in runs]
    scores = [run.value(best, run.ranked_part, run.metric) for run, best in zip(runs, bests, strict=True)]
    rows = [
        (
            _link(run, folder),
            run.outcome(),
            run.place(best) or NONE,
            run.metric,
            say_number(score),
            len(run.epochs),
            say_seconds(run.seconds()),
            f"{run.samples_per_second():,.0f}" if run.timings else NONE,
            str(run.record.get("git_commit") or NONE)[:7],
        )
        for run, best, score in zip(runs, bests, scores, strict=True)
    ]
    header = ["run", "outcome", "best in", "metric", "score", "epochs", "training", "samples/s", "commit"]
    parts = [make_table(header, rows, texts=4)]
    if _repeat_one_recipe(runs) and all(map(math.isfinite, scores)):
        spread = f"mean {statistics.mean(scores):.4f}, standard deviation {statistics.stdev(scores):.4f} (n - 1)"
        parts.append(tag("p", f"These runs differ in fold or seed alone: {runs[0].metric} has {spread}."))
    return Section("Runs", parts)


def _link(run: History, folder: Path) -> Html:
    page = run.folder / "report.html"
    if not page.is_file():
        return tag("span", run.name)
    return tag("a", run.name, href=quote(os.path.relpath(page.resolve(), folder.resolve())))


def _repeat_one_recipe(runs: Sequence[History]) -> bool:
    return set(differences([dict(flatten(run.config)) for run in runs])) <= REPEATS


def compare_curves(runs: Sequence[History]) -> Section:
    """The curves of each metric, all runs in one plot: one plot for what ranks epochs, one for training."""
    plots = []
    for metric in unique(metric for run in runs for metric in run.metrics):
        for kind in ("valid", "train"):
            lines = [
                Line(run.name, run.curve(part, metric), *_colour(number), run.best() if kind == "valid" else None)
                for number, run in enumerate(runs)
                if run.has(part := run.ranked_part if kind == "valid" else kind, metric)
            ]
            words = _file_name(kind, metric), f"{metric}, {kind}", metric
            plots += [draw_curves(*words, lines, may_be_log=_is_loss(metric))] if lines else []
    rates = [Line(run.name, run.rates(), *_colour(number)) for number, run in enumerate(runs)]
    plots.append(draw_curves("learning_rate", "learning rate", "at the end of each epoch", rates))
    return Section("Curves", plots)


def _colour(number: int) -> tuple[str, str]:
    """A colour and a style of line that no other of the first 28 runs has; curves that coincide are both seen."""
    return COLOURS[number % len(COLOURS)], ("-", "--", "-.", ":")[number % 4]


def say_number(value: float | None) -> str:
    """Four digits after the point; a dash for none."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.4f}"


def say_seconds(seconds: float) -> str:
    """A time in the unit that fits."""
    if not math.isfinite(seconds):
        return NONE
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def say_value(value: Any) -> str:
    """A knob, or a value of run.json."""
    if isinstance(value, list | tuple):
        return ", ".join(map(say_value, value)) or NONE
    return NONE if value is None else str(value)


def _is_loss(metric: str) -> bool:
    return metric in LOWER_IS_BETTER


def _file_name(kind: str, metric: str) -> str:
    """A metric may be called as no file can be."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", f"{kind}_{metric}")
