"""The sections and key numbers of predictions of several labels per sample."""

import numpy as np

from batteries.core.text import count_of, list_first
from batteries.evaluation.label_analysis import (
    Threshold,
    bin_decisions,
    precision_recall_curves,
    score_labels,
    worst_labelled_samples,
)
from batteries.evaluation.predictions import Predictions
from batteries.metrics.labels import f1_score
from batteries.report.calibration import OF_LABELS, make_calibration_tile, render_calibration_section
from batteries.report.html import Aside, Html, Section, Tile, make_table, tag
from batteries.report.plots import Plot
from batteries.report.prediction_plots import draw_precision_recall
from batteries.report.sample_list import MAX_SAMPLES, SampleText, ThumbnailOf, render_sample_list
from batteries.report.sections import format_number

MAX_CURVES = 10  # labels in the plot of precision and recall
MAX_NAMED = 5  # labels listed below a sample


def make_label_tiles(predictions: Predictions, threshold: Threshold) -> list[Tile]:
    """Return the key numbers of the predictions of the valid split."""
    source = "of the checkpoint" if threshold.is_stored else "the best one on valid"
    return [
        make_calibration_tile(bin_decisions(predictions)),
        Tile("threshold", f"{threshold.value:.2f}", source),
    ]


def render_label_sections(predictions: Predictions, threshold: Threshold, thumbnail_of: ThumbnailOf) -> list[Section]:
    """Build all sections of predictions of several labels.

    Args:
        predictions: The predictions, with targets.
        threshold: The probability from which on a label counts as present.
        thumbnail_of: Returns the image of an id as a PNG file; None if the sample is not an image.
    """
    decisions = f"{predictions.values.size:,} decisions, one for each sample and label"
    return [
        render_labels_section(predictions, threshold),
        render_calibration_section(bin_decisions(predictions), OF_LABELS, decisions),
        render_label_samples_section(predictions, threshold, thumbnail_of),
    ]


def render_labels_section(predictions: Predictions, threshold: Threshold) -> Section:
    """Build the section with precision-recall curves, F1 at the threshold, and the scores of each label."""
    assert predictions.targets is not None
    curves = precision_recall_curves(predictions, threshold.value, MAX_CURVES)
    content: list[Html | Plot] = []
    if curves:
        present = int(predictions.targets.any(0).sum())
        title = "Precision and recall of each label"
        if len(curves) < present:
            title = f"The {len(curves)} of {count_of(present, 'label')} with the lowest average precision"
        content.append(draw_precision_recall(curves, title))
    content.append(_render_threshold(predictions, threshold))
    content.append(tag("h3", "Scores of each label, lowest F1 first"))
    content.append(_render_label_table(predictions, threshold))
    return Section("Labels", content)


def _render_threshold(predictions: Predictions, threshold: Threshold) -> Aside:
    assert predictions.targets is not None
    source = (
        "the threshold of the checkpoint, with the highest macro F1 on valid after its epoch"
        if threshold.is_stored
        else "the threshold with the highest macro F1 on these predictions, because the checkpoint has none"
    )
    text = (
        f"A label counts as present if its probability is {threshold.value:.2f} or more: {source}. The dots in the "
        "plot are the precision and recall there."
    )
    predicted = predictions.values >= threshold.value
    macro = f1_score(predictions.targets, predicted, "macro")
    micro = f1_score(predictions.targets, predicted, "micro")
    rows = [
        ["macro: the mean over labels", f"{macro:.4f}"],
        ["micro: all decisions together", f"{micro:.4f}"],
    ]
    return Aside(tag("div", tag("p", text), make_table(["F1 at the threshold", ""], rows)))


def _render_label_table(predictions: Predictions, threshold: Threshold) -> Html:
    rows = [
        [
            score.name,
            f"{score.samples:,}",
            format_number(score.average_precision),
            format_number(score.roc_auc),
            f"{score.precision:.3f}",
            f"{score.recall:.3f}",
            f"{score.f1:.3f}",
        ]
        for score in score_labels(predictions, threshold.value)
    ]
    header = ["label", "samples", "average precision", "ROC AUC", "precision", "recall", "F1"]
    return make_table(header, rows)


def render_label_samples_section(predictions: Predictions, threshold: Threshold, thumbnail_of: ThumbnailOf) -> Section:
    """Build the section with the samples of the largest mean binary cross-entropy.

    Args:
        predictions: The predictions, with targets.
        threshold: The probability from which on a label counts as present.
        thumbnail_of: Returns the image of an id as a PNG file; None if the sample is not an image.
    """
    samples = render_sample_list(
        predictions.ids,
        worst_labelled_samples(predictions, MAX_SAMPLES),
        thumbnail_of,
        lambda row: _describe_sample(predictions, threshold, row),
    )
    return Section("Samples", [tag("h3", "Worst samples: largest mean binary cross-entropy of the labels"), samples])


def _describe_sample(predictions: Predictions, threshold: Threshold, row: int) -> SampleText:
    """Describe the present and the predicted labels of a sample, with the probability of each."""
    assert predictions.targets is not None
    is_present = predictions.targets[row] == 1
    is_predicted = predictions.values[row] >= threshold.value
    details = [f"predicted: {_list_labels(predictions, row, is_predicted)}"]
    if (is_present & ~is_predicted).any():
        details.append(f"missed: {_list_labels(predictions, row, is_present & ~is_predicted)}")
    present = [predictions.classes[index] for index in np.flatnonzero(is_present)]
    return SampleText(list_first(present, MAX_NAMED) or "no label", details)


def _list_labels(predictions: Predictions, row: int, chosen: np.ndarray) -> str:
    """List the chosen labels with their probabilities, the highest first."""
    values = predictions.values[row]
    order = [index for index in np.argsort(-values, kind="stable") if chosen[index]]
    listed = (f"{predictions.classes[index]} ({values[index]:.3f})" for index in order)
    return list_first(listed, MAX_NAMED) or "no label"
