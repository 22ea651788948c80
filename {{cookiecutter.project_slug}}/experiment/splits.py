"""Which samples train, validate and test: a held-out test split, and folds of the rest.

`split.py` writes what `make_folds` gives into splits/NAME.csv, once; from then on the file is what counts. It depends
on the data alone, not on a run's seed: runs with other seeds stay comparable.
"""

from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np

from batteries.core.errors import UserError

NUM_FOLDS = 5
TEST_FRACTION = 0.2  # of all samples, where the data set has no official test split
MAX_FRACTION_DENOMINATOR = (
    20  # where there are groups: the largest denominator of the fraction that stands for the share
)
SPLIT_SEED = 0


def make_folds(dataset: Any, num_folds: int = NUM_FOLDS, test_fraction: float = TEST_FRACTION) -> np.ndarray:
    """The fold of each sample, shape (N,): 0 to num_folds - 1, and -1 for the held-out test split.

    Folds are stratified where targets are classes, and no group is in two of them. A data set that has `folds` of its
    own, such as a column of its table, is split by those; one with `official_test` is tested on that.
    Raises ValueError where samples, classes or groups are too few, and for a number that would change nothing.
    """
    if getattr(dataset, "folds", None) is not None:
        if (num_folds, test_fraction) != (NUM_FOLDS, TEST_FRACTION):
            raise UserError("the data bring folds of their own: leave --num-folds and --test-share out.")
        return np.asarray(dataset.folds)
    if num_folds < 2:
        raise UserError(f"--num-folds {num_folds} must be 2 or more: one part validates, the others train.")
    if not 0 <= test_fraction < 1:
        raise UserError(f"--test-share {test_fraction} must be 0 or more and less than 1.")
    labels, groups = stratify_by(dataset), getattr(dataset, "groups", None)
    groups = None if groups is None else np.asarray(groups)
    everything, official = np.arange(len(dataset)), getattr(dataset, "official_test", None)
    if official is not None:
        if test_fraction != TEST_FRACTION:
            raise UserError("the data bring a test split of their own: leave --test-share out.")
        rest = everything[~np.asarray(official)]
        check_classes(dataset, labels, rest, num_folds)
    else:
        check_classes(dataset, labels, everything, num_folds + (test_fraction > 0))
        rest = leave_test(everything, labels, groups, test_fraction)
        check_classes(dataset, labels, rest, num_folds, beside_test=True)
    folds = np.full(len(dataset), -1)
    for number, part in enumerate(cut(rest, labels, groups, num_folds)):
        folds[part] = number
    return folds


def stratify_by(dataset: Any) -> np.ndarray | None:
    """What folds are stratified by, whole numbers (N,): the classes; None for targets of another kind."""
    targets, classes = getattr(dataset, "targets", None), getattr(dataset, "classes", None)
    if classes is None or targets is None or np.ndim(targets) != 1:
        return None
    is_number = len(classes) == 1 and np.issubdtype(np.asarray(targets).dtype, np.floating)
    return None if is_number else np.asarray(targets)


def leave_test(
    indices: np.ndarray, labels: np.ndarray | None, groups: np.ndarray | None, test_fraction: float
) -> np.ndarray:
    """`indices` without those of the test split, `share` of them."""
    from sklearn.model_selection import train_test_split

    if test_fraction == 0:
        return indices
    if groups is not None:
        most = min(
            MAX_FRACTION_DENOMINATOR,
            len(set(groups[indices])),
            MAX_FRACTION_DENOMINATOR if labels is None else np.bincount(labels[indices]).max(),
        )
        part = Fraction(test_fraction).limit_denominator(int(most)) or Fraction(1, round(1 / test_fraction))
        if part == 1:
            raise UserError(
                f"--test-share {test_fraction} leaves none of {len(set(groups[indices]))} groups; use a smaller one."
            )
        parts = cut(indices, labels, groups, max(2, part.denominator))
        return np.sort(np.concatenate(parts[min(part.numerator, len(parts) - 1) :]))
    check_test_fraction(test_fraction, len(indices), 1 if labels is None else len(np.unique(labels[indices])))
    rest, _ = train_test_split(indices, test_size=test_fraction, stratify=labels, random_state=SPLIT_SEED)
    return np.asarray(rest)


def check_test_fraction(test_fraction: float, size: int, least: int) -> None:
    """Raise ValueError where `share` of `size` samples, or what is left beside it, is less than `least`."""
    tested = ceil(test_fraction * size)
    if min(tested, size - tested) < least:
        low = ceil(100 * least / size) / 100
        raise UserError(
            f"--test-share {test_fraction} of {size} samples is {tested} to test and {size - tested} for the folds; "
            f"both need {least} or more{', one for each class' * (least > 1)}: use {low:.2f} to {1 - low:.2f}, or 0."
        )


def cut(indices: np.ndarray, labels: np.ndarray | None, groups: np.ndarray | None, num_parts: int) -> list[np.ndarray]:
    """`indices` in parts, by the splitter of scikit-learn that fits."""
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

    pieces = indices if groups is None else np.unique(groups[indices])
    if len(pieces) < num_parts:
        what = "samples" if groups is None else "groups"
        raise UserError(
            f"{len(pieces)} {what} are too few for {num_parts} parts; bring more, or use fewer folds or another "
            f"--test-share."
        )
    if labels is not None and (most := np.bincount(labels[indices]).max()) < num_parts:
        raise UserError(
            f"no class has more than {most} samples, too few for {num_parts} parts; use another --test-share."
        )
    if groups is None:
        kind = KFold if labels is None else StratifiedKFold
    else:
        kind = GroupKFold if labels is None else StratifiedGroupKFold
    splitter = kind(num_parts, shuffle=True, random_state=SPLIT_SEED)
    by_label = None if labels is None else labels[indices]
    by_group = None if groups is None else groups[indices]
    return [indices[part] for _, part in splitter.split(indices, by_label, by_group)]


def check_classes(
    dataset: Any, labels: np.ndarray | None, indices: np.ndarray, num_parts: int, *, beside_test: bool = False
) -> None:
    """Raise ValueError where a class has fewer samples among `indices` than there are parts."""
    if labels is None:
        return
    counts = np.bincount(labels[indices], minlength=len(dataset.classes)).tolist()
    for name, count in zip(dataset.classes, counts, strict=True):
        if count < num_parts:
            if beside_test:
                raise UserError(
                    f"class {name} keeps {count} sample{'s' * (count != 1)} beside the test split, too few for "
                    f"{num_parts} folds; bring more, or use fewer folds or a smaller --test-share."
                )
            raise UserError(
                f"class {name} has {count} sample{'s' * (count != 1)}, too few for {num_parts} parts (folds and test "
                f"split); bring {num_parts} or more, leave the class out, or use fewer folds."
            )
