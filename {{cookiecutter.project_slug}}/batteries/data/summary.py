"""What was understood of a data set: classes, samples without a label, groups, and what is unusual about them."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from unicodedata import category, normalize

import numpy as np

from batteries.core.ranks import is_rank_zero
from batteries.core.text import count_of, list_first
from batteries.data.dataset import Dataset, dataset_info, has_classes
from batteries.data.splits import TEST, SplitFile

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
    """Return one line each for the classes with their samples, the samples without a label, and the groups."""
    info = dataset_info(dataset)
    lines = []
    if has_classes(dataset):
        targets = np.asarray(info.targets)
        counts = np.bincount(targets[targets >= 0], minlength=len(dataset.classes)).tolist()
        listed = (f"{name}: {count:,}" for name, count in zip(dataset.classes, counts, strict=True))
        lines.append(f"classes  {len(counts):,}, with samples: {list_first(listed, MAX_LISTED)}")
        if unknown := int((targets < 0).sum()):
            lines.append(f"unknown  {count_of(unknown, 'sample')} without a label, which can only be in the test split")
    if info.groups is not None:
        [(largest, size)] = Counter(map(str, info.groups)).most_common(1)
        number = len(set(map(str, info.groups)))
        lines.append(f"groups   {count_of(number, 'group')}; the largest, {largest}, has {count_of(size, 'sample')}")
    return lines


def find_unusual(dataset: Dataset, folds: np.ndarray) -> list[str]:
    """Return one warning for each unusual property of the labels and folds.

    Args:
        dataset: The data set.
        folds: The fold of each sample, shape (N,).
    """
    warnings = []
    if has_classes(dataset):
        class_of = _class_of_labels(dataset)
        counts = _count_labels(dataset)
        for found in (_missing_values(counts), _similar_labels(counts, class_of), _several_labels(counts)):
            warnings += found[:MAX_WARNINGS]
    return warnings + _uneven_folds(dataset, folds)


def _count_labels(dataset: Dataset) -> Counter[str]:
    """Count the samples of each label as it is in the data, such as 2.0 of the class 2."""
    info = dataset_info(dataset)
    if info.raw_labels is not None:
        return Counter(str(label) for label in info.raw_labels if label != "")
    return Counter(str(dataset.classes[target]) for target in np.asarray(info.targets).tolist() if target >= 0)


def _class_of_labels(dataset: Dataset) -> dict[str, str]:
    """Return the class of each label as it is in the data."""
    info = dataset_info(dataset)
    if info.raw_labels is None:
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


def _several_labels(counts: Mapping[str, int]) -> list[str]:
    """Warn of labels whose words all are, or are in, other labels: `red green` with `red` and `green blue`."""
    words_of = {label: _words(label) for label in counts}
    labels_with = Counter(word for words in set(words_of.values()) for word in set(words))
    return [
        f"label {label!r} ({count_of(counts[label], 'sample')}) is one class, but looks like several labels, "
        f"{' and '.join(words)}; docs/data.md explains several labels per sample."
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
