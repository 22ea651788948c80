"""Checks of the targets: samples of each class or label, the range of numbers, and pixels of each class of masks."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from batteries.core.text import count_of, list_first
from batteries.data.dataset import Dataset, has_classes, has_labels
from batteries.data.splits import SplitFile
from batteries.data.targets import known_targets, target_names, unknown_samples
from batteries.metrics.masks import IGNORED
from batteries.preflight.results import CheckResult

MAX_LISTED = 3  # labels and targets listed in a result
IMBALANCE_RATIO = 10  # samples of the largest class over those of the rarest, from which on there is a warning
MAX_MASKS = 200  # masks of each split that are read
MAX_CLASSES = 8  # classes of masks listed in a result
RARE_FRACTION = 0.01  # of the train samples, below which a label is rare

# Bounds for standardised targets of the train split. Beyond them training starts with large errors, or with targets so
# close together that the loss is nearly 0.
FAR_MEAN = 0.5
FAR_STD = 1.5


class TargetConstants(NamedTuple):
    """TARGET_MEAN and TARGET_STD of experiment/dataset.py: one value for each target, or one for all."""

    mean: Any
    std: Any


def choose_balanced(dataset: Dataset, indices: np.ndarray, count: int) -> np.ndarray:
    """Return `count` of `indices` with targets that differ as much as possible.

    These are as many classes or labels as possible in about equal numbers, or quantiles of the first number; the first
    samples if there are no such targets.
    """
    targets = known_targets(dataset)
    if targets is None:
        return indices[:count]
    chosen = targets[indices]
    if has_classes(dataset):
        return indices[_choose_classes(chosen, count)]
    if has_labels(dataset):
        return indices[_choose_labels(chosen, count)]
    order = np.argsort(chosen.reshape(len(chosen), -1)[:, 0], kind="stable")
    ranks = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return indices[order[ranks]]


def _choose_classes(targets: np.ndarray, count: int) -> np.ndarray:
    import pandas as pd

    series = pd.Series(targets)
    rank_in_class = series.groupby(series).cumcount()  # 0 for the first sample of its class, 1 for the second
    return np.argsort(rank_in_class.to_numpy(), kind="stable")[:count]


def _choose_labels(labels: np.ndarray, count: int) -> np.ndarray:
    """Return the rows of `count` samples: each has a label that the ones before it have least often.

    Args:
        labels: The labels, 0 and 1, shape (N, C).
        count: The number of samples.
    """
    labels = np.hstack([labels, labels.sum(1, keepdims=True) == 0])  # without a label: a separate one
    is_free = np.ones(len(labels), bool)
    taken = np.zeros(labels.shape[1])
    chosen = []
    for _ in range(min(count, len(labels))):
        left = labels[is_free].any(0)
        rarest = int(np.where(left, taken, np.inf).argmin())
        row = int(np.flatnonzero(is_free & (labels[:, rarest] > 0))[0])
        chosen.append(row)
        is_free[row] = False
        taken += labels[row]
    return np.array(chosen, dtype=np.int64)


def check_class_counts(split_file: SplitFile, fold: int, constants: TargetConstants | None = None) -> CheckResult:
    """Check that each split has samples of each class or label and none is rare, or that numbers vary and are finite.

    Of masks, the first MAX_MASKS of each split are read.

    Args:
        split_file: The split file.
        fold: The fold used for validation.
        constants: What numbers are standardised with, if they are.
    """
    dataset = split_file.dataset
    split_file.select(fold)  # raises UserError if a split lacks a class
    splits = split_file.select_unchecked(fold)._asdict()
    targets = known_targets(dataset)
    if targets is None and _has_masks(dataset, splits["train"]):
        return _check_masks(dataset, splits)
    if targets is None:
        sizes = ", ".join(f"{name} {len(indices):,}" for name, indices in splits.items())
        return CheckResult("pass", f"samples: {sizes}; the targets are not classes, labels or numbers")
    columns = targets.reshape(len(targets), -1)
    is_known = ~unknown_samples(targets)
    known = {name: columns[indices[is_known[indices]]] for name, indices in splits.items()}
    sizes = {name: len(indices) for name, indices in splits.items()}
    if has_classes(dataset):
        return _check_classes(list(dataset.classes), known, sizes)
    names = target_names(dataset, columns.shape[1])
    if has_labels(dataset):
        return _check_labels(names, known, sizes)
    return _check_numbers(names, known, sizes, constants)


def _has_masks(dataset: Dataset, indices: np.ndarray) -> bool:
    if not dataset.classes:
        return False
    target = dataset[int(indices[0])][1]
    return isinstance(target, torch.Tensor) and target.ndim == 2 and not target.is_floating_point()


def _check_masks(dataset: Dataset, splits: Mapping[str, np.ndarray]) -> CheckResult:
    """Check that masks of the train and of the valid split have pixels of each class."""
    classes = list(dataset.classes)
    read = {name: splits[name][:MAX_MASKS] for name in ("train", "valid")}
    pixels = {name: _count_pixels(dataset, indices) for name, indices in read.items()}
    fractions = pixels["train"] / max(pixels["train"].sum(), 1)
    order = np.argsort(-fractions, kind="stable")
    listed = list_first((f"{classes[index]} {fractions[index]:.1%}" for index in order), MAX_CLASSES)
    details = f"{count_of(len(classes), 'class')}, pixels in {count_of(len(read['train']), 'train mask')}: {listed}"
    for name, counts in pixels.items():
        if missing := _list_names(classes, counts == 0):
            details += f"; {count_of(len(read[name]), f'{name} mask')} without a pixel of {missing}"
    if all(counts.all() for counts in pixels.values()):
        return CheckResult("pass", details)
    hint = "add images of that class, or use another split; a class without valid pixels has no score"
    return CheckResult("warning", details, hint)


def _count_pixels(dataset: Dataset, indices: np.ndarray) -> np.ndarray:
    """Count the pixels of each class in the masks of some samples, shape (C,)."""
    counts = np.zeros(len(dataset.classes), dtype=np.int64)
    for index in indices.tolist():
        mask = torch.as_tensor(dataset[index][1])
        counts += torch.bincount(mask[mask != IGNORED].long(), minlength=len(counts)).numpy()
    return counts


def _check_classes(classes: list[str], known: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> CheckResult:
    counts = {name: np.bincount(values[:, 0].astype(int), minlength=len(classes)) for name, values in known.items()}
    details = f"{count_of(len(classes), 'class')}, samples (per class): {_format_counts(counts, sizes)}"
    train = counts["train"]
    if train.max() < IMBALANCE_RATIO * train.min():
        return CheckResult("pass", details)
    rare = classes[int(train.argmin())]
    large = classes[int(train.argmax())]
    details += f"; {train.max() / train.min():.0f} times as many samples of {large} as of {rare}"
    hint = "use --main-metric balanced_accuracy or macro_f1, because accuracy hides rare classes"
    return CheckResult("warning", details, hint)


def _check_labels(names: list[str], known: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> CheckResult:
    counts = {name: labels.sum(0).astype(int) for name, labels in known.items()}
    details = f"{count_of(len(names), 'label')}, samples (per label): {_format_counts(counts, sizes)}"
    train, valid = counts["train"], counts["valid"]
    rare = np.flatnonzero((train < RARE_FRACTION * sizes["train"]) | (valid == 0))
    if not len(rare):
        return CheckResult("pass", details)
    order = rare[np.argsort(train[rare], kind="stable")]
    listed = (f"{names[index]} (train {train[index]:,}, valid {valid[index]:,})" for index in order)
    hint = "add samples, or use --class-weights balanced; a label without valid samples has no score"
    return CheckResult("warning", f"{details}; rare labels: {list_first(listed, MAX_LISTED)}", hint)


def _check_numbers(
    names: list[str],
    known: Mapping[str, np.ndarray],
    sizes: Mapping[str, int],
    constants: TargetConstants | None,
) -> CheckResult:
    hint = "correct the targets in experiment/dataset.py or its files"
    for split, values in known.items():
        if infinite := _list_names(names, np.asarray(np.isinf(values).any(0))):
            return CheckResult("fail", f"not every target of the {split} split is finite: {infinite}", hint)
    details = "; ".join(_describe_numbers(name, sizes[name], names, values) for name, values in known.items())
    if constant := _list_constants(names, known["train"]):
        return CheckResult("fail", f"one value only in the train split: {constant}; {details}", hint)
    if constant := _list_constants(names, known["valid"]):
        hint = "use another fold or split; R2 of a constant target is not defined"
        return CheckResult("warning", f"one value only in the valid split: {constant}; {details}", hint)
    far = "" if constants is None else _list_names(names, _are_far(constants, known["train"]))
    if not far:
        return CheckResult("pass", details)
    hint = "`python tools/split.py --keep --statistics` prints TARGET_MEAN and TARGET_STD for experiment/dataset.py"
    return CheckResult("warning", f"TARGET_MEAN or TARGET_STD is far from the train split: {far}; {details}", hint)


def _are_far(constants: TargetConstants, values: np.ndarray) -> np.ndarray:
    """Return which targets (C,) do not have a mean of about 0 and a deviation of about 1 after standardisation."""
    mean = (values.mean(0) - constants.mean) / constants.std
    ratio = values.std(0) / constants.std
    return np.asarray((np.abs(mean) > FAR_MEAN) | (ratio > FAR_STD) | (ratio < 1 / FAR_STD))


def _list_names(names: list[str], chosen: np.ndarray) -> str:
    return list_first((names[index] for index in np.flatnonzero(chosen)), MAX_LISTED)


def _list_constants(names: list[str], values: np.ndarray) -> str:
    """List the targets with one value only, and the value."""
    constant = np.flatnonzero((values == values[:1]).all(0))
    return list_first((f"{names[index]} = {values[0, index]:.6g}" for index in constant), MAX_LISTED)


def _describe_numbers(split: str, size: int, names: list[str], values: np.ndarray) -> str:
    """Describe the range, mean and deviation of each target of a split.

    Args:
        split: The name of the split.
        size: The number of its samples.
        names: The names of the targets.
        values: The known targets, shape (N, C).
    """
    if not len(values):
        return f"{split} {size:,}" if size == 0 else f"{split} {size:,} (targets unknown)"
    low, high, mean, std = values.min(0), values.max(0), values.mean(0), values.std(0)
    listed = (
        f"{name}: {low[index]:.4g} to {high[index]:.4g}, mean {mean[index]:.4g}, deviation {std[index]:.4g}"
        for index, name in enumerate(names)
    )
    return f"{split} {size:,} ({list_first(listed, MAX_LISTED)})"


def _format_counts(counts: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {sizes[name]:,} ({_format_range(count)})" for name, count in counts.items())


def _format_range(counts: np.ndarray) -> str:
    if not counts.any():
        return "targets unknown"
    low = int(counts.min())
    high = int(counts.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
