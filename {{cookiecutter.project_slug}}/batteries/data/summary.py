"""What was understood of a data set: classes, labels or numbers, unknown targets, groups, and what is unusual."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from unicodedata import category, normalize

import numpy as np

from batteries.core.ranks import is_rank_zero
from batteries.core.text import count_of, list_first
from batteries.data.dataset import Dataset, dataset_info, has_classes, has_labels, has_numbers
from batteries.data.splits import TEST, SplitFile
from batteries.data.targets import known_targets, target_names, unknown_samples

logger = logging.getLogger("batteries")

MAX_LISTED = 10  # classes that a line lists
MAX_WARNINGS = 5  # of each kind
MAX_SIZE_RATIO = 1.5  # of the largest fold and the mean of the folds, from which on there is a warning
MISSING = {"", "nan", "na", "n/a", "<na>", "nat", "null", "nil", "none", "missing", "undefined", "unknown", "-", "?"}
WORD_SEPARATORS = r"[\s,;|/+&]+"  # between several labels in one cell


def log_new_split(split_file: SplitFile) -> None:
    """Log the summary and the warnings of a split that was just made. Only rank 0 logs."""
    if split_file.is_new and is_rank_zero():
        for line in summary_lines(split_file.dataset):
            logger.info(line)
        for warning in find_unusual(split_file.dataset, split_file.folds):
            logger.warning(warning)


def summary_lines(dataset: Dataset) -> list[str]:
    """Return a line each for the classes, labels or numbers, the samples with an unknown target, and the groups."""
    lines = []
    targets = known_targets(dataset)
    if targets is not None:
        is_unknown = unknown_samples(targets)
        known = targets[~is_unknown].reshape(int((~is_unknown).sum()), -1)
        lines += _describe_numbers(dataset, known) if has_numbers(dataset) else _describe_classes(dataset, known)
        if unknown := int(is_unknown.sum()):
            what = "target" if has_numbers(dataset) else "label"
            lines.append(
                f"unknown  {count_of(unknown, 'sample')} without a {what}, which can only be in the test split"
            )
    groups = dataset_info(dataset).groups
    if groups is not None:
        [(largest, size)] = Counter(map(str, groups)).most_common(1)
        number = len(set(map(str, groups)))
        lines.append(f"groups   {count_of(number, 'group')}; the largest, {largest}, has {count_of(size, 'sample')}")
    return lines


def _describe_classes(dataset: Dataset, known: np.ndarray) -> list[str]:
    """Return one line with the samples of each class or label.

    Args:
        dataset: The data set.
        known: The class indices that are known, shape (N, 1), or labels, shape (N, C).
    """
    if has_classes(dataset):
        counts = np.bincount(known[:, 0].astype(int), minlength=len(dataset.classes)).tolist()
        return [f"classes  {len(counts):,}, with samples: {_list_counts(dataset.classes, counts)}"]
    counts = known.sum(0).astype(int).tolist()
    line = f"labels   {len(counts):,}, with samples: {_list_counts(target_names(dataset, len(counts)), counts)}"
    if empty := int((known.sum(1) == 0).sum()):
        line += f"; {count_of(empty, 'sample')} with none of them"
    return [line]


def _list_counts(names: Sequence[str], counts: Sequence[int]) -> str:
    return list_first((f"{name}: {count:,}" for name, count in zip(names, counts, strict=True)), MAX_LISTED)


def _describe_numbers(dataset: Dataset, known: np.ndarray) -> list[str]:
    """Return one line with the range and mean of each number, from those that are known, shape (N, C)."""
    if not len(known):
        return []
    listed = [
        f"{name}: {values.min():.4g} to {values.max():.4g}, mean {values.mean():.4g}"
        for name, values in zip(target_names(dataset, known.shape[1]), known.T, strict=True)
    ]
    return [f"numbers  {len(listed):,}: {list_first(listed, MAX_LISTED)}"]


def find_unusual(dataset: Dataset, folds: np.ndarray) -> list[str]:
    """Return one warning for each unusual property of the labels or numbers, and of the folds.

    Args:
        dataset: The data set.
        folds: The fold of each sample, shape (N,).
    """
    warnings = []
    if has_classes(dataset) or (has_labels(dataset) and dataset_info(dataset).classes is not None):
        counts = _count_labels(dataset)
        found = [_missing_values(counts), _similar_labels(counts, _class_of_labels(dataset))]
        found.append(_several_labels(counts, is_class=has_classes(dataset)))
        for some in found:
            warnings += some[:MAX_WARNINGS]
    elif has_numbers(dataset):
        warnings += _constant_numbers(dataset)[:MAX_WARNINGS]
    return warnings + _uneven_folds(dataset, folds)


def _constant_numbers(dataset: Dataset) -> list[str]:
    """Warn of numbers that are the same in all samples."""
    targets = known_targets(dataset)
    assert targets is not None
    columns = targets.reshape(len(targets), -1)
    warnings = []
    for name, values in zip(target_names(dataset, columns.shape[1]), columns.T, strict=True):
        distinct = np.unique(values[~np.isnan(values)])
        if len(distinct) == 1:
            warnings.append(
                f"{name} is {distinct[0]:.6g} in all samples, so there is nothing to learn; check its column."
            )
    return warnings


def _count_labels(dataset: Dataset) -> Counter[str]:
    """Count the samples of each label as it is in the data, such as 2.0 of the class 2."""
    info = dataset_info(dataset)
    if has_labels(dataset):
        counts = (np.asarray(info.targets) == 1).sum(0).tolist()
        return Counter(dict(zip(map(str, dataset.classes), counts, strict=True)))
    if info.raw_labels is not None:
        return Counter(str(label) for label in info.raw_labels if label != "")
    return Counter(str(dataset.classes[target]) for target in np.asarray(info.targets).tolist() if target >= 0)


def _class_of_labels(dataset: Dataset) -> dict[str, str]:
    """Return the class of each label as it is in the data."""
    info = dataset_info(dataset)
    if info.raw_labels is None or has_labels(dataset):
        return {str(name): str(name) for name in dataset.classes}
    pairs = zip(info.raw_labels, np.asarray(info.targets).tolist(), strict=True)
    return {str(label): str(dataset.classes[target]) for label, target in pairs if target >= 0}


def _missing_values(counts: Mapping[str, int]) -> list[str]:
    return [
        f"label {label!r} ({count_of(count, 'sample')}) looks like a missing value, but is a class; leave it empty, or "
        "the samples out, if it is none."
        for label, count in counts.items()
        if label.strip().casefold() in MISSING
    ]


def _similar_labels(counts: Mapping[str, int], class_of: Mapping[str, str]) -> list[str]:
    """Warn of labels that differ only in upper and lower case, spaces, or how a number is written."""
    similar: dict[object, list[str]] = {}
    for label in counts:
        similar.setdefault(_normal_form(label), []).append(label)
    warnings = []
    for labels in similar.values():
        if len(labels) == 1:
            continue
        listed = " and ".join(f"{label!r} ({count_of(counts[label], 'sample')})" for label in labels)
        classes = {class_of[label] for label in labels}
        if len(classes) == 1:
            warnings.append(f"labels {listed} are read as one class, {classes.pop()}.")
        else:
            warnings.append(f"labels {listed} are different classes; write them in one way if they are one class.")
    return warnings


def _normal_form(label: str) -> object:
    """Return a value that is equal for labels that a reader may take for the same."""
    visible = "".join(character for character in normalize("NFKC", label) if category(character) != "Cf")
    try:
        number = float(visible)
    except ValueError:
        number = np.nan
    return number if np.isfinite(number) else re.sub(r"[\s_-]+", " ", visible).strip().casefold()


def _several_labels(counts: Mapping[str, int], *, is_class: bool) -> list[str]:
    """Warn of labels whose words all are, or are in, other labels: `red green` with `red` and `green blue`.

    Args:
        counts: The samples of each label.
        is_class: Whether a sample has one class, not several labels.
    """
    words_of = {label: _words(label) for label in counts}
    labels_with = Counter(word for words in set(words_of.values()) for word in set(words))
    kind = "class" if is_class else "label"
    advice = "docs/data.md explains several labels per sample" if is_class else "check what separates the labels"
    return [
        f"label {label!r} ({count_of(counts[label], 'sample')}) is one {kind}, but looks like several labels, "
        f"{' and '.join(words)}; {advice}."
        for label, words in words_of.items()
        if len(words) > 1 and all(labels_with[word] > 1 for word in words)
    ]


def _words(label: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(WORD_SEPARATORS, label.casefold()) if word)


def _uneven_folds(dataset: Dataset, folds: np.ndarray) -> list[str]:
    """Warn if a fold is much larger than the others because of the groups."""
    groups = dataset_info(dataset).groups
    if groups is None or dataset_info(dataset).folds is not None:
        return []
    sizes = np.bincount(folds[folds != TEST])
    fold = int(sizes.argmax())
    if sizes[fold] <= MAX_SIZE_RATIO * sizes.mean():
        return []
    [(group, size)] = Counter(_select(groups, folds == fold)).most_common(1)
    return [
        f"fold {fold} has {count_of(int(sizes[fold]), 'sample')} and the others {_range_of(np.delete(sizes, fold))}, "
        f"because group {group} has {size:,}; divide this group, or use fewer folds."
    ]


def _select(groups: Sequence[object], chosen: np.ndarray) -> Iterable[str]:
    return (str(group) for group, is_chosen in zip(groups, chosen.tolist(), strict=True) if is_chosen)


def _range_of(sizes: np.ndarray) -> str:
    return f"{sizes.min():,}" if sizes.min() == sizes.max() else f"{sizes.min():,} to {sizes.max():,}"
