"""Which samples train and validate: stratified folds of CIFAR-10's training file.

The official test images are the held-out test split; they are another file, and no part of these indices.
The split depends on the targets alone, not on a run's seed: runs with other seeds stay comparable.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NUM_FOLDS = 5
SPLIT_SEED = 0


class Split(NamedTuple):
    """Indices into the data set, each part in ascending order."""

    train: np.ndarray
    valid: np.ndarray


def split_dataset(targets: np.ndarray, classes: Sequence[str], fold: int) -> Split:
    """The split in which part `fold` of NUM_FOLDS validates; targets (N,) are indices into `classes`.

    Raises ValueError for a fold that is not there and for a class with fewer samples than folds.
    """
    from sklearn.model_selection import StratifiedKFold

    if not 0 <= fold < NUM_FOLDS:
        raise ValueError(f"--fold {fold} is not there; use 0 to {NUM_FOLDS - 1}.")
    counts = np.bincount(targets, minlength=len(classes))
    for name, count in zip(classes, counts, strict=True):
        if count < NUM_FOLDS:
            raise ValueError(f"class {name} has {count} samples, fewer than {NUM_FOLDS} folds; bring more of it.")
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=SPLIT_SEED).split(targets, targets)
    train, valid = list(folds)[fold]
    return Split(train, valid)
