"""Targets of a data set in one form, and their description as text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from batteries.data.dataset import UNKNOWN, dataset_info, has_classes, has_labels, has_numbers


def known_targets(dataset: object) -> np.ndarray | None:
    """Return class indices, shape (N,), labels, shape (N, C), or numbers, shape (N,) or (N, C), as float64.

    Values that are not known are NaN. None if the data set has none of these targets, such as one of masks.
    """
    if has_classes(dataset) or has_labels(dataset):
        values = np.asarray(dataset_info(dataset).targets).astype(np.float64)
        return np.where(values == UNKNOWN, np.nan, values)
    return np.asarray(dataset_info(dataset).targets).astype(np.float64) if has_numbers(dataset) else None


def unknown_samples(targets: np.ndarray) -> np.ndarray:
    """Return which samples have a target that is not known, shape (N,), from the output of `known_targets`."""
    return np.asarray(np.isnan(targets.reshape(len(targets), -1)).any(1))


def target_names(dataset: object, count: int) -> list[str]:
    """Return the names of `count` labels or numbers: those of the classes, or `target 0`, … if there are none."""
    names = dataset_info(dataset).classes
    return [f"target {index}" for index in range(count)] if names is None else [str(name) for name in names]


def describe_target(target: Any, dataset: Any) -> str:
    """Describe the target of one sample in the terms of its data set.

    Args:
        target: What the data set or a loader returns: a class, soft or hard labels, shape (C,), numbers, shape () or
            (C,), or a mask.
        dataset: The data set.

    Returns:
        Such as `cat`; for labels, `cat, dog`, with weights if they are mixed; for numbers, `width 3.5, height 2`; for
        the weights of a soft class, `0.75 cat + 0.25 dog`; for a mask, its size.
    """
    values = torch.as_tensor(target)
    if has_numbers(dataset) and values.ndim < 2:
        numbers = (values.double().reshape(-1) + 0.0).tolist()  # 0 instead of -0
        names = target_names(dataset, len(numbers))
        return ", ".join(f"{name} {number:.6g}" for name, number in zip(names, numbers, strict=True))
    if values.ndim == 0:
        is_class = has_classes(dataset) or not values.is_floating_point()
        return str(dataset.classes[int(values)]) if is_class else f"{values:.4g}"
    if values.ndim > 1:
        return " x ".join(map(str, values.shape))
    names = target_names(dataset, len(values))
    return _describe_labels(values, names) if has_labels(dataset) else _describe_weights(values, names, " + ")


def _describe_labels(values: torch.Tensor, names: Sequence[str]) -> str:
    if not (values > 0).any():
        return "no label"
    if ((values > 0) & (values < 1)).any():
        return _describe_weights(values, names, ", ")
    return ", ".join(name for name, value in zip(names, values.tolist(), strict=True) if value > 0)


def _describe_weights(values: torch.Tensor, names: Sequence[str], separator: str) -> str:
    """List the names with their weights, the largest first; those of 0 are left out."""
    weights = [(float(weight), name) for weight, name in zip(values.tolist(), names, strict=True)]
    return separator.join(f"{weight:.2f} {name}" for weight, name in sorted(weights, reverse=True) if weight > 0)
