"""Which samples train, validate and test: a held-out test split, and stratified folds of the rest.

The split depends on the targets alone, not on a run's seed: runs with other seeds stay comparable.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NUM_FOLDS = 5
TEST_SHARE = 0.2
SPLIT_SEED = 0


class Split(NamedTuple):
    """Indices into the data set, each part in ascending order."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def split_dataset(targets: np.ndarray, classes: Sequence[str], fold: int) -> Split:
    """The split in which part `fold` of NUM_FOLDS validates; targets (N,) are indices into `classes`.

    Raises ValueError for a fold that is not there and for a class that has no sample in some part.
    """
    from sklearn.model_selection import StratifiedKFold, train_test_split

    if not 0 <= fold < NUM_FOLDS:
        raise ValueError(f"--fold {fold} is not there; use 0 to {NUM_FOLDS - 1}.")
    _check_classes(targets, classes)
    everything = np.arange(len(targets))
    rest, test = train_test_split(everything, test_size=TEST_SHARE, stratify=targets, random_state=SPLIT_SEED)
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=SPLIT_SEED).split(rest, targets[rest])
    train, valid = list(folds)[fold]
    split = Split(np.sort(rest[train]), np.sort(rest[valid]), np.sort(test))
    for name, part in split._asdict().items():
        if missing := [classes[index] for index in range(len(classes)) if index not in targets[part]]:
            raise ValueError(
                f"the {name} split of fold {fold} has no sample of class {', '.join(missing)}; bring more of it, "
                f"or use fewer folds (NUM_FOLDS in experiment/splits.py)."
            )
    return split


def _check_classes(targets: np.ndarray, classes: Sequence[str]) -> None:
    """Each class needs a sample in each fold and in the test split."""
    counts = np.bincount(targets, minlength=len(classes))
    for name, count in zip(classes, counts, strict=True):
        if count <= NUM_FOLDS:
            raise ValueError(
                f"class {name} has {count} samples, too few for {NUM_FOLDS} folds and a test split; "
                f"bring {NUM_FOLDS + 1} or more, or leave the class out."
            )
