"""Which samples are for training, validation and test: a held-out test split, and folds of the rest.

tools/split.py writes the output of `make_folds` to splits/NAME.csv once; from then on the file is used. The split
depends only on the data, not on the seed of a run, so runs with different seeds are comparable.
"""

from math import ceil

import numpy as np

from batteries.core.errors import UserError
from batteries.core.text import count_of
from batteries.data.dataset import Dataset, dataset_info, has_classes
from batteries.data.group_assignment import assign_groups
from batteries.data.stratification import stratify_labels
from experiment.task import stratify_by

NUM_FOLDS = 5
TEST_FRACTION = 0.2  # of all samples, if the data set has no official test split
MAX_FRACTION_ERROR = 0.05  # of the test split with groups, which cannot be divided; half of a smaller test fraction
SPLIT_SEED = 0


def make_folds(dataset: Dataset, num_folds: int = NUM_FOLDS, test_fraction: float = TEST_FRACTION) -> np.ndarray:
    """Return the fold of each sample: 0 to num_folds - 1, and -1 for the held-out test split.

    Folds are stratified by what `stratify_by` in experiment/task.py returns, and no group is in two of them. A data set
    with `folds`, such as a column of its table, is split by those; one with `official_test` has that as its test split.

    Args:
        dataset: The data set.
        num_folds: The number of folds.
        test_fraction: The fraction of all samples in the test split.

    Returns:
        The folds, shape (N,), integers.

    Raises:
        UserError: If there are too few samples, classes or groups, or an argument has no effect.
    """
    info = dataset_info(dataset)
    if info.folds is not None:
        if (num_folds, test_fraction) != (NUM_FOLDS, TEST_FRACTION):
            raise UserError("the data set defines its own folds; remove --num-folds and --test-fraction.")
        return np.asarray(info.folds)
    if num_folds < 2:
        raise UserError(f"--num-folds {num_folds} must be 2 or more: one fold for validation, the others for training.")
    if not 0 <= test_fraction < 1:
        raise UserError(f"--test-fraction {test_fraction} must be 0 or more and less than 1.")
    labels = None if info.targets is None else stratify_by(dataset)
    groups = None if info.groups is None else np.asarray(info.groups)
    everything = np.arange(len(dataset))
    if info.official_test is not None:
        if test_fraction != TEST_FRACTION:
            raise UserError("the data set has an official test split; remove --test-fraction.")
        test_fraction = 0
        rest = everything[~np.asarray(info.official_test)]
    else:
        rest = everything
    check_classes(dataset, labels, rest, num_folds + (test_fraction > 0))
    folds = np.full(len(dataset), -1)
    if groups is not None:
        folds[rest] = fold_groups(groups[rest], None if labels is None else labels[rest], num_folds, test_fraction)
        return folds
    if test_fraction > 0:
        rest = hold_out_test(everything, labels, test_fraction)
        check_classes(dataset, labels, rest, num_folds, is_test_held_out=True)
    for number, indices in enumerate(partition(rest, labels, num_folds)):
        folds[indices] = number
    return folds


def fold_groups(groups: np.ndarray, labels: np.ndarray | None, num_folds: int, test_fraction: float) -> np.ndarray:
    """Return the fold of each sample, shape (n,), -1 for the test split, so that no group is in two of them.

    Args:
        groups: The group of each sample, shape (n,).
        labels: The class or bin of each sample, shape (n,), or its labels, shape (n, C); None without stratification.
        num_folds: The number of folds.
        test_fraction: The fraction of the samples in the test split.
    """
    count = len(np.unique(groups))
    num_subsets = num_folds + (test_fraction > 0)
    if count < num_subsets:
        raise UserError(
            f"{count_of(count, 'group')} cannot be divided into {num_subsets} subsets (folds and test split); add "
            "groups, or use fewer folds."
        )
    fractions = np.full(num_folds, (1 - test_fraction) / num_folds)
    if test_fraction == 0:
        return sort_folds(assign_groups(groups, labels, fractions, seed=SPLIT_SEED))
    max_error = min(MAX_FRACTION_ERROR, test_fraction / 2)
    fractions = np.concatenate([[test_fraction], fractions])
    subsets = assign_groups(groups, labels, fractions, max_first=test_fraction + max_error, seed=SPLIT_SEED)
    size = int((subsets == 0).sum())
    if abs(size / len(groups) - test_fraction) > max_error:
        raise UserError(
            f"--test-fraction {test_fraction} is not possible with {count_of(count, 'group')} and {num_folds} folds; "
            f"the nearest found is {size} of {len(groups)} samples: use --test-fraction {size / len(groups):.3g}, or 0."
        )
    return sort_folds(subsets - 1)


def sort_folds(folds: np.ndarray) -> np.ndarray:
    """Number folds again: one that a large group makes larger than the others is the last, and not the usual --fold 0.

    Args:
        folds: The fold of each sample, shape (n,), -1 for the test split.
    """
    sizes = np.bincount(folds[folds >= 0])
    order = np.argsort(np.abs(sizes - sizes.mean()), kind="stable")
    number_of = np.empty_like(order)
    number_of[order] = np.arange(len(order))
    return np.where(folds >= 0, number_of[folds], -1)


def hold_out_test(indices: np.ndarray, labels: np.ndarray | None, test_fraction: float) -> np.ndarray:
    """Return `indices` without those of the test split.

    Args:
        indices: The samples, shape (n,).
        labels: The class or bin of each sample of the data set, shape (N,), or its labels, shape (N, C), or None.
        test_fraction: The fraction of `indices` in the test split.
    """
    from sklearn.model_selection import train_test_split

    if labels is not None and labels.ndim == 2:
        check_test_fraction(test_fraction, len(indices), 1)
        subsets = stratify_labels(labels[indices], np.array([test_fraction, 1 - test_fraction]), SPLIT_SEED)
        return indices[subsets == 1]
    check_test_fraction(test_fraction, len(indices), 1 if labels is None else len(np.unique(labels[indices])))
    rest, _ = train_test_split(indices, test_size=test_fraction, stratify=labels, random_state=SPLIT_SEED)
    return np.asarray(rest)


def check_test_fraction(test_fraction: float, size: int, minimum: int) -> None:
    """Raise UserError if the test split of `size` samples, or the rest, has fewer than `minimum`."""
    tested = ceil(test_fraction * size)
    if min(tested, size - tested) < minimum:
        low = ceil(100 * minimum / size) / 100
        reason = ", one for each class" if minimum > 1 else ""
        raise UserError(
            f"--test-fraction {test_fraction} of {size} samples is {tested} for the test split and {size - tested} for "
            f"the folds; both need {minimum} or more{reason}: use {low:.2f} to {1 - low:.2f}, or 0."
        )


def partition(indices: np.ndarray, labels: np.ndarray | None, num_subsets: int) -> list[np.ndarray]:
    """Divide `indices` into subsets, stratified by classes or bins (N,), by labels (N, C), or not at all (None)."""
    from sklearn.model_selection import KFold, StratifiedKFold

    if len(indices) < num_subsets:
        raise UserError(
            f"{count_of(len(indices), 'sample')} cannot be divided into {num_subsets} subsets; add samples, or use "
            "fewer folds or another --test-fraction."
        )
    if labels is not None and labels.ndim == 2:
        subsets = stratify_labels(labels[indices], np.full(num_subsets, 1 / num_subsets), SPLIT_SEED)
        return [indices[subsets == number] for number in range(num_subsets)]
    splitter_class = KFold if labels is None else StratifiedKFold
    splitter = splitter_class(num_subsets, shuffle=True, random_state=SPLIT_SEED)
    return [indices[chosen] for _, chosen in splitter.split(indices, None if labels is None else labels[indices])]


def check_classes(
    dataset: Dataset,
    labels: np.ndarray | None,
    indices: np.ndarray,
    num_subsets: int,
    *,
    is_test_held_out: bool = False,
) -> None:
    """Raise UserError if a class has fewer of the samples `indices` than there are subsets, or one has no target."""
    if labels is None:
        return
    if unknown := int((labels[indices] < 0).reshape(len(indices), -1).any(1).sum()):
        raise UserError(
            f"{count_of(unknown, 'sample')} without a target can only be in the test split; set `official_test` of the "
            "data set to True for them, or leave them out."
        )
    if not has_classes(dataset):
        return
    counts = np.bincount(labels[indices], minlength=len(dataset.classes)).tolist()
    for name, count in zip(dataset.classes, counts, strict=True):
        if count >= num_subsets:
            continue
        samples = count_of(count, "sample")
        if is_test_held_out:
            raise UserError(
                f"class {name} has {samples} outside the test split, too few for {num_subsets} folds; add samples, or "
                "use fewer folds or a smaller --test-fraction."
            )
        raise UserError(
            f"class {name} has {samples}, too few for {num_subsets} subsets (folds and test split); add samples until "
            f"it has {num_subsets}, remove the class, or use fewer folds."
        )
