"""Plots of predictions: of one class per sample, of several labels, and of numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from batteries.evaluation.error_analysis import ConfidenceBin
from batteries.evaluation.label_analysis import PrecisionRecall
from batteries.evaluation.number_analysis import SizeBin
from batteries.report.plots import COLOURS, GREY, WIDTH, Plot, draw_plot, file_name, legend_label, shorten

MAX_CLASSES = 24  # of a confusion matrix with readable names
MAX_NARROW_CLASSES = 12  # of a confusion matrix that is readable at half the width of a report
RESIDUAL_BINS = 40
NARROW_NAME = 12  # characters of a label up to which the legend leaves room for curves at half the width of a report
OPAQUE_POINTS = 200  # points of a scatter plot up to which they are not transparent


def draw_confusion_matrix(counts: np.ndarray, samples: np.ndarray, classes: Sequence[str], title: str) -> Plot:
    """Draw a confusion matrix, coloured by the fraction of the samples of the target class.

    The colour follows the square root of the fraction, so that a few per cent are visible.

    Args:
        counts: The counts (C, C) of targets (rows) and predictions (columns).
        samples: The samples (C,) of each target, including those predicted as a class that is not drawn.
        classes: The names of the C classes.
        title: The title of the plot.
    """
    from matplotlib.colors import PowerNorm

    fractions = counts / np.maximum(samples, 1)[:, None]
    names = [shorten(name, 14) for name in classes]
    rotation = 90 if max(map(len, names)) > 2 else 0

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(visible=False)
        image = axes.imshow(fractions, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
        axes.set_xticks(range(len(names)), names, rotation=rotation, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.tick_params(length=0)
        axes.set(title=title, xlabel="prediction", ylabel="target")
        figure.colorbar(image, ax=axes, shrink=0.7, label="fraction of the target class")
        _write_counts(axes, counts, fractions)

    size = 0.34 * len(classes)  # inches
    width = max(WIDTH, size + 2.6)
    height = max(4.6, size + 1.9)
    return draw_plot("confusion", title, draw, width, height, wide=len(classes) > MAX_NARROW_CLASSES)


def _write_counts(axes: Any, counts: np.ndarray, fractions: np.ndarray) -> None:
    for row, column in np.argwhere(counts):
        colour = "white" if fractions[row, column] > 0.3 else "black"
        text = f"{counts[row, column]:,}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7.5 if len(text) < 4 else 6)


def draw_reliability(
    bins: Sequence[ConfidenceBin], error: float, unit: str, axis: str, probability: str, outcome: str
) -> Plot:
    """Draw a reliability diagram: the accuracy for each confidence, above the number of samples.

    Args:
        bins: The samples by confidence.
        error: The expected calibration error.
        unit: What a bin counts, such as samples.
        axis: The label of the axis of probabilities.
        probability: What the probability is called, such as confidence.
        outcome: What a bin has a fraction of, such as accuracy.
    """
    centres = [(group.low + group.high) / 2 for group in bins]
    widths = [group.high - group.low for group in bins]
    confidences = [group.confidence for group in bins]
    accuracies = [group.accuracy for group in bins]
    counts = [group.samples for group in bins]

    def draw(figure: Any) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.bar(centres, accuracies, widths, color="#56B4E9", edgecolor="white", label=outcome)
        above.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, label="perfect calibration")
        above.plot(confidences, accuracies, "o", color="#D55E00", markersize=4, label=f"at the mean {probability}")
        above.set(title=f"Calibration: expected error {error:.4f}", ylabel=outcome, ylim=(0, 1.02), xlim=(0, 1))
        figure.legend(loc="outside lower center", ncols=3, fontsize=8.5)
        below.bar(centres, counts, widths, color=GREY, edgecolor="white")
        below.set(xlabel=axis, ylabel=f"{unit}, log", yscale="log", ylim=(0.5, None))
        below.yaxis.set_major_formatter(lambda value, _: f"{value:g}")

    return draw_plot("calibration", f"reliability diagram, expected calibration error {error:.4f}", draw)


def draw_precision_recall(curves: Sequence[PrecisionRecall], title: str) -> Plot:
    """Draw the precision at each recall of several labels; a dot is the precision and recall at the threshold.

    Args:
        curves: The curves of the labels.
        title: The title of the plot.
    """
    is_wide = any(len(score.name) > NARROW_NAME for score, _, _ in curves)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, (score, precisions, recalls) in enumerate(curves):
            colour = COLOURS[number % len(COLOURS)]
            style = "-" if number < len(COLOURS) else "--"
            label = f"{legend_label(score.name)} {score.average_precision:.3f}"
            axes.plot(recalls, precisions, style, color=colour, drawstyle="steps-post", label=label, linewidth=1.4)
            if score.recall:  # without a correct prediction, precision and recall are both 0
                axes.plot(score.recall, score.precision, "o", color=colour, markersize=5, markeredgecolor="white")
        axes.set(title=title, xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
        figure.legend(loc="outside right upper", fontsize=8.5, title="average precision", title_fontsize=8.5)

    width = WIDTH * (1.6 if is_wide else 1.2)
    return draw_plot("precision_recall", f"{title}: precision for each recall", draw, width, height=4.2, wide=is_wide)


def draw_predicted_numbers(index: int, name: str, values: np.ndarray, targets: np.ndarray) -> Plot:
    """Draw each prediction against its target, with the line on which they are equal.

    Args:
        index: The position of the target in the report.
        name: The name of the target.
        values: The predictions, shape (N,).
        targets: The targets, shape (N,).
    """
    both = np.concatenate([values, targets])
    ends = [both.min(), both.max()]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        opacity = float(np.clip(OPAQUE_POINTS / len(values), 0.05, 0.7))
        axes.plot(targets, values, "o", color=COLOURS[0], markersize=4, alpha=opacity, markeredgewidth=0)
        axes.plot(ends, ends, "--", color=GREY, linewidth=1, label="prediction = target")
        axes.set(title=f"{shorten(name, 28)}: predictions", xlabel="target", ylabel="prediction")
        figure.legend(loc="outside lower center", fontsize=8.5)

    return draw_plot(file_name(f"scatter_{index}", name), f"{name}: prediction against target", draw, height=4.2)


def draw_residuals(index: int, name: str, errors: np.ndarray) -> Plot:
    """Draw a histogram of the errors of one target, with their mean.

    Args:
        index: The position of the target in the report.
        name: The name of the target.
        errors: The predictions minus the targets, shape (N,).
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.hist(errors, bins=RESIDUAL_BINS, color="#56B4E9", edgecolor="white", linewidth=0.5)
        axes.axvline(0, color=GREY, linestyle="--", linewidth=1, label="no error")
        axes.axvline(errors.mean(), color="#D55E00", label=f"mean {errors.mean():.4g}")
        axes.set(title=f"{shorten(name, 28)}: errors", xlabel="prediction minus target", ylabel="samples")
        figure.legend(loc="outside lower center", ncols=2, fontsize=8.5)

    return draw_plot(file_name(f"errors_{index}", name), f"{name}: histogram of prediction minus target", draw)


def draw_errors_by_size(index: int, name: str, bins: Sequence[SizeBin]) -> Plot:
    """Draw the mean absolute error of the samples in each bin of the target, as bars.

    Args:
        index: The position of the target in the report.
        name: The name of the target.
        bins: The bins, such as deciles.
    """
    title = f"{shorten(name, 28)}: error by size"
    ranges = [_format_range(group.low, group.high) for group in bins]
    samples = sum(group.samples for group in bins)
    overall = sum(group.samples * group.mae for group in bins) / samples

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(visible=False, axis="x")
        axes.bar(range(len(bins)), [group.mae for group in bins], color="#56B4E9", edgecolor="white")
        axes.axhline(overall, color="#D55E00", linestyle="--", linewidth=1.2, label=f"all samples: {overall:.4g}")
        axes.set_xticks(range(len(bins)), ranges, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set(title=title, xlabel="target, in deciles", ylabel="mean absolute error")
        figure.legend(loc="outside lower center", fontsize=8.5)

    return draw_plot(file_name(f"size_{index}", name), f"{name}: mean absolute error by decile", draw, height=4.2)


def _format_range(low: float, high: float) -> str:
    """Format a range, or one number if both ends are equal; 0 instead of -0."""
    ends = dict.fromkeys(f"{value + 0.0:.3g}" for value in (low, high))
    return " to ".join(ends)


def draw_image_scores(scores: np.ndarray) -> Plot:
    """Draw a histogram of the mean intersection over union of each image, shape (N,), with its mean."""
    known = scores[np.isfinite(scores)]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.hist(known, bins=RESIDUAL_BINS, range=(0, 1), color="#56B4E9", edgecolor="white", linewidth=0.5)
        axes.axvline(known.mean(), color="#D55E00", label=f"mean {known.mean():.4g}")
        axes.set(title="IoU of each image", xlabel="mean IoU over the classes of an image", ylabel="images")
        figure.legend(loc="outside lower center", fontsize=8.5)

    return draw_plot("image_iou", "histogram of the mean IoU of each image", draw)
