"""Error analysis of several labels per sample: scores per label, calibration of all decisions, worst samples."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from batteries.evaluation.error_analysis import ConfidenceBin, bin_probabilities
from batteries.evaluation.predictions import Predictions
from batteries.evaluation.scoring import sample_scores
from batteries.metrics import labels


class Threshold(NamedTuple):
    """The probability from which on a label counts as present, and whether the checkpoint has it."""

    value: float
    is_stored: bool


def stored_threshold(metrics: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Return the validation metric `threshold` of a checkpoint; None if it has none.

    Args:
        metrics: The metrics of the checkpoint, by split.
    """
    split = "valid_ema" if "valid_ema" in metrics else "valid"  # the split that the weights belong to
    value = metrics.get(split, {}).get("threshold")
    return value if value is not None and np.isfinite(value) else None


def choose_threshold(predictions: Predictions, stored: float | None) -> Threshold:
    """Return the stored threshold, or else the one with the highest macro F1 on `predictions`."""
    if stored is not None:
        return Threshold(stored, is_stored=True)
    assert predictions.targets is not None
    return Threshold(labels.best_threshold(predictions.targets, predictions.values), is_stored=False)


class LabelScore(NamedTuple):
    """The scores of one label.

    Attributes:
        name: The label.
        samples: The number of samples with it.
        average_precision: The mean precision over recall; NaN if no sample has the label.
        roc_auc: The area under the ROC curve; NaN if all samples have the label, or none.
        precision: The fraction of the samples predicted with the label that have it.
        recall: The fraction of the samples with the label that are predicted with it.
        f1: The harmonic mean of precision and recall.
    """

    name: str
    samples: int
    average_precision: float
    roc_auc: float
    precision: float
    recall: float
    f1: float


def score_labels(predictions: Predictions, threshold: float) -> list[LabelScore]:
    """Compute the scores of each label, the lowest F1 first; a fraction of no samples is 0.

    Args:
        predictions: The predictions, with targets.
        threshold: The probability from which on a label counts as present.
    """
    from sklearn import metrics

    targets = predictions.targets
    assert targets is not None
    predicted = predictions.values >= threshold
    correct = (predicted & (targets == 1)).sum(0)
    samples = targets.sum(0)
    precision = correct / np.maximum(predicted.sum(0), 1)
    recall = correct / np.maximum(samples, 1)
    f1 = 2 * correct / np.maximum(samples + predicted.sum(0), 1)
    average_precision = labels.average_precisions(metrics, targets, predictions.values)
    roc_auc = labels.roc_aucs(metrics, targets, predictions.values)
    scores = [
        LabelScore(
            name=name,
            samples=int(samples[index]),
            average_precision=average_precision[index],
            roc_auc=roc_auc[index],
            precision=precision[index],
            recall=recall[index],
            f1=f1[index],
        )
        for index, name in enumerate(predictions.classes)
    ]
    return sorted(scores, key=lambda score: score.f1)


class PrecisionRecall(NamedTuple):
    """The precision-recall curve of a label.

    Attributes:
        score: The scores of the label.
        precisions: The precision at each threshold, shape (T,).
        recalls: The recall at each threshold, descending, shape (T,).
    """

    score: LabelScore
    precisions: np.ndarray
    recalls: np.ndarray


def precision_recall_curves(predictions: Predictions, threshold: float, most: int) -> list[PrecisionRecall]:
    """Compute the curves of the `most` labels with the lowest average precision, the lowest first.

    Labels that no sample has are left out, because their recall is not defined.
    """
    from sklearn.metrics import precision_recall_curve

    targets = predictions.targets
    assert targets is not None
    present = [score for score in score_labels(predictions, threshold) if score.samples]
    curves = []
    for score in sorted(present, key=lambda score: score.average_precision)[:most]:
        column = predictions.classes.index(score.name)
        values = predictions.values[:, column]
        precisions, recalls, _ = precision_recall_curve(targets[:, column], values, drop_intermediate=True)
        curves.append(PrecisionRecall(score, precisions, recalls))
    return curves


def bin_decisions(predictions: Predictions) -> list[ConfidenceBin]:
    """Group all decisions, one for each sample and label, by their probability; `accuracy` is how many are present."""
    assert predictions.targets is not None
    return bin_probabilities(predictions.values.ravel(), predictions.targets.ravel() == 1)


def worst_labelled_samples(predictions: Predictions, most: int) -> np.ndarray:
    """Return the rows of the `most` samples with the largest mean binary cross-entropy, the largest first."""
    return np.argsort(-sample_scores(predictions)["log_loss"], kind="stable")[:most]
