"""The order of the samples of an epoch, shuffled or with balanced classes."""

from typing import Literal, NamedTuple

import numpy as np

from batteries.core.errors import UserError
from batteries.core.seeding import Stream
from batteries.data.dataset import dataset_info, has_classes, has_labels

Sampling = Literal["shuffled", "balanced"]


class Balance(NamedTuple):
    """How often samples are drawn.

    Attributes:
        weights: The relative frequency of each sample, shape (N,).
        strata: A number for each sample, shape (N,), equal for samples with equal targets.
    """

    weights: np.ndarray
    strata: np.ndarray


def epoch_order(size: int, balance: Balance | None, *key: int) -> np.ndarray:
    """Return the order of an epoch, as positions in the train split, shape (size,).

    Without `balance` it is a permutation. With it, it is a systematic sample with replacement (Madow 1949): a sample
    that is expected w times is drawn floor(w) or ceil(w) times, and the frequency of a class differs from the expected
    one by less than 1.

    Args:
        size: The number of samples in the train split.
        balance: How often each of them is drawn.
        key: The random stream: seed, stage and epoch.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((*key, Stream.ORDER))))
    permutation = generator.permutation(size)
    if balance is None:
        return permutation
    ordered = permutation[np.argsort(balance.strata[permutation], kind="stable")]
    ends = np.cumsum(balance.weights[ordered])
    points = (np.arange(size) + generator.random()) * (ends[-1] / size)
    drawn = ordered[np.searchsorted(ends, points, side="right").clip(max=size - 1)]
    return generator.permutation(drawn)


def balance_classes(dataset: object, indices: np.ndarray) -> Balance:
    """Return how often samples are drawn so that all classes are equally frequent.

    A sample of a class with n samples has the weight 1 / n. With several labels per sample, it has the mean of that
    over its labels; samples without a label count as a class.

    Args:
        dataset: The data set.
        indices: The samples of the split, shape (N,).

    Raises:
        UserError: If the targets are not classes or labels.
    """
    if has_classes(dataset):
        targets = np.asarray(dataset_info(dataset).targets)[indices].astype(np.int64)
        weights = 1 / np.bincount(targets)[targets]
    elif has_labels(dataset):
        targets = np.asarray(dataset_info(dataset).targets)[indices].astype(np.int64)
        labels = np.hstack([targets, targets.sum(1, keepdims=True) == 0])
        weights = (labels / np.maximum(labels.sum(0), 1)).sum(1) / labels.sum(1)
    else:
        raise UserError("--sampling balanced needs targets that are classes or labels; use --sampling shuffled.")
    strata = np.unique(targets, axis=0, return_inverse=True)[1]
    return Balance(weights, strata.reshape(-1))
