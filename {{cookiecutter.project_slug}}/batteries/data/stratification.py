"""Stratification of splits by several labels per sample, or by numbers."""

import numpy as np

from batteries.data.dataset import UNKNOWN

QUANTILES = 10  # bins of numbers
SMALLEST_BIN = 20  # values


def quantile_bins(values: np.ndarray) -> np.ndarray:
    """Return a bin for each value, so that subsets stratified by it have about the same distribution.

    Bins are deciles; equal values are in one bin, and a bin with few values is joined with the next one.

    Args:
        values: Numbers, shape (N,); NaN if not known.

    Returns:
        The bins, shape (N,), from 0; UNKNOWN for NaN.
    """
    known = np.isfinite(values)
    ordered = np.sort(values[known])
    edges: list[float] = []
    begin = 0
    for edge in np.unique(np.quantile(ordered, np.arange(1, QUANTILES) / QUANTILES)) if len(ordered) else ():
        position = int(np.searchsorted(ordered, edge))  # the number of values below the edge
        if min(position - begin, len(ordered) - position) >= SMALLEST_BIN:
            edges.append(edge)
            begin = position
    return np.where(known, np.searchsorted(edges, values, side="right"), UNKNOWN)


def stratify_labels(labels: np.ndarray, fractions: np.ndarray, seed: int = 0) -> np.ndarray:
    """Divide samples with several labels into subsets, by iterative stratification (Sechidis et al. 2011).

    The label with the fewest samples left is distributed first: each of its samples goes to the subset that lacks most
    of this label, or else most samples. Libraries that have the algorithm were last released in 2018 and 2024, and do
    not divide into a test split and folds at once.

    Args:
        labels: The labels, 0 and 1, shape (N, C).
        fractions: The fraction of the samples for each subset, shape (S,); they sum to 1.
        seed: Orders the samples, and decides between equal subsets.

    Returns:
        The number of the subset of each sample, shape (N,).
    """
    generator = np.random.default_rng(seed)
    subsets = np.full(len(labels), -1)
    labels = np.hstack([labels, labels.sum(1, keepdims=True) == 0]).astype(np.int64)  # without a label: a separate one
    missing = np.outer(labels.sum(0), fractions)  # samples of each label that a subset still lacks, (C + 1, S)
    free = len(labels) * fractions  # samples that a subset still lacks, (S,)
    left = labels.sum(0)
    while left.any():
        rarest = int(np.where(left > 0, left, len(labels) + 1).argmin())
        for sample in generator.permutation(np.flatnonzero((subsets < 0) & (labels[:, rarest] > 0))):
            order = np.lexsort((generator.random(len(fractions)), -free, -np.round(missing[rarest], 9)))
            chosen = order[0]
            subsets[sample] = chosen
            missing[labels[sample] > 0, chosen] -= 1
            free[chosen] -= 1
            left -= labels[sample]
    return subsets
