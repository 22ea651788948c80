"""What predictions get wrong, and how sure they are of it: confusions, classes, calibration, single samples."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from batteries.evaluation.predictions import Predictions

BINS = 15  # of confidence, as in Guo et al. 2017


def has_one_class_each(predictions: Predictions) -> bool:
    """Whether each sample's target is known and one class: no vector of labels, number or mask."""
    targets = predictions.targets
    return targets is not None and targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer)


def what_is_missing(predictions: Predictions) -> str:
    """Why nothing can be said of classes, as a sentence; empty where all can be."""
    values = predictions.probabilities
    if predictions.targets is None:
        return "The targets of these samples are not known."
    if values.ndim != 2 or not has_one_class_each(predictions):
        return "Its targets are not one class for each sample, so there are no confusions and no calibration."
    if len(wrong := np.flatnonzero(~np.isfinite(values).all(1))):
        return f"The model gives numbers that are not finite for {len(wrong):,} of {len(values):,} samples."
    return ""


def count_confusions(predictions: Predictions) -> np.ndarray:
    """How many samples of each class (rows) were taken for each class (columns): (C, C)."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(
        predictions.targets, predictions.probabilities.argmax(1), labels=range(len(predictions.classes))
    )


class ClassScore(NamedTuple):
    """One class: of its samples the share that was found, of those taken for it the share that is of it."""

    name: str
    samples: int
    recall: float
    precision: float
    f1: float
    taken_for: str  # the other class that its samples are most often taken for, and how many of them


def score_classes(counts: np.ndarray, classes: Sequence[str]) -> list[ClassScore]:
    """A row for each class from `count_confusions`, the lowest F1 first; 0 where a share has no samples."""
    right, samples, taken = np.diag(counts), counts.sum(1), counts.sum(0)
    recall, precision = right / np.maximum(samples, 1), right / np.maximum(taken, 1)
    f1 = 2 * right / np.maximum(samples + taken, 1)
    rows = [
        ClassScore(name, int(samples[row]), recall[row], precision[row], f1[row], _taken_for(counts[row], row, classes))
        for row, name in enumerate(classes)
    ]
    return sorted(rows, key=lambda row: row.f1)


def _taken_for(counts: np.ndarray, own: int, classes: Sequence[str]) -> str:
    others = np.where(np.arange(len(counts)) == own, 0, counts)
    return f"{classes[int(others.argmax())]} ({others.max()})" if others.any() else ""


class Confusion(NamedTuple):
    """How often samples of one class were taken for another, and which share of the class that is."""

    target: str
    prediction: str
    samples: int
    share: float


def most_confused(counts: np.ndarray, classes: Sequence[str], most: int = 10) -> list[Confusion]:
    """The pairs of classes that are most often confused, the most frequent first."""
    off = counts - np.diag(np.diag(counts))
    order = np.argsort(-off, axis=None, kind="stable")[:most]
    pairs = [divmod(int(place), len(classes)) for place in order]
    return [
        Confusion(classes[row], classes[column], int(off[row, column]), off[row, column] / counts[row].sum())
        for row, column in pairs
        if off[row, column]
    ]


def most_mistaken(counts: np.ndarray, most: int) -> np.ndarray:
    """The indices of the classes with the most mistakes, of their samples or for them, in their own order."""
    off = counts - np.diag(np.diag(counts))
    return np.sort(np.argsort(-(off.sum(0) + off.sum(1)), kind="stable")[:most])


class Bin(NamedTuple):
    """The samples whose confidence is over `low`, up to `high`: their mean confidence, and the share that is right."""

    low: float
    high: float
    samples: int
    confidence: float
    accuracy: float


def bin_by_confidence(predictions: Predictions) -> list[Bin]:
    """The samples in BINS of equal width by their largest probability; empty ones are left out."""
    values = predictions.probabilities
    confidence, right = values.max(1), values.argmax(1) == predictions.targets
    edges = np.linspace(0, 1, BINS + 1)
    places = np.digitize(confidence, edges[1:-1], right=True)
    return [
        Bin(edges[place], edges[place + 1], len(chosen), confidence[chosen].mean(), right[chosen].mean())
        for place in range(BINS)
        if len(chosen := np.flatnonzero(places == place))
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: how far confidence is from accuracy, as a mean over samples (Guo et al. 2017)."""
    samples = sum(one.samples for one in bins)
    return sum(one.samples * abs(one.accuracy - one.confidence) for one in bins) / samples


def worst_mistakes(predictions: Predictions, most: int) -> np.ndarray:
    """Rows of wrong predictions, those that leave their target the least probability first."""
    values, targets = predictions.probabilities, predictions.targets
    wrong = np.flatnonzero(values.argmax(1) != targets)
    left = values[wrong, targets[wrong]]  # type: ignore[index]
    return wrong[np.argsort(left, kind="stable")[:most]]


def least_certain(predictions: Predictions, most: int) -> np.ndarray:
    """Rows whose largest probability is smallest, right or wrong."""
    return np.argsort(predictions.probabilities.max(1), kind="stable")[:most]
