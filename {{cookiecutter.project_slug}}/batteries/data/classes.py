"""Names and order of classes."""

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal

from batteries.core.text import list_first

MAX_LISTED = 20  # classes that a message lists


def class_name(label: str) -> str:
    """Return the class of a label. `2.0` is `2`, because pandas writes integers as floats if some are missing."""
    return re.sub(r"^([+-]?\d+)\.0+$", r"\1", label)


def sort_classes(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct classes of labels: numbers in numeric order, then other names in alphabetical order.

    The position of a class is its index in targets, in the output of the model and in predictions.
    """
    return tuple(sorted({class_name(label) for label in labels}, key=_sort_key))


def describe_indices(classes: Sequence[str]) -> str:
    """List the index of each class, and warn if classes are numbers that differ from their indices."""
    listed = list_first((f"{index} = {name}" for index, name in enumerate(classes)), MAX_LISTED)
    differs = any(name != str(index) for index, name in enumerate(classes))
    if differs and all(_is_number(name) for name in classes):
        return f"{listed}; the indices differ from these numbers, which --values label writes"
    return listed


def _sort_key(name: str) -> tuple[bool, Decimal, str]:
    is_number = _is_number(name)
    return not is_number, Decimal(name) if is_number else Decimal(0), name


def _is_number(name: str) -> bool:
    return re.fullmatch(r"[+-]?\d+(\.\d+)?", name) is not None
