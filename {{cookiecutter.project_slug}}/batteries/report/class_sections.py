"""The sections and key numbers of predictions of one class per sample."""

from collections.abc import Sequence

import numpy as np

from batteries.core.text import count_of
from batteries.evaluation.error_analysis import (
    bin_by_confidence,
    compute_confusion_matrix,
    least_confident,
    most_confused_pairs,
    most_misclassified,
    score_classes,
    worst_errors,
)
from batteries.evaluation.predictions import Predictions
from batteries.report.calibration import OF_CLASSES, make_calibration_tile, render_calibration_section
from batteries.report.html import Aside, Html, Section, Tile, make_table, tag
from batteries.report.prediction_plots import MAX_CLASSES, draw_confusion_matrix
from batteries.report.sample_list import MAX_SAMPLES, SampleText, ThumbnailOf, render_sample_list


def make_class_tiles(predictions: Predictions) -> list[Tile]:
    """Return the key numbers of the predictions of the valid split."""
    return [make_calibration_tile(bin_by_confidence(predictions))]


def render_class_sections(predictions: Predictions, thumbnail_of: ThumbnailOf) -> list[Section]:
    """Build all sections of predictions of one class per sample.

    Args:
        predictions: The predictions, with targets.
        thumbnail_of: Returns the image of an id as a PNG file; None if the sample is not an image.
    """
    bins = bin_by_confidence(predictions)
    return [
        render_classes_section(predictions),
        render_calibration_section(bins, OF_CLASSES, count_of(len(predictions.ids), "sample")),
        render_samples_section(predictions, thumbnail_of),
    ]


def render_classes_section(predictions: Predictions) -> Section:
    """Build the section with the confusion matrix, the most confused classes, and the scores of each class."""
    counts = compute_confusion_matrix(predictions)
    classes = predictions.classes
    chosen = most_misclassified(counts, MAX_CLASSES)
    title = "Confusion matrix"
    if len(chosen) < len(classes):
        title = f"Confusion matrix of the {len(chosen)} of {len(classes):,} classes with the most errors"
    plot = draw_confusion_matrix(
        counts[np.ix_(chosen, chosen)],
        counts.sum(1)[chosen],
        [classes[index] for index in chosen],
        title,
    )
    heading = tag("h3", "Scores of each class, lowest F1 first")
    return Section(
        "Classes", [plot, _render_confused_pairs(counts, classes), heading, _render_class_table(counts, classes)]
    )


def _render_class_table(counts: np.ndarray, classes: Sequence[str]) -> Html:
    rows = [
        [
            score.name,
            score.confused_with,
            f"{score.samples:,}",
            f"{score.recall:.3f}",
            f"{score.precision:.3f}",
            f"{score.f1:.3f}",
        ]
        for score in score_classes(counts, classes)
    ]
    header = ["class", "most often confused with", "samples", "recall", "precision", "F1"]
    return make_table(header, rows, text_columns=2)


def _render_confused_pairs(counts: np.ndarray, classes: Sequence[str]) -> Aside:
    pairs = most_confused_pairs(counts, classes)
    if not pairs:
        return Aside(tag("p", f"No errors in {count_of(int(counts.sum()), 'sample')}."))
    rows = [[pair.target, pair.prediction, f"{pair.samples:,}", f"{pair.fraction:.1%}"] for pair in pairs]
    table = make_table(["target", "prediction", "samples", "of the target"], rows, text_columns=2)
    return Aside(tag("div", tag("h3", "Most frequent confusions"), table))


def render_samples_section(predictions: Predictions, thumbnail_of: ThumbnailOf) -> Section:
    """Build the section with the worst errors and the least confident predictions.

    Args:
        predictions: The predictions, with targets.
        thumbnail_of: Returns the image of an id as a PNG file; None if the sample is not an image.
    """

    def render(rows: np.ndarray) -> Html:
        return render_sample_list(predictions.ids, rows, thumbnail_of, lambda row: _describe_sample(predictions, row))

    errors = worst_errors(predictions, MAX_SAMPLES)
    unsure = least_confident(predictions, MAX_SAMPLES)
    content = [
        tag("h3", "Worst errors: lowest probability of the target"),
        render(errors) if len(errors) else tag("p", "No sample is misclassified."),
        tag("h3", "Least confident: lowest probability of the prediction, correct or not"),
        render(unsure),
    ]
    return Section("Samples", content)


def _describe_sample(predictions: Predictions, row: int) -> SampleText:
    """Describe the target and the prediction of a sample with their probabilities."""
    assert predictions.targets is not None
    classes = predictions.classes
    probabilities = predictions.values[row]
    target = int(predictions.targets[row])
    predicted = int(probabilities.argmax())
    if predicted == target:
        return SampleText(f"{classes[target]}, correct", [f"with {probabilities[target]:.3f}"])
    title = f"{classes[target]} predicted as {classes[predicted]}"
    return SampleText(title, [f"{probabilities[target]:.3f} against {probabilities[predicted]:.3f}"])
