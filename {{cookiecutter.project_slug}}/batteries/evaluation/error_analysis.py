"""Error analysis of one class per sample: confusion matrix, scores per class, calibration, misclassified samples."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from batteries.core.errors import UserError
from batteries.core.text import count_of
from batteries.evaluation.predictions import Predictions

BINS = 15  # confidence bins, as in Guo et al. 2017


def check_targets(predictions: Predictions) -> None:
    """Raise UserError unless all targets are known and all predictions finite."""
    values = predictions.values
    if predictions.targets is None:
        raise UserError("the targets of these samples are not known.")
    infinite = np.flatnonzero(~np.isfinite(values).all(1))
    if len(infinite):
        raise UserError(
            f"the outputs of the model are not finite for {len(infinite):,} of {count_of(len(values), 'sample')}."
        )


def compute_confusion_matrix(predictions: Predictions) -> np.ndarray:
    """Count the samples of each target class (rows) that are predicted as each class (columns).

    Returns:
        Counts (C, C), int64.
    """
    from sklearn.metrics import confusion_matrix

    predicted = predictions.values.argmax(1)
    return confusion_matrix(predictions.targets, predicted, labels=range(len(predictions.classes)))


class ClassScore(NamedTuple):
    """The scores of one class.

    Attributes:
        name: The class.
        samples: The number of samples with this target.
        recall: The fraction of these samples that are predicted as this class.
        precision: The fraction of the samples predicted as this class that have it as their target.
        f1: The harmonic mean of recall and precision.
        confused_with: The class that its misclassified samples are most often predicted as, and their number; empty if
            none are misclassified.
    """

    name: str
    samples: int
    recall: float
    precision: float
    f1: float
    confused_with: str


def score_classes(counts: np.ndarray, classes: Sequence[str]) -> list[ClassScore]:
    """Compute the scores of each class, the lowest F1 first; a fraction of no samples is 0.

    Args:
        counts: The confusion matrix (C, C).
        classes: The names of the C classes.
    """
    correct = np.diag(counts)
    samples = counts.sum(1)
    predicted = counts.sum(0)
    recall = correct / np.maximum(samples, 1)
    precision = correct / np.maximum(predicted, 1)
    f1 = 2 * correct / np.maximum(samples + predicted, 1)
    scores = [
        ClassScore(
            name=name,
            samples=int(samples[index]),
            recall=recall[index],
            precision=precision[index],
            f1=f1[index],
            confused_with=_most_confused_with(counts[index], index, classes),
        )
        for index, name in enumerate(classes)
    ]
    return sorted(scores, key=lambda score: score.f1)


def _most_confused_with(counts: np.ndarray, target: int, classes: Sequence[str]) -> str:
    errors = np.where(np.arange(len(counts)) == target, 0, counts)
    return f"{classes[int(errors.argmax())]} ({errors.max()})" if errors.any() else ""


class Confusion(NamedTuple):
    """A pair of classes: how many samples of `target` are predicted as `prediction`, and their fraction of all."""

    target: str
    prediction: str
    samples: int
    fraction: float


def most_confused_pairs(counts: np.ndarray, classes: Sequence[str], most: int = 10) -> list[Confusion]:
    """List up to `most` pairs of classes from a confusion matrix (C, C), the most frequent first."""
    errors = counts - np.diag(np.diag(counts))
    order = np.argsort(-errors, axis=None, kind="stable")[:most]
    pairs = [divmod(int(position), len(classes)) for position in order]
    return [
        Confusion(classes[row], classes[column], int(errors[row, column]), errors[row, column] / counts[row].sum())
        for row, column in pairs
        if errors[row, column]
    ]


def most_misclassified(counts: np.ndarray, most: int) -> np.ndarray:
    """Return the indices, in increasing order, of the `most` classes with the most errors.

    An error counts for the target and for the predicted class.
    """
    errors = counts - np.diag(np.diag(counts))
    return np.sort(np.argsort(-(errors.sum(0) + errors.sum(1)), kind="stable")[:most])


class ConfidenceBin(NamedTuple):
    """The samples with a confidence over `low`, up to `high`: their number, mean confidence and accuracy."""

    low: float
    high: float
    samples: int
    confidence: float
    accuracy: float


def bin_by_confidence(predictions: Predictions) -> list[ConfidenceBin]:
    """Group samples by their largest probability; see `bin_probabilities`."""
    values = predictions.values
    return bin_probabilities(values.max(1), values.argmax(1) == predictions.targets)


def bin_probabilities(probabilities: np.ndarray, outcomes: np.ndarray) -> list[ConfidenceBin]:
    """Group decisions into BINS bins of equal width by their probability; empty bins are omitted.

    Args:
        probabilities: The probability of each decision, shape (N,).
        outcomes: Whether each decision is correct, or the label is present, shape (N,), bool.
    """
    edges = np.linspace(0, 1, BINS + 1)
    bin_of = np.digitize(probabilities, edges[1:-1], right=True)
    bins = []
    for number in range(BINS):
        chosen = np.flatnonzero(bin_of == number)
        if len(chosen):
            low, high = edges[number : number + 2]
            bins.append(
                ConfidenceBin(low, high, len(chosen), probabilities[chosen].mean(), outcomes[chosen].mean()),
            )
    return bins


def expected_calibration_error(bins: Sequence[ConfidenceBin]) -> float:
    """Return the mean over samples of the gap between confidence and accuracy of their bin (Guo et al. 2017)."""
    samples = sum(group.samples for group in bins)
    return sum(group.samples * abs(group.accuracy - group.confidence) for group in bins) / samples


def worst_errors(predictions: Predictions, most: int) -> np.ndarray:
    """Return the rows of up to `most` misclassified samples, the lowest probability of the target first."""
    values = predictions.values
    targets = predictions.targets
    wrong = np.flatnonzero(values.argmax(1) != targets)
    target_probabilities = values[wrong, targets[wrong]]  # type: ignore[index]
    return wrong[np.argsort(target_probabilities, kind="stable")[:most]]


def least_confident(predictions: Predictions, most: int) -> np.ndarray:
    """Return the rows of up to `most` samples with the smallest largest probability, correct or not."""
    return np.argsort(predictions.values.max(1), kind="stable")[:most]
