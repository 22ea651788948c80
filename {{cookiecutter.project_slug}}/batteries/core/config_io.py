"""Conversion between a Config dataclass and JSON."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from batteries.core.errors import UserError
from batteries.core.text import did_you_mean

Config = TypeVar("Config")


def to_json(config: Any) -> dict[str, Any]:
    """Return a Config as JSON values, in the order of its fields."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(config_class: type[Config], values: Any, source: str = "the config") -> Config:
    """Build a Config from the output of `to_json`; fields that are missing keep their defaults.

    Args:
        config_class: The dataclass.
        values: The JSON object.
        source: What error messages call it, such as the path of the file.

    Raises:
        UserError: If a name is not a field, or a value has the wrong type.
    """
    if not isinstance(values, dict):
        names = ", ".join(f'"{field.name}"' for field in dataclasses.fields(config_class)[:3])  # type: ignore[arg-type]
        raise UserError(f"{source} must be an object with {names} and so on, not {values!r}.")
    types = get_type_hints(config_class)
    for name in values:
        if name not in types:
            raise UserError(f"{source} has an unknown option {name!r}{did_you_mean(name, types) or '.'}")
    fields = {name: _restore(types[name], value, f"{source}: {name}") for name, value in values.items()}
    try:
        return config_class(**fields)
    except TypeError as error:
        raise UserError(f"{source} does not make a {config_class.__name__}: {error}.") from None


def replace_from_json(config: Config, values: Mapping[str, Any]) -> Config:
    """Return a copy of a Config in which some fields have values from the output of `to_json`."""
    types = get_type_hints(type(config))
    fields = {name: _restore(types[name], value, name) for name, value in values.items()}
    return dataclasses.replace(config, **fields)  # type: ignore[type-var]


def flatten(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """List (name, value) for each plain value in nested mappings and lists of mappings; a name is `stages.0.lr`."""
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        items = enumerate(value)
    else:
        return [(name, value)]
    prefix = f"{name}." if name else ""
    return [pair for key, item in items for pair in flatten(item, f"{prefix}{key}")]


def take_config_file(config_class: type[Config], arguments: list[str]) -> tuple[Config, list[str]]:
    """Read the file of `--config`; return its Config (the default one without the option) and the other arguments.

    Raises:
        UserError: If the file is missing, cannot be read, or is not a valid Config.
    """
    others: list[str] = []
    path: str | None = None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            path = next(remaining, "")
        elif argument.startswith("--config="):
            path = argument.removeprefix("--config=")
        else:
            others.append(argument)
    if path is None:
        return config_class(), others
    if not path:
        raise UserError("--config needs a file, such as logs/baseline/config.json.")
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path} cannot be read ({error}); give the config.json of a run.") from None
    return from_json(config_class, values, f"--config {path}"), others


def _restore(kind: Any, value: Any, source: str) -> Any:
    """Convert the JSON value of one field to its type `kind`: JSON has no Path, tuple or dataclass."""
    arguments = get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_json(kind, value, source)  # type: ignore[arg-type]
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_restore(arguments[0], item, source) for item in value)
    if get_origin(kind) in (Union, UnionType):
        return None if value is None else _restore(arguments[0], value, source)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    is_literal = get_origin(kind) is Literal
    if value in arguments if is_literal else type(value) is kind:
        return value
    expected = " or ".join(map(repr, arguments)) if is_literal else getattr(kind, "__name__", str(kind))
    raise UserError(f"{source} is {value!r}, and must be {expected}.")
