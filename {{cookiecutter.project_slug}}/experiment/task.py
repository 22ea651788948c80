"""What this experiment learns: one class for each image.

train.py and the tools call these functions and read these constants; docs/tasks.md describes each of them.
"""

import numpy as np
import torch
from torch import nn

from batteries.data.dataset import Dataset, Mixer, dataset_info, has_classes
from batteries.data.mixing import make_mixer

MAIN_METRIC = "accuracy"  # ranks checkpoints: a metric of `batch_metrics` or SCORES, or loss
MINIMIZE_METRIC = False  # whether a lower value is better
PREDICTIONS = "class"  # what tools/predict.py writes: one probability for each class, with a sum of one

# Scores of the whole validation split, from sklearn.metrics, targets (N,) and predictions (N, classes).
SCORES = {
    "balanced_accuracy": lambda sk, targets, p: sk.balanced_accuracy_score(targets, p.argmax(1)),
    "macro_f1": lambda sk, targets, p: sk.f1_score(targets, p.argmax(1), average="macro"),
    "log_loss": lambda sk, targets, p: sk.log_loss(targets, p, labels=range(p.shape[1])),
    "roc_auc": lambda sk, targets, p: sk.roc_auc_score(targets, p[:, 1] if p.shape[1] == 2 else p, multi_class="ovr"),
}
LOGGED_SCORES = ()  # scores that are always computed; --scores selects others


class ClassLoss(nn.Module):
    """The mean over samples of the cross-entropy, each multiplied by the weight of its class if there are weights.

    nn.CrossEntropyLoss(weight=…) divides by the sum of the weights in the batch instead, so that its gradient depends
    on the division of a step into micro-batches and ranks.

    Args:
        label_smoothing: The fraction of the target spread over all classes (Szegedy et al. 2016, section 7).
        class_weights: A weight for each class, shape (num_classes,); all 1 by default.
    """

    def __init__(self, label_smoothing: float = 0.0, class_weights: torch.Tensor | None = None) -> None:
        super().__init__()
        self.cross_entropy = nn.CrossEntropyLoss(label_smoothing=label_smoothing, reduction="none")
        self.class_weights = class_weights

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss, shape (), of logits (N, num_classes) and targets (N,) or (N, num_classes)."""
        losses = self.cross_entropy(logits, targets)
        if self.class_weights is not None:
            weights = self.class_weights.to(losses.dtype)
            losses = losses * (weights[targets] if targets.ndim == 1 else targets @ weights)
        return losses.mean()


def build_criterion(label_smoothing: float = 0.0, class_weights: torch.Tensor | None = None) -> nn.Module:
    """Build the loss, a mean over samples. Training uses the arguments; validation does not.

    Args:
        label_smoothing: The value of --label-smoothing.
        class_weights: The weights that --class-weights selects, shape (num_classes,).
    """
    return ClassLoss(label_smoothing, class_weights)


def to_predictions(logits: torch.Tensor) -> torch.Tensor:
    """Return the probabilities of logits (N, num_classes); SCORES, tools/predict.py and the report use them."""
    return logits.softmax(1)


def batch_metrics(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the metrics of a batch besides the loss, as one value for each sample; their means are logged."""
    return {"accuracy": sample_accuracy(logits, targets)}


def summarize(means: dict[str, float]) -> dict[str, float]:
    """Return the metrics of an epoch from the means of `batch_metrics`: here the means themselves."""
    return means


def sample_accuracy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the accuracy of each sample.

    With soft targets, which mixing makes, it is the weight of the predicted class in the target: lambda * accuracy on
    the one class + (1 - lambda) * accuracy on the other. Random predictions have 1 / num_classes, as without mixing.

    Args:
        logits: The output of the model, shape (N, num_classes).
        targets: The classes, shape (N,), or soft targets, shape (N, num_classes).

    Returns:
        The accuracy, shape (N,): bool for classes, float for soft targets.
    """
    predicted = logits.argmax(1)
    if targets.ndim == 1:
        return predicted == targets
    return targets.gather(1, predicted[:, None])[:, 0]


def batch_transform(num_classes: int, mixup: float = 0.0, cutmix: float = 0.0) -> Mixer | None:
    """Return the mixing of a batch (images, targets) to soft targets (N, num_classes); None if both alphas are 0."""
    return make_mixer(mixup, cutmix, num_classes)


def stratify_by(dataset: Dataset) -> np.ndarray | None:
    """Return what splits are stratified by: the class of each sample, shape (N,); None if targets are not classes."""
    return np.asarray(dataset_info(dataset).targets) if has_classes(dataset) else None
