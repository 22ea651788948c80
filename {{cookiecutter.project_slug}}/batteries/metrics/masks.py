"""Metrics of masks, from counts of pixels: a confusion matrix for each image."""

import numpy as np
import torch

IGNORED = 255  # the value of pixels of a mask that count neither in the loss nor in metrics


def count_pixels(predicted: torch.Tensor, targets: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Count the pixels of each target class (rows) that are predicted as each class (columns), for each image.

    Args:
        predicted: The predicted classes, shape (N, H, W), integers.
        targets: The classes, shape (N, H, W), integers; pixels that are IGNORED are not counted.
        num_classes: The number C of classes.

    Returns:
        Counts (N, C, C), int64.
    """
    images = len(targets)
    is_counted = targets != IGNORED
    cells = targets.long() * num_classes + predicted.long()
    cells += torch.arange(images, device=targets.device).view(-1, 1, 1) * num_classes**2
    counts = torch.bincount(cells[is_counted], minlength=images * num_classes**2)
    return counts.view(images, num_classes, num_classes)


def intersections_over_unions(counts: np.ndarray) -> np.ndarray:
    """Return the intersection over union of each class; NaN if it is neither in the targets nor predicted.

    Args:
        counts: Confusion matrices (..., C, C), or their means.

    Returns:
        Scores (..., C).
    """
    correct, total = _correct_and_total(counts)
    union = total - correct
    return np.divide(correct, union, out=np.full(union.shape, np.nan), where=union > 0)


def dice_scores(counts: np.ndarray) -> np.ndarray:
    """Return the Dice score (F1) of each class, shape (..., C); NaN if it is neither in the targets nor predicted."""
    correct, total = _correct_and_total(counts)
    return np.divide(2 * correct, total, out=np.full(total.shape, np.nan), where=total > 0)


def pixel_accuracy(counts: np.ndarray) -> np.ndarray:
    """Return the fraction of the pixels that are predicted correctly, shape (...); NaN if none is counted."""
    correct, _ = _correct_and_total(counts)
    pixels = np.asarray(counts, dtype=np.float64).sum((-2, -1))
    return np.divide(correct.sum(-1), pixels, out=np.full(pixels.shape, np.nan), where=pixels > 0)


def mask_metrics(counts: np.ndarray) -> dict[str, object]:
    """Return the metrics of one confusion matrix (C, C): means over the classes that occur, and the IoU of each."""
    ious = intersections_over_unions(counts)
    dice = dice_scores(counts)
    occurs = ~np.isnan(ious)
    if not occurs.any():
        return {"mean_iou": np.nan, "mean_dice": np.nan, "pixel_accuracy": np.nan, "iou/": ious}
    return {
        "mean_iou": ious[occurs].mean(),
        "mean_dice": dice[occurs].mean(),
        "pixel_accuracy": pixel_accuracy(counts),
        "iou/": ious,
    }


def _correct_and_total(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each class, the correct pixels, and the pixels of the target plus those of the prediction."""
    counts = np.asarray(counts, dtype=np.float64)
    return np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1) + counts.sum(-2)
