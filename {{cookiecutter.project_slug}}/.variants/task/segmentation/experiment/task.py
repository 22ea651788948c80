"""What this experiment learns: the class of each pixel of an image.

train.py and the tools call these functions and read these constants; docs/tasks.md describes each of them.
"""

from typing import Any

import torch
from torch import nn

from batteries.core.errors import UserError
from batteries.data.dataset import Dataset, Mixer
from batteries.data.mixing import MaskCutMix
from batteries.metrics.masks import IGNORED, PixelCounts, count_pixels

MAIN_METRIC = "mean_iou"  # ranks checkpoints: a metric of `summarize`, or loss
MINIMIZE_METRIC = False  # whether a lower value is better
PREDICTIONS = "mask"  # what tools/predict.py writes: a PNG file with the class of each pixel

# Scores of the whole validation split would need all pixels at once; metrics come from counts, in `summarize`.
SCORES: dict[str, Any] = {}
LOGGED_SCORES = ()


class PixelLoss(nn.Module):
    """The mean over samples of the mean cross-entropy over the pixels of each.

    nn.CrossEntropyLoss(ignore_index=…) divides by the number of counted pixels in the batch instead, so that its
    gradient depends on the division of a step into micro-batches and ranks.

    Args:
        label_smoothing: The fraction of the target spread over all classes.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.cross_entropy = nn.CrossEntropyLoss(
            label_smoothing=label_smoothing, ignore_index=IGNORED, reduction="none"
        )

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss, shape (), of logits (N, C, H, W) and masks (N, H, W); IGNORED pixels do not count."""
        losses = self.cross_entropy(logits, targets.long()).flatten(1).sum(1)
        counted = (targets != IGNORED).flatten(1).sum(1).clamp(min=1)
        return (losses / counted).mean()


def build_criterion(label_smoothing: float = 0.0, class_weights: torch.Tensor | None = None) -> nn.Module:
    """Build the loss, a mean over samples. Class weights need targets in memory, so they are rejected before."""
    assert class_weights is None
    return PixelLoss(label_smoothing)


def to_predictions(logits: torch.Tensor) -> torch.Tensor:
    """Return the probabilities of the classes of each pixel, from logits (N, C, H, W)."""
    return logits.softmax(1)


def batch_metrics(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the confusion matrix of the pixels of each image, shape (N, C, C); `summarize` gets their mean."""
    return {"confusion": count_pixels(logits.argmax(1), targets, logits.shape[1])}


def summarize(means: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of an epoch. Ratios of sums are those of means, so the mean confusion matrix is sufficient."""
    return {"loss": means["loss"], **PixelCounts.of(means["confusion"]).metrics()}


def batch_transform(num_classes: int, mixup: float = 0.0, cutmix: float = 0.0) -> Mixer | None:
    """Return CutMix of a batch (images, masks); None if its alpha is 0. A pixel of a mask has one class: no mixup."""
    if mixup:
        raise UserError(f"--mixup {mixup} makes soft targets, but a pixel of a mask has one class; use --cutmix.")
    return MaskCutMix(cutmix) if cutmix else None


def stratify_by(dataset: Dataset) -> None:
    """Return what splits are stratified by: nothing, because masks would have to be read."""
    return
