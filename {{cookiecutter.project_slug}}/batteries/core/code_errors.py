"""Explanations of errors that a function of experiment/ causes by the shape or the type of what it gets or returns."""

import re
import sys
import traceback
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from batteries.core.project import ROOT, is_user_code

BUILDERS = {  # by name of a variable
    "model": "build_model in experiment/model.py",
    "network": "build_model in experiment/model.py",
    "criterion": "build_criterion in experiment/task.py",
}


class Expectation(NamedTuple):
    """What a called function expects.

    Attributes:
        function: A pattern of the name of the function; the empty one fits each.
        message: A pattern of the message of torch.
        hint: What is expected.
    """

    function: str
    message: str
    hint: str


EXPECTATIONS = (
    Expectation(
        "",
        r"Target -?\d+ is out of bounds",
        "build_model in experiment/model.py must return one output for each class, and __getitem__ in "
        "experiment/dataset.py targets from 0",
    ),
    Expectation(
        "",
        r"dtype to be Long|scalar type Long",
        "__getitem__ in experiment/dataset.py must return class targets as int or torch.int64",
    ),
    Expectation(
        "",
        r"to have \d+ channels, but got",
        "the first layer must take the channels of the images, which experiment/dataset.py returns",
    ),
    Expectation("", r"mat1 and mat2 shapes", "a linear layer in experiment/model.py must take the size of its input"),
    Expectation(
        "^normalize ",
        r"broadcast shape|size of tensor",  # the first one for images of one channel
        "MEAN and STD in experiment/augmentations.py need one value for each channel of the images",
    ),
    Expectation("", r"should be the same|same dtype", "normalize in experiment/augmentations.py must return float32"),
    Expectation(
        "build_criterion",
        r"size|shape",
        "the outputs of build_model in experiment/model.py, and the targets of __getitem__ in experiment/dataset.py, "
        "must have the shapes that the loss takes",
    ),
)
DEVICE_ASSERT = (
    "a value was out of bounds on the GPU, usually a target: build_model in experiment/model.py must return one output "
    "for each class, and __getitem__ in experiment/dataset.py targets from 0; --device cpu shows where."
)


class Call(NamedTuple):
    """A call of a function of experiment/.

    Attributes:
        name: The function and its file.
        arguments: What it got.
    """

    name: str
    arguments: list[Any]


def explain_code_error(error: BaseException) -> str | None:
    """Describe an error of torch in one line: the function that was called, what it got, and what was expected.

    None if it is another error, such as one that the user's code raises itself.
    """
    text = str(error).strip()
    if "device-side assert triggered" in text:
        return DEVICE_ASSERT
    if not isinstance(error, RuntimeError | IndexError | TypeError | ValueError) or _is_about_processes(error):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    call = next(_calls(frames), None)
    raised_by_user = frames and is_user_code(Path(frames[-1].f_code.co_filename)) and type(error) is not RuntimeError
    if call is None or not _has_tensor(call.arguments) or not text or raised_by_user:
        return None
    inputs = ", ".join(_describe(value) for value in call.arguments)
    return f"{call.name} fails on {inputs}: {text.splitlines()[0].rstrip('.')}{_hint(call.name, text)}."


def _hint(function: str, text: str) -> str:
    """Return what the function expects, after a semicolon; an empty string if that is not known."""
    for expectation in EXPECTATIONS:
        if re.search(expectation.function, function) and re.search(expectation.message, text):
            return f"; {expectation.hint}"
    return ""


def _is_about_processes(error: BaseException) -> bool:
    """Return whether an error may come from another process, such as a rank that is gone."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or re.search(r"gloo|nccl|connection|DataLoader", str(error), re.IGNORECASE) is not None


def _calls(frames: list[FrameType]) -> Iterator[Call]:
    """List the calls from train.py, tools/ or batteries/ to experiment/, or to a model or a loss."""
    for caller, frame in pairwise(frames):
        file = Path(frame.f_code.co_filename)
        if not _is_loop(Path(caller.f_code.co_filename)) or _is_loop(file):
            continue
        builder = _find_builder(caller, frame)
        if _is_module_call(frame):
            yield Call(builder or type(frame.f_locals["self"]).__name__, list(frame.f_locals["args"]))
        elif builder or is_user_code(file):
            name = builder or f"{frame.f_code.co_name} in {file.relative_to(ROOT).as_posix()}"
            yield Call(name, _arguments(frame))


def _is_loop(file: Path) -> bool:
    """Return whether a file is train.py, or belongs to tools/ or batteries/."""
    return file == ROOT / "train.py" or any(file.is_relative_to(ROOT / name) for name in ("tools", "batteries"))


def _is_module_call(frame: FrameType) -> bool:
    torch = sys.modules.get("torch")
    is_call = torch is not None and frame.f_code.co_name == "_wrapped_call_impl"
    return is_call and isinstance(frame.f_locals.get("self"), torch.nn.Module)  # type: ignore[union-attr]


def _find_builder(caller: FrameType, frame: FrameType) -> str:
    """Return what a called model or loss is, from the name of the variable or the attribute that holds it."""
    module = frame.f_locals.get("self")
    holders = [caller.f_locals, getattr(caller.f_locals.get("self"), "__dict__", {})]
    for name, value in (item for holder in holders for item in holder.items()):
        is_called = (value is module and value is not None) or getattr(value, "__code__", None) is frame.f_code
        if is_called and name.strip("_") in BUILDERS:
            return f"what {BUILDERS[name.strip('_')]} returns"
    return ""


def _arguments(frame: FrameType) -> list[Any]:
    names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
    values = [frame.f_locals[name] for name in names if name != "self" and name in frame.f_locals]
    return [value for value in values if value is not None and not isinstance(value, bool | str)]


def _has_tensor(values: list[Any]) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and any(isinstance(value, torch.Tensor) for value in values)


def _describe(value: Any) -> str:
    """Describe a value: shape, dtype and the range of integers on the CPU."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    kind = str(value.dtype).removeprefix("torch.")
    text = f"{tuple(value.shape)} {kind}"
    is_class = value.ndim == 1 and value.numel() and value.device.type == "cpu" and not value.is_floating_point()
    return f"{text} from {int(value.min())} to {int(value.max())}" if is_class else text
