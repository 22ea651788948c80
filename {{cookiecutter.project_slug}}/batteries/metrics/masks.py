"""Metrics of masks, from counts of pixels: a confusion matrix for each image."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

IGNORED = 255  # the value of pixels of a mask that count neither in the loss nor in metrics


def count_pixels(predicted: "torch.Tensor", targets: "torch.Tensor", num_classes: int) -> "torch.Tensor":
    """Count the pixels of each target class (rows) that are predicted as each class (columns), for each image.

    Args:
        predicted: The predicted classes, shape (N, H, W), integers.
        targets: The classes, shape (N, H, W), integers; pixels that are IGNORED are not counted.
        num_classes: The number C of classes.

    Returns:
        Counts (N, C, C), int64.
    """
    import torch  # imported here, because tools that only read tables start without it

    images = len(targets)
    is_counted = targets != IGNORED
    cells = targets.long() * num_classes + predicted.long()
    cells += torch.arange(images, device=targets.device).view(-1, 1, 1) * num_classes**2
    counts = torch.bincount(cells[is_counted], minlength=images * num_classes**2)
    return counts.view(images, num_classes, num_classes)


class PixelCounts(NamedTuple):
    """Numbers of pixels of each class, arrays of one shape (..., C); their means can stand for them.

    Attributes:
        correct: The pixels of the class that are predicted as it.
        target: The pixels of the class.
        predicted: The pixels that are predicted as the class.
    """

    correct: np.ndarray
    target: np.ndarray
    predicted: np.ndarray

    @classmethod
    def of(cls, confusion: np.ndarray) -> "PixelCounts":
        """Return the counts of confusion matrices (..., C, C), targets in rows."""
        confusion = np.asarray(confusion, dtype=np.float64)
        return cls(np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1), confusion.sum(-2))

    def total(self) -> "PixelCounts":
        """Return the sums over all images, shape (C,)."""
        return PixelCounts(*(np.asarray(part).reshape(-1, np.shape(part)[-1]).sum(0) for part in self))

    def iou(self) -> np.ndarray:
        """Return the intersection over union of each class; NaN if it is neither in the target nor predicted."""
        return _ratio(self.correct, self.target + self.predicted - self.correct)

    def dice(self) -> np.ndarray:
        """Return the Dice score (F1) of each class; NaN if it is neither in the target nor predicted."""
        return _ratio(2 * self.correct, self.target + self.predicted)

    def accuracy(self) -> np.ndarray:
        """Return the fraction of correct pixels, shape (...); NaN without a pixel."""
        return _ratio(np.sum(self.correct, -1), np.sum(self.target, -1))

    def metrics(self) -> dict[str, Any]:
        """Return the metrics of counts (C,): means over the classes that occur, and the IoU of each class."""
        return {
            "mean_iou": mean_of_known(self.iou()),
            "mean_dice": mean_of_known(self.dice()),
            "pixel_accuracy": float(self.accuracy()),
            "iou/": self.iou(),
        }


def mean_of_known(scores: np.ndarray) -> Any:
    """Return the mean over the last axis without NaN; NaN if there is no other value."""
    known = ~np.isnan(scores)
    return _ratio(np.where(known, scores, 0).sum(-1), known.sum(-1))[()]


def _ratio(numerator: Any, denominator: Any) -> np.ndarray:
    """Divide; NaN for 0 / 0."""
    above, below = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
