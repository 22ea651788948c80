"""The options --model and --model-args, as arguments of build_model."""

import ast
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from batteries.core.errors import UserError
from batteries.core.text import find_repeated


def model_arguments(
    build_model: Callable[..., Any], num_classes: int, name: str | None, texts: Sequence[str]
) -> dict[str, Any]:
    """Return the arguments of `build_model`.

    Args:
        build_model: The function of experiment/model.py.
        num_classes: The number of outputs.
        name: The network (`--model`); None for the default of `build_model`.
        texts: Arguments of the network (`--model-args`), such as `dropout=0.1`.

    Raises:
        UserError: If a text is not `name=value`, or `build_model` does not accept an argument.
    """
    arguments: dict[str, Any] = {"num_classes": num_classes}
    if name is not None:
        arguments["name"] = name
    arguments |= parse_arguments(texts)
    try:
        inspect.signature(build_model).bind(**arguments)
    except TypeError as error:
        flags = " and ".join(["--model"] * (name is not None) + ["--model-args"] * bool(texts))
        raise UserError(
            f"{flags}: build_model in experiment/model.py does not accept it ({error}); add the argument there, or "
            "remove the option."
        ) from None
    return arguments


def build_network(name: str, build: Callable[..., nn.Module], *required: Any, **options: Any) -> nn.Module:
    """Call `build` with its required arguments and the options of `--model-args`.

    Raises:
        UserError: If it does not accept the options; `name` is the network in the message.
    """
    try:
        return build(*required, **options)
    except (TypeError, ValueError, AssertionError) as error:
        if not options:
            raise
        given = " ".join(f"{key}={value}" for key, value in options.items())
        raise UserError(f"--model-args {given}: {name} does not accept that ({error}).") from error


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Parse texts such as `dropout=0.1`; a value that is not a Python literal, such as `gelu`, is a text.

    Raises:
        UserError: If one has no name or no value, or sets `num_classes` or `name`, or two have the same name.
    """
    arguments = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name.isidentifier() or not equals or not value:
            raise UserError(f"--model-args {text} must be name=value, such as dropout=0.1.")
        if name in ("num_classes", "name"):
            source = "--model" if name == "name" else "the data set"
            raise UserError(f"--model-args {text}: {name} follows from {source}; remove it.")
        arguments[name] = _parse_value(value)
    if repeated := find_repeated([text.partition("=")[0] for text in texts]):
        raise UserError(f"--model-args has {repeated[0]} twice; give it once.")
    return arguments


def _parse_value(text: str) -> Any:
    constants = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
