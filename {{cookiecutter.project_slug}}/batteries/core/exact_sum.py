"""Sums that do not depend on the order of their terms."""

import math
from collections.abc import Iterable

import numpy as np

MAX_PARTS = 8  # then zeros are removed; sums of similar numbers have two or three parts


class ExactSum:
    """The exact sum of float64 arrays of one shape, without rounding until it is read.

    A sum is kept as several arrays, `parts`, whose exact sum it is. Adding a term gives a rounded sum and its error,
    which is a float64 too, and becomes a separate part. Source: Shewchuk 1997, "Adaptive precision floating-point
    arithmetic", Grow-Expansion; math.fsum does the same for numbers.

    Args:
        terms: The first terms.
    """

    def __init__(self, terms: Iterable[np.ndarray | float] = ()) -> None:
        self._parts: list[np.ndarray] = []
        for term in terms:
            self.add(term)

    def add(self, term: np.ndarray | float) -> None:
        """Add an array or a number."""
        total = np.asarray(term, dtype=np.float64)
        parts = []
        for part in self._parts:
            total, error = _add(part, total)
            if error.any():
                parts.append(error)
        self._parts = [*parts, total]
        if len(self._parts) > MAX_PARTS:
            self._parts = _without_zeros(self._parts)

    def value(self) -> np.ndarray:
        """Return the sum, correctly rounded: float64, shape () without terms."""
        if len(self._parts) < 2:
            return np.asarray(self._parts[0] if self._parts else 0.0)
        columns = np.stack(self._parts, axis=-1)
        numbers = [math.fsum(column) for column in columns.reshape(-1, len(self._parts)).tolist()]
        return np.array(numbers).reshape(columns.shape[:-1])

    def parts(self) -> list[np.ndarray]:
        """Return arrays whose exact sum is this sum; they do not depend on the order of the terms either."""
        parts = [self.value()]
        is_finite = np.isfinite(parts[0])
        while True:
            rest = ExactSum([*self._parts, *(-part for part in parts)]).value()
            rest = np.where(is_finite, rest, 0.0)
            if not rest.any():
                return parts
            parts.append(rest)


def _add(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rounded sum and its error, whose sum is exact (Knuth 1969, section 4.2.2); no error of inf or NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        total = first + second
        rounded_second = total - first
        error = (first - (total - rounded_second)) + (second - rounded_second)
    return total, np.where(np.isfinite(total), error, 0.0)


def _without_zeros(parts: list[np.ndarray]) -> list[np.ndarray]:
    """Return fewer parts with the same sum: for each number, those that are not zero are the last ones."""
    stacked = np.stack(parts)
    order = np.argsort(stacked != 0, axis=0, kind="stable")
    moved = np.take_along_axis(stacked, order, axis=0)
    return [part for part in moved if part.any()] or [moved[-1]]
