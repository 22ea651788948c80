"""Values that torch.load reads with `weights_only=True`, which executes no code of a file."""

import copy
import io
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from batteries.core.errors import UserError

# The plain types of numpy's scalars, by the kind of their dtype.
PLAIN_TYPES: dict[str, type] = {"b": bool, "i": int, "u": int, "f": float, "c": complex, "U": str, "S": bytes}
READABLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.Size, torch.Tensor, nn.Parameter)
MAPPINGS: tuple[type, ...] = (dict, OrderedDict, Counter)
SEQUENCES: tuple[type, ...] = (list, tuple, set)


def to_plain(value: Any, place: str = "") -> Any:
    """Return a value of a checkpoint with plain numbers instead of scalars of numpy.

    Args:
        value: A tensor or a plain value, or containers of them.
        place: What errors call it, such as `optimizer_state_dict.param_groups`.

    Raises:
        UserError: If `weights_only=True` would not read it.
    """
    if type(value) in READABLE:
        return value
    if isinstance(value, np.generic | np.ndarray):
        return _plain_scalar(value, place)
    if type(value) in MAPPINGS:
        return _plain_mapping(value, place)
    if type(value) in SEQUENCES:
        return type(value)(to_plain(item, _join(place, number)) for number, item in enumerate(value))
    if _is_readable(value):
        return value
    raise _unreadable(value, place)


def _plain_scalar(value: Any, place: str) -> Any:
    if value.ndim > 0 or value.dtype.kind not in PLAIN_TYPES:
        raise _unreadable(value, place)
    return PLAIN_TYPES[value.dtype.kind](value)


def _plain_mapping(value: Mapping[Any, Any], place: str) -> Any:
    items = {to_plain(name, _join(place, name)): to_plain(item, _join(place, name)) for name, item in value.items()}
    result: Any = copy.copy(value)  # keeps attributes: the state dict of a module has `_metadata`
    result.clear()
    result.update(items)
    return result


def _unreadable(value: Any, place: str) -> UserError:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return UserError(
        f"{place} is a {name}, which a checkpoint cannot hold, because checkpoints are read without executing code "
        "(weights_only=True). Use numbers, strings, tensors, and lists or dicts of them."
    )


def _join(place: str, name: object) -> str:
    return f"{place}.{name}" if place else str(name)


def _is_readable(value: Any) -> bool:
    """Return whether a value of another type can be written and read; torch.serialization can allow more types."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 (of any kind: pickle calls methods of the value)
        return False
    return True
