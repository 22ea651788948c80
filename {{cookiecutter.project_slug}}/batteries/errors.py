"""What goes wrong because of what was asked for, as opposed to a bug."""

import difflib
import dis
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent


class BadInput(Exception):
    """A value that its giver can mend: shown as one sentence, without a traceback, exit code 2.

    Not a ValueError, since tyro would wrap one that Config raises in words of its own.
    """


class RunFailed(Exception):
    """A run that cannot go on, for a reason that its giver can read: one sentence, without a traceback, exit code 1."""


def is_bad_input(error: BaseException) -> bool:
    """Whether `error` is for the user: a BadInput, or a `raise ValueError(…)` that stands in train.py or experiment/.

    A ValueError that python or a library raises there (`int("x")`, a failed unpacking) is a bug and keeps its
    traceback.
    """
    if isinstance(error, BadInput):
        return True
    trace = error.__traceback__
    if type(error) is not ValueError or trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    raised_on_purpose = code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raised_on_purpose and _is_ours(Path(code.co_filename))


def _is_ours(file: Path) -> bool:
    folder = file.resolve().parent
    return folder in (ROOT.resolve(), (ROOT / "experiment").resolve())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had no memory left. torch has a class of its own for GPUs alone."""
    import torch

    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or on_cpu


def shorten(names: Iterable[object], most: int = 10) -> str:
    """The first names, and how many more there are."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def near(word: str, known: Iterable[str]) -> str:
    """The known word that comes nearest, as the end of a sentence (`; did you mean 'x'?`), or nothing."""
    matches = difflib.get_close_matches(word, [str(name) for name in known], n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
