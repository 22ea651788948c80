"""Division of samples into subsets of given sizes that keeps groups together."""

import numpy as np

MAX_MOVES = 10**7  # groups x subsets^2 x classes up to which groups are moved; with more, each one hardly matters
MAX_SWAPS = 10**7  # groups^2 x subsets x classes up to which pairs of groups are swapped
MAX_PASSES = 10  # over all groups
MAX_RESTARTED = 200  # groups up to which random orders are tried too: with few groups, only some combinations fit
RESTARTS = 10
FIRST_WEIGHT = 1000.0  # of the size of the first subset in moves and swaps; the others, and classes, have 1
PENALTY = 1e6  # of each sample by which the first subset is too large; a class that a subset lacks counts as all


def assign_groups(
    groups: np.ndarray,
    labels: np.ndarray | None,
    fractions: np.ndarray,
    *,
    max_first: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Divide samples into subsets without dividing a group.

    Greedy: the largest group first, each to the subset where the squared deviations from the requested counts of
    samples, and of each class, relative to these counts, increase least. Then groups are moved and swapped as long as
    this reduces them, and so that each class is in each subset if it has enough groups. With few groups, other orders
    are tried too. The result does not depend on the order of the samples.

    Args:
        groups: The group of each sample, shape (N,).
        labels: The class of each sample, shape (N,), or its labels, 0 and 1, shape (N, C); None if there are none.
        fractions: The fraction of the samples for each subset, shape (S,); they sum to 1.
        max_first: The fraction that the first subset does not exceed if possible; if given, its size also has priority.
        seed: Orders groups of equal size.

    Returns:
        The number of the subset of each sample, shape (N,).
    """
    _, codes = np.unique(groups.astype(str), return_inverse=True)
    counts = np.bincount(codes)[:, None]
    if labels is not None:
        is_of_class = labels[:, None] == np.unique(labels) if labels.ndim == 1 else labels > 0
        per_class = np.zeros((len(counts), is_of_class.shape[1]), dtype=np.int64)
        np.add.at(per_class, codes, is_of_class.astype(np.int64))
        counts = np.hstack([counts, per_class])
    return _Assignment(counts, fractions, max_first).solve(seed)[codes]


class _Assignment:
    """The subsets of groups, and how far the counts of samples in each are from those requested.

    Args:
        counts: The number of samples of each group, and how many of them are of each class, shape (G, 1 + C).
        fractions: As in `assign_groups`.
        max_first: As in `assign_groups`.
    """

    def __init__(self, counts: np.ndarray, fractions: np.ndarray, max_first: float | None) -> None:
        self.counts = counts.astype(float)
        self.size = self.counts[:, 0].sum()
        self.wanted = np.outer(fractions, self.counts.sum(0))  # (S, 1 + C)
        self.units = np.eye(len(fractions))[:, :, None]  # (S, S, 1)
        self.coverable = (self.counts > 0).sum(0) >= len(fractions)  # (1 + C)
        self.max_first = max_first
        self.max_size = np.inf if max_first is None else max_first * self.size  # of the first subset

    def solve(self, seed: int) -> np.ndarray:
        """Return the subset of each group, shape (G,)."""
        generator = np.random.default_rng(seed)
        by_size = np.lexsort((generator.permutation(len(self.counts)), -self.counts[:, 0]))
        requested = np.inf if self.max_first is None else self.wanted[0, 0]
        if len(by_size) * len(self.wanted) * self.wanted.size > MAX_MOVES:
            self._assign(by_size, requested)
            return self.subsets
        starts = [(by_size, requested)]
        if len(by_size) <= MAX_RESTARTED:
            starts += [(generator.permutation(by_size), self.max_size) for _ in range(RESTARTS)]
            starts += [(by_size, self.max_size)]
        found = []
        for order, limit in starts:
            self._assign(order, limit)
            self._refine(order)
            found.append((float(self._costs(self.totals[None])[0]), self.subsets))
        return min(found, key=lambda pair: pair[0])[1]

    def _assign(self, order: np.ndarray, limit: float) -> None:
        """Assign each group to a subset; the size of the first one does not exceed `limit` if possible."""
        self.weights = 1 / np.maximum(self.wanted, 1)
        self.limit = limit
        self.missing = 0.0  # the cost of a class that a subset lacks
        self.totals = np.zeros_like(self.wanted)
        self.subsets = np.zeros(len(self.counts), dtype=np.int64)
        for group in order:
            best = self._costs(self.totals + self.units * self.counts[group]).argmin()
            self.subsets[group] = best
            self.totals[best] += self.counts[group]

    def _refine(self, order: np.ndarray) -> None:
        """Move single groups, or else swap pairs, until nothing improves."""
        self.missing = PENALTY * self.size
        self.limit = self.max_size
        if self.max_first is not None:
            self.weights[0, 0] *= FIRST_WEIGHT
        swaps = len(order) ** 2 * self.wanted.size <= MAX_SWAPS
        for _ in range(MAX_PASSES):
            improved = sum(self._move(group) for group in order)
            if not improved and swaps:
                improved = sum(self._swap(group) for group in order)
            if not improved:
                return

    def _move(self, group: int) -> bool:
        """Move a group to the best subset. Return whether that is another one."""
        old = self.subsets[group]
        costs = self._costs(self.totals + (self.units - self.units[old]) * self.counts[group])
        best = costs.argmin()
        if costs[best] >= costs[old]:
            return False
        self.totals[old] -= self.counts[group]
        self.totals[best] += self.counts[group]
        self.subsets[group] = best
        return True

    def _swap(self, group: int) -> bool:
        """Swap a group with the best one of another subset. Return whether there is one."""
        old = self.subsets[group]
        change = self.counts - self.counts[group]  # of the subset of the group, (G, 1 + C)
        totals = np.repeat(self.totals[None], len(change), axis=0)
        totals[:, old] += change
        totals[np.arange(len(change)), self.subsets] -= change
        costs = self._costs(totals)
        best = costs.argmin()
        if costs[best] >= costs[group]:
            return False
        self.totals = totals[best]
        self.subsets[group], self.subsets[best] = self.subsets[best], old
        return True

    def _costs(self, totals: np.ndarray) -> np.ndarray:
        """Return the cost of K assignments, rounded so that it does not depend on how a processor adds numbers.

        Args:
            totals: The counts of each subset, shape (K, S, 1 + C).

        Returns:
            The costs, shape (K,).
        """
        costs = ((totals - self.wanted) ** 2 * self.weights).sum((1, 2))
        costs += self.missing * ((totals == 0) & self.coverable).sum((1, 2))
        costs += PENALTY * np.maximum(0, totals[:, 0, 0] - self.limit)
        return np.round(costs / self.size, 9)
