"""The allowed values of options, annotated with their types: `batch_size: Count = 32`."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

from batteries.core.errors import UserError


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers.

    Attributes:
        minimum: The lower bound.
        maximum: The upper bound.
        excludes_minimum: The lower bound is not in the interval.
        excludes_maximum: The upper bound is not in the interval.
    """

    minimum: float
    maximum: float = math.inf
    excludes_minimum: bool = False
    excludes_maximum: bool = False

    def contains(self, value: float) -> bool:
        """Return whether `value` is finite and in the interval."""
        is_above = value > self.minimum if self.excludes_minimum else value >= self.minimum
        is_below = value < self.maximum if self.excludes_maximum else value <= self.maximum
        return math.isfinite(value) and is_above and is_below

    def __str__(self) -> str:
        if self.maximum == math.inf:
            return f"greater than {self.minimum}" if self.excludes_minimum else f"{self.minimum} or more"
        if self.excludes_maximum:
            return f"{self.minimum} or more and less than {self.maximum}"
        return f"{self.minimum} to {self.maximum}"


Count = Annotated[int, Range(1)]
Positive = Annotated[float, Range(0, excludes_minimum=True)]
NotNegative = Annotated[float, Range(0)]
UnitInterval = Annotated[float, Range(0, 1, excludes_maximum=True)]
Seed = Annotated[int, Range(0, 2**32 - 1)]


def check_ranges(config: Any, prefix: str = "--") -> None:
    """Check that each number of a dataclass is in the range of its type.

    Args:
        config: The dataclass. Dataclasses in its tuples are checked too.
        prefix: What precedes the name of a field in its flag.

    Raises:
        UserError: If a number is out of its range.
    """
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        flag = f"{prefix}{name.replace('_', '-')}"
        value = getattr(config, name)
        if isinstance(value, tuple):
            _check_items(value, flag)
        if isinstance(value, int | float):
            _check_number(value, kind, flag)


def _check_items(items: tuple[Any, ...], flag: str) -> None:
    for number, item in enumerate(items):
        if dataclasses.is_dataclass(item):
            check_ranges(item, f"{flag}.{number}.")


def _check_number(value: float, kind: Any, flag: str) -> None:
    for allowed in _ranges_of(kind):
        if not allowed.contains(value):
            rule = f"{allowed}" if math.isfinite(value) else f"finite and {allowed}"
            raise UserError(f"{flag} {value} must be {rule}.")


def _ranges_of(kind: Any) -> Iterator[Range]:
    """List the ranges in a type such as Count or Count | None."""
    for extra in getattr(kind, "__metadata__", ()):
        if isinstance(extra, Range):
            yield extra
    for part in get_args(kind):
        if not isinstance(part, Range):
            yield from _ranges_of(part)
