"""Which folders a run may take, and what its stages may be called."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batteries.errors import BadInput
from batteries.schedules import check_warmup

ROOT = Path(__file__).parent.parent


def holds_run(logdir: Path) -> bool:
    """Whether a run was started in `logdir`, or its checkpoints were put there."""
    files = ("config.json", "run.json", "metrics.jsonl", "train.log", "tensorboard")
    return any((logdir / name).exists() for name in files) or any(logdir.glob("*/*.pth"))


RESERVED = ("tensorboard", "predictions", "plots", "profile")  # folders of a run that are no stage's


def check_stages(stages: Sequence[Any]) -> None:
    """Raise BadInput where stages cannot be told apart, or have names or warm-ups that cannot be."""
    names = [stage.name for stage in stages]
    if not names or len(set(names)) < len(names):
        raise BadInput(f"--stages need one or more, of different names, not {', '.join(names) or 'none'}.")
    if stages[0].start == "last":
        raise BadInput("--stages.0.start last has no stage before it to start from; leave it out.")
    for number, stage in enumerate(stages):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", stage.name) or stage.name in RESERVED:
            raise BadInput(
                f"--stages.{number}.name {stage.name!r} must be the name of a folder of its own: a-z, 0-9, _, -."
            )
        check_warmup(number, stage)


def check_logdir(logdir: Path) -> None:
    """Raise BadInput where `logdir` holds a run already or is no folder: nothing of the user's is overwritten."""
    if logdir.resolve() == ROOT.resolve():
        raise BadInput(f"--logdir {logdir} is this repository itself; give a folder of its own, such as logs/baseline.")
    if holds_run(logdir):
        raise BadInput(
            f"--logdir {logdir} holds a run already; go on with it by --resume, or choose another, such as "
            f"--logdir {_free_name(logdir)}."
        )
    parent = next(folder for folder in (logdir, *logdir.absolute().parents) if folder.exists())
    if not parent.is_dir():
        raise BadInput(f"--logdir {logdir} cannot be a folder: {parent} is a file; choose another.")
    if not os.access(parent, os.W_OK):
        raise BadInput(f"--logdir {logdir} cannot be written: {parent} is read-only; choose another.")


def _free_name(logdir: Path) -> Path:
    return next(path for number in range(2, 1_000_000) if not (path := Path(f"{logdir}_{number}")).exists())
