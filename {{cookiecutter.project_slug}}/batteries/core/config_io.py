"""Conversion between a Config dataclass and JSON."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from batteries.core.errors import UserError
from batteries.core.text import did_you_mean

Config = TypeVar("Config")


def to_json(config: Any) -> dict[str, Any]:
    """Return a Config as JSON values, in the order of its fields."""
    return _to_plain_json(config)


def _to_plain_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=_to_json_value))


def use_plain_numbers(config: Any) -> None:
    """Replace the scalars of numpy in a Config and in its stages by plain numbers. Sweeps and notebooks give them."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, tuple):
            plain: Any = tuple(_plain_number(item) for item in value)
        else:
            plain = _plain_number(value)
        object.__setattr__(config, field.name, plain)  # a Config is frozen


def _plain_number(value: Any) -> Any:
    if _is_dataclass_instance(value):
        use_plain_numbers(value)
    return _convert_numpy(value)


def _to_json_value(value: Any) -> Any:
    """Return the fields of a dataclass, the numbers of a scalar or an array, and the text of others, such as a Path."""
    if _is_dataclass_instance(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    converted = _convert_numpy(value)
    return str(value) if converted is value else converted


def _is_dataclass_instance(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _convert_numpy(value: Any) -> Any:
    """Return the numbers of a scalar or an array of numpy or torch; other values are not changed."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, type) else value


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
            raise UserError(f"{source} has an unknown option {name!r}{did_you_mean(name, types) or '; remove it.'}")
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


def update_saved(config_class: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved options as this version of a Config has them: new options get their defaults, removed ones go.

    Args:
        config_class: The dataclass.
        saved: The output of `to_json` of an earlier version, complete or not.

    Returns:
        JSON values. An option that was not saved and has no default is missing.
    """
    types = get_type_hints(config_class)
    updated: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        if field.name in saved:
            updated[field.name] = _update_value(types[field.name], saved[field.name])
        elif field.default is not dataclasses.MISSING:
            updated[field.name] = _to_plain_json(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            updated[field.name] = _to_plain_json(field.default_factory())
    return updated


def _update_value(kind: Any, value: Any) -> Any:
    """Apply `update_saved` to the dataclasses in the value of an option of the type `kind`."""
    arguments = get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return update_saved(kind, value)
    if get_origin(kind) is tuple and isinstance(value, list):
        return [_update_value(arguments[0], item) for item in value]
    if get_origin(kind) in (Union, UnionType):
        return _update_value(arguments[0], value)
    return value


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
    if not path or path.startswith("--"):
        raise UserError("--config needs a file, such as logs/baseline/config.json.")
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path} cannot be read ({error}); give the config.json of a run.") from None
    return from_json(config_class, values, f"--config {path}"), others


def _restore(kind: Any, value: Any, source: str) -> Any:
    """Convert the JSON value of one field to its type `kind`: JSON has no Path, tuple or dataclass."""
    arguments = get_args(kind)
    if isinstance(value, str):
        value = os.path.expanduser(value)  # as on the command line
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
