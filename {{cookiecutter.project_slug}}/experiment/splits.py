"""Which samples are for training, validation and test: a held-out test split, and folds of the rest.

tools/split.py writes the output of `make_folds` to splits/NAME.csv once; from then on the file is used. The split
depends only on the data, not on the seed of a run, so runs with different seeds are comparable.
"""

from fractions import Fraction
from math import ceil

import numpy as np

from batteries.core.errors import UserError
from batteries.core.text import count_of
from batteries.data.dataset import Dataset, dataset_info, has_classes

NUM_FOLDS = 5
TEST_FRACTION = 0.2  # of all samples, if the data set has no official test split
MAX_FRACTION_DENOMINATOR = 20  # with groups, the test fraction is rounded to a fraction with at most this denominator
SPLIT_SEED = 0


def make_folds(dataset: Dataset, num_folds: int = NUM_FOLDS, test_fraction: float = TEST_FRACTION) -> np.ndarray:
    """Return the fold of each sample: 0 to num_folds - 1, and -1 for the held-out test split.

    Folds are stratified if targets are classes, and no group is in two of them. A data set with `folds`, such as a
    column of its table, is split by those; one with `official_test` has that as its test split.

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
    labels = np.asarray(info.targets) if has_classes(dataset) else None
    groups = None if info.groups is None else np.asarray(info.groups)
    everything = np.arange(len(dataset))
    if info.official_test is not None:
        if test_fraction != TEST_FRACTION:
            raise UserError("the data set has an official test split; remove --test-fraction.")
        rest = everything[~np.asarray(info.official_test)]
        check_classes(dataset, labels, rest, num_folds)
    else:
        check_classes(dataset, labels, everything, num_folds + (test_fraction > 0))
        rest = hold_out_test(everything, labels, groups, test_fraction)
        check_classes(dataset, labels, rest, num_folds, is_test_held_out=True)
    folds = np.full(len(dataset), -1)
    for number, indices in enumerate(partition(rest, labels, groups, num_folds)):
        folds[indices] = number
    return folds


def hold_out_test(
    indices: np.ndarray, labels: np.ndarray | None, groups: np.ndarray | None, test_fraction: float
) -> np.ndarray:
    """Return `indices` without those of the test split.

    Args:
        indices: The samples, shape (n,).
        labels: The class of each sample of the data set, shape (N,), if targets are classes.
        groups: The group of each sample of the data set, shape (N,), if there are groups.
        test_fraction: The fraction of `indices` in the test split.
    """
    from sklearn.model_selection import train_test_split

    if test_fraction == 0:
        return indices
    if groups is not None:
        return hold_out_groups(indices, labels, groups, test_fraction)
    check_test_fraction(test_fraction, len(indices), 1 if labels is None else len(np.unique(labels[indices])))
    rest, _ = train_test_split(indices, test_size=test_fraction, stratify=labels, random_state=SPLIT_SEED)
    return np.asarray(rest)


def hold_out_groups(
    indices: np.ndarray, labels: np.ndarray | None, groups: np.ndarray, test_fraction: float
) -> np.ndarray:
    """Return `indices` without those of a test split of whole groups: a / b of them, near `test_fraction`.

    They are partitioned into b subsets, and a of them are the test split.
    """
    num_groups = len(set(groups[indices]))
    limit = min(MAX_FRACTION_DENOMINATOR, num_groups)
    if labels is not None:
        limit = min(limit, int(np.bincount(labels[indices]).max()))
    fraction = Fraction(test_fraction).limit_denominator(limit) or Fraction(1, round(1 / test_fraction))
    if fraction == 1:
        raise UserError(
            f"--test-fraction {test_fraction} leaves none of {count_of(num_groups, 'group')} for the folds; use a "
            "smaller one."
        )
    subsets = partition(indices, labels, groups, max(2, fraction.denominator))
    num_test = min(fraction.numerator, len(subsets) - 1)
    return np.sort(np.concatenate(subsets[num_test:]))


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


def partition(
    indices: np.ndarray, labels: np.ndarray | None, groups: np.ndarray | None, num_subsets: int
) -> list[np.ndarray]:
    """Divide `indices` into subsets, with the splitter of scikit-learn for these labels and groups."""
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

    kind = "sample" if groups is None else "group"
    count = len(indices) if groups is None else len(np.unique(groups[indices]))
    if count < num_subsets:
        raise UserError(
            f"{count_of(count, kind)} cannot be divided into {num_subsets} subsets; add {kind}s, or use fewer folds or "
            "another --test-fraction."
        )
    if labels is not None:
        largest = int(np.bincount(labels[indices]).max())
        if largest < num_subsets:
            raise UserError(
                f"no class has more than {count_of(largest, 'sample')}, too few for {num_subsets} subsets; use another "
                "--test-fraction."
            )
    if groups is None:
        splitter_class = KFold if labels is None else StratifiedKFold
    else:
        splitter_class = GroupKFold if labels is None else StratifiedGroupKFold
    splitter = splitter_class(num_subsets, shuffle=True, random_state=SPLIT_SEED)
    subset_labels = None if labels is None else labels[indices]
    subset_groups = None if groups is None else groups[indices]
    return [indices[chosen] for _, chosen in splitter.split(indices, subset_labels, subset_groups)]


def check_classes(
    dataset: Dataset,
    labels: np.ndarray | None,
    indices: np.ndarray,
    num_subsets: int,
    *,
    is_test_held_out: bool = False,
) -> None:
    """Raise UserError if a class has fewer samples among `indices` than there are subsets."""
    if labels is None:
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
