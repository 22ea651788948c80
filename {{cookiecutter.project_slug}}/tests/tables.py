"""Tables of predictions for tests, and calls of the tools that read them."""

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from processes import End

from batteries.core.command_line import run_command
from batteries.evaluation.predictions import Predictions

CLASSES = ("cat", "dog", "0")


def random_predictions(
    size: int = 12, seed: int = 0, classes: tuple[str, ...] = CLASSES, targets: bool = True
) -> Predictions:
    """Return random rows that sum to one, with targets for which many of them are correct."""
    generator = np.random.default_rng(seed)
    values = generator.dirichlet(np.ones(len(classes)), size)
    known = np.random.default_rng(7).integers(len(classes), size=size) if targets else None
    if known is not None:
        values[np.arange(size), known] += 0.5
        values /= values.sum(1, keepdims=True)
    return Predictions(f"table{seed}.csv", tuple(f"row {index:03}" for index in range(size)), classes, values, known)


def write_lines(path: Path, *lines: str) -> Path:
    """Write a file of `lines`, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def call_tool(tool: Any, *flags: object) -> End:
    """Run `python tools/TOOL.py FLAGS` in this process; tools that read tables change nothing in it."""
    options = getattr(tool, "COMMANDS", None) or tool.Options
    default = tool.Show() if hasattr(tool, "Show") else None
    out = io.StringIO()
    err = io.StringIO()
    code: Any = 0
    arguments = sys.argv
    sys.argv = [f"{tool.__name__.replace('.', '/')}.py", *map(str, flags)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_command(tool.main, options, repeats=False, default=default)
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = arguments
    assert isinstance(code, int)
    return End(code, out.getvalue(), err.getvalue())


def assert_rejected(end: End, message: str) -> None:
    """Assert that a command printed one line on stderr with `message`, nothing on stdout, and has exit code 2."""
    assert (end.code, end.err.count("\n"), end.out) == (2, 1, ""), end
    assert end.err.startswith("error: ")
    assert message in end.err, end.err
