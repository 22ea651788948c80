"""What values a knob may have, written beside its type: `batch_size: Count = 32`."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

from batteries.core.errors import UserError


@dataclass(frozen=True)
class Range:
    """Numbers from `least` (without it, where `open`) to `most` (without it, where `below`), all finite."""

    least: float
    most: float = math.inf
    open: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` is one of them."""
        above = value > self.least if self.open else value >= self.least
        under = value < self.most if self.below else value <= self.most
        return math.isfinite(value) and above and under

    def __str__(self) -> str:
        if self.most == math.inf:
            return f"over {self.least}" if self.open else f"{self.least} or more"
        return f"{self.least} or more, and under {self.most}" if self.below else f"{self.least} to {self.most}"


Count = Annotated[int, Range(1)]
Positive = Annotated[float, Range(0, open=True)]
NotNegative = Annotated[float, Range(0)]
UnitInterval = Annotated[float, Range(0, 1, below=True)]
Seed = Annotated[int, Range(0, 2**32 - 1)]


def check_ranges(config: Any, where: str = "--") -> None:
    """Raise BadInput where a number in `config` (a dataclass, or a tuple of them) is out of its range."""
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        value, flag = getattr(config, name), f"{where}{name.replace('_', '-')}"
        for number, item in enumerate(value if isinstance(value, tuple) else ()):
            if dataclasses.is_dataclass(item):
                check_ranges(item, f"{flag}.{number}.")
        for legal in _ranges(kind):
            if isinstance(value, int | float) and not legal.holds(value):
                raise UserError(f"{flag} {value} must be {legal}.")


def _ranges(kind: Any) -> list[Range]:
    """The ranges in a type, such as Count or Count | None."""
    found = [extra for extra in getattr(kind, "__metadata__", ()) if isinstance(extra, Range)]
    return found + [inner for part in get_args(kind) if not isinstance(part, Range) for inner in _ranges(part)]
