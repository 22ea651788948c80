"""What this experiment learns: one number or several for each image.

train.py and the tools call these functions and read these constants; docs/tasks.md describes each of them.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from batteries.core.errors import UserError
from batteries.data.dataset import Dataset, Mixer, dataset_info
from batteries.data.mixing import make_mixer
from batteries.data.stratification import quantile_bins
from experiment.dataset import TARGET_MEAN, TARGET_STD

MAIN_METRIC = "mae"  # ranks checkpoints: a metric of `batch_metrics` or SCORES, or loss
MINIMIZE_METRIC = True  # whether a lower value is better
PREDICTIONS = "numbers"  # what tools/predict.py writes: the value of each target

# Scores of the whole validation split, from sklearn.metrics, targets and predictions (N, targets). A name that ends in
# a slash has one value for each target.
SCORES = {
    "r2": lambda sk, targets, p: sk.r2_score(targets.reshape(p.shape), p),
    "r2/": lambda sk, targets, p: sk.r2_score(targets.reshape(p.shape), p, multioutput="raw_values"),
    "median_absolute_error": lambda sk, targets, p: sk.median_absolute_error(targets.reshape(p.shape), p),
}
LOGGED_SCORES = ("r2",)  # scores that are always computed; --scores selects others


class StandardizedError(nn.Module):
    """The mean over samples and targets of the smooth L1 error (Girshick 2015) of standardised targets."""

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss, shape (), of outputs (N, C), and targets (N,) or (N, C) in their units."""
        mean, std = _constants(outputs.device, outputs.dtype)
        return nn.functional.smooth_l1_loss(outputs, (targets.to(outputs.dtype).view_as(outputs) - mean) / std)


def build_criterion(label_smoothing: float = 0.0, class_weights: torch.Tensor | None = None) -> nn.Module:
    """Build the loss, a mean over samples. Numbers have no classes, so both arguments are rejected."""
    if label_smoothing:
        raise UserError(f"--label-smoothing {label_smoothing} needs classes, but targets are numbers; leave it out.")
    assert class_weights is None
    return StandardizedError()


def to_predictions(outputs: torch.Tensor) -> torch.Tensor:
    """Return the values of the targets in their units, from outputs (N, C); SCORES and the tools use them."""
    mean, std = _constants(outputs.device, outputs.dtype)
    return outputs * std + mean


def batch_metrics(outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the absolute and squared error of each sample and target, shape (N, C); `summarize` gets the means."""
    errors = to_predictions(outputs.double()) - targets.double().view_as(outputs)
    return {"absolute_error": errors.abs(), "squared_error": errors.square()}


def summarize(means: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of an epoch: mae and rmse, means over the targets, and of each target if there are several.

    Args:
        means: The loss, and the means of `batch_metrics` over the samples, shape (C,).
    """
    absolute, squared = means["absolute_error"], means["squared_error"]
    metrics = {"loss": means["loss"], "mae": absolute.mean(), "rmse": np.sqrt(squared).mean()}
    if len(absolute) > 1:
        metrics |= {"mae/": absolute, "rmse/": np.sqrt(squared)}
    return metrics


def batch_transform(num_classes: int, mixup: float = 0.0, cutmix: float = 0.0) -> Mixer | None:
    """Return mixup of a batch (images, targets); None if its alpha is 0. CutMix is not defined for numbers."""
    if cutmix:
        raise UserError(f"--cutmix {cutmix} needs classes, but targets are numbers; use --mixup, or leave it out.")
    return make_mixer(mixup)


def stratify_by(dataset: Dataset) -> np.ndarray:
    """Return what splits are stratified by: the quantile of each sample's first target, shape (N,), or -1."""
    targets = np.asarray(dataset_info(dataset).targets, dtype=np.float64)
    return quantile_bins(targets.reshape(len(dataset), -1)[:, 0])


@cache
def _constants(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return TARGET_MEAN and TARGET_STD, shape (1,) or (C,). They are cached because a copy to a GPU waits for it."""
    mean = torch.tensor(TARGET_MEAN, dtype=dtype, device=device)
    return mean, torch.tensor(TARGET_STD, dtype=dtype, device=device)
