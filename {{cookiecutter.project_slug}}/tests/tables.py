"""Tables of predictions for tests, and the verbs that read them, called as from the command line."""

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


def random_table(
    size: int = 12, seed: int = 0, classes: tuple[str, ...] = CLASSES, targets: bool = True
) -> Predictions:
    """Rows that sum to one, with targets that the most probable class often meets."""
    generator = np.random.default_rng(seed)
    values = generator.dirichlet(np.ones(len(classes)), size)
    known = np.random.default_rng(7).integers(len(classes), size=size) if targets else None
    if known is not None:
        values[np.arange(size), known] += 0.5
        values /= values.sum(1, keepdims=True)
    return Predictions(f"table{seed}.csv", tuple(f"row {index:03}" for index in range(size)), classes, values, known)


def write_lines(path: Path, *lines: str) -> Path:
    """A file of `lines`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def call(verb: Any, *flags: object) -> End:
    """`python VERB.py FLAGS`, in this process: verbs that read tables leave nothing behind in it."""
    form = getattr(verb, "COMMANDS", None) or verb.Options
    default = verb.Show() if hasattr(verb, "Show") else None
    out, err, before, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = [f"{verb.__name__}.py", *map(str, flags)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_command(verb.main, form, repeats=False, default=default)
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    assert isinstance(code, int)
    return End(code, out.getvalue(), err.getvalue())


def refused(end: End, sentence: str) -> None:
    """Asserts one sentence on stderr, exit code 2 and no other word."""
    assert (end.code, end.err.count("\n"), end.out) == (2, 1, ""), end
    assert end.err.startswith("error: ")
    assert sentence in end.err, end.err
