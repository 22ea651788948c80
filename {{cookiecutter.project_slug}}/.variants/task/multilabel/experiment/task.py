"""What this experiment learns: which labels each image has, any number of them.

train.py and the tools call these functions and read these constants; docs/tasks.md describes each of them.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from batteries.core.errors import UserError
from batteries.data.dataset import Dataset, Mixer, dataset_info
from batteries.data.mixing import make_mixer
from batteries.metrics import labels

MAIN_METRIC = "map"  # ranks checkpoints: a metric of `batch_metrics` or SCORES, or loss
MINIMIZE_METRIC = False  # whether a lower value is better
PREDICTIONS = "labels"  # what tools/predict.py writes: the probability of each label

# Scores of the whole validation split, from sklearn.metrics, targets and probabilities (N, labels). A name that ends in
# a slash has one value for each label. `threshold` is where macro_f1 is highest; predictions use it.
SCORES = {
    "map": labels.mean_average_precision,
    "macro_f1": lambda sk, targets, p: labels.best_f1_score(targets, p, "macro"),
    "micro_f1": lambda sk, targets, p: labels.best_f1_score(targets, p, "micro"),
    "threshold": lambda sk, targets, p: labels.best_threshold(targets, p),
    "roc_auc": labels.mean_roc_auc,
    "roc_auc/": labels.roc_aucs,
    "average_precision/": labels.average_precisions,
}
LOGGED_SCORES = ("map", "macro_f1", "micro_f1", "threshold")  # scores that are always computed


class LabelLoss(nn.Module):
    """The mean over samples and labels of the binary cross-entropy.

    Args:
        label_smoothing: Targets are moved by this fraction towards 0.5.
        class_weights: Weights of absent and of present labels, shape (2, C); all 1 by default.
    """

    def __init__(self, label_smoothing: float = 0.0, class_weights: torch.Tensor | None = None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss, shape (), of logits (N, C) and targets (N, C), 0 to 1."""
        targets = targets.to(logits.dtype)
        smooth = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
        losses = functional.binary_cross_entropy_with_logits(logits, smooth, reduction="none")
        if self.class_weights is not None:
            absent, present = self.class_weights.to(losses.dtype)
            losses = losses * (targets * present + (1 - targets) * absent)
        return losses.mean()


def build_criterion(label_smoothing: float = 0.0, class_weights: torch.Tensor | None = None) -> nn.Module:
    """Build the loss, a mean over samples. Training uses the arguments; validation does not.

    Args:
        label_smoothing: The value of --label-smoothing.
        class_weights: The weights that --class-weights selects, shape (2, C).
    """
    return LabelLoss(label_smoothing, class_weights)


def to_predictions(logits: torch.Tensor) -> torch.Tensor:
    """Return the probability of each label from logits (N, C); SCORES, tools/predict.py and the report use them."""
    return logits.sigmoid()


def batch_metrics(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the metrics of a batch besides the loss, as one value for each sample; their means are logged.

    `label_accuracy` is the fraction of the labels on whose presence a threshold of 0.5 decides correctly.
    """
    return {"label_accuracy": ((logits >= 0) == (targets >= 0.5)).double().mean(1)}


def summarize(means: dict[str, float]) -> dict[str, float]:
    """Return the metrics of an epoch from the means of `batch_metrics`: here the means themselves."""
    return means


def batch_transform(num_classes: int, mixup: float = 0.0, cutmix: float = 0.0) -> Mixer | None:
    """Return the mixing of a batch (images, targets) to soft targets (N, C); None if both alphas are 0."""
    return make_mixer(mixup, cutmix)


def stratify_by(dataset: Dataset) -> np.ndarray:
    """Return what splits are stratified by: the labels of each sample, shape (N, C)."""
    targets = np.asarray(dataset_info(dataset).targets)
    if targets.shape != (len(dataset), len(dataset.classes)):
        raise UserError(
            f"targets have the shape {targets.shape}; with {len(dataset)} samples and {len(dataset.classes)} labels it "
            f"must be {(len(dataset), len(dataset.classes))}, with 0 or 1 for each label."
        )
    return targets
