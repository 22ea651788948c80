"""The directory of a run: which directories are allowed, and the files in it."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from batteries.core.errors import UserError
from batteries.core.files import DirectoryLock, read_json, write_text
from batteries.core.jsonl import JsonlWriter
from batteries.core.project import ROOT
from batteries.core.text import find_repeated
from batteries.distributed.collectives import run_on_rank_zero
from batteries.run.config import RunConfig, StageConfig
from batteries.run.metadata import RunMetadata
from batteries.run.position import TrainingPosition, truncate_jsonl
from batteries.training.schedules import check_warmup

RESERVED = ("tensorboard", "predictions", "plots", "profile")  # subdirectories of a run that are not stages
SIGNS_OF_A_RUN = ("config.json", "run.json", "metrics.jsonl", "train.log", "tensorboard")


class RunDirectory:
    """The files of a run. Only rank 0 writes them.

    Attributes:
        path: The directory.
        lock: Keeps a second process out of it.
        metadata: run.json, git.diff and packages.txt.
        jsonl: The writer of metrics.jsonl and timings.jsonl.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = DirectoryLock(path / ".lock")
        self.metadata = RunMetadata(path)
        self.jsonl = JsonlWriter(path)

    def read_object(self, name: str) -> dict[str, Any]:
        """Read a JSON file of the run; an empty object if it does not exist."""
        path = self.path / name
        return read_json(path) if path.is_file() else {}

    def create(self, config: Mapping[str, Any]) -> None:
        """Make the directory, lock it, and write config.json.

        Raises:
            UserError: If it cannot be written, or another process has the lock.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
            write_text(self.path / "config.json", json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--logdir {self.path} cannot be written ({error.strerror}); use another one.") from None

    def rewind(self, position: TrainingPosition, stages: Sequence[str], unwritten: list[list[str]]) -> None:
        """Remove what the .jsonl files have at or after `position`, and write the lines that a checkpoint kept."""
        for file in ("metrics.jsonl", "timings.jsonl"):
            truncate_jsonl(self.path / file, stages, position)
        if unwritten:
            self.jsonl.restore(unwritten)


def holds_run(logdir: Path) -> bool:
    """Return whether a run was started in `logdir`, or checkpoints were put there."""
    return any((logdir / name).exists() for name in SIGNS_OF_A_RUN) or any(logdir.glob("*/*.pth"))


def is_resumed(config: RunConfig) -> bool:
    """Return whether `--resume` was given and the logdir holds a run. Every rank must call it."""
    return config.resume and run_on_rank_zero(lambda: holds_run(config.logdir))


def check_stages(stages: Sequence[StageConfig]) -> None:
    """Raise UserError if the list of stages is empty, or a name, start or warmup is not allowed."""
    names = [stage.name for stage in stages]
    if not names:
        raise UserError("--stages is empty; a run needs one stage or more.")
    if repeated := find_repeated(names):
        raise UserError(f"--stages has two stages named {repeated[0]}; give each stage a different name.")
    if stages[0].start == "last":
        raise UserError("--stages.0.start last has no stage before it to start from; leave it out.")
    for number, stage in enumerate(stages):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", stage.name) or stage.name in RESERVED:
            raise UserError(
                f"--stages.{number}.name {stage.name!r} must be a directory name with the characters a-z, A-Z, 0-9, _ "
                f"and - only, and none of {', '.join(RESERVED)}."
            )
        check_warmup(number, stage)


def check_logdir(logdir: Path) -> None:
    """Raise UserError if `logdir` already holds a run or cannot be made: no file of the user is overwritten."""
    if logdir.resolve() == ROOT.resolve():
        raise UserError(f"--logdir {logdir} is this repository; use a separate directory, such as logs/baseline.")
    if holds_run(logdir):
        raise UserError(
            f"--logdir {logdir} already holds a run; resume it with --resume, or choose another directory, such as "
            f"--logdir {_free_name(logdir)}."
        )
    parent = next(directory for directory in (logdir, *logdir.absolute().parents) if directory.exists())
    if not parent.is_dir():
        raise UserError(f"--logdir {logdir} cannot be a directory: {parent} is a file; choose another one.")
    if not os.access(parent, os.W_OK):
        raise UserError(f"--logdir {logdir} cannot be written: {parent} is read-only; choose another one.")


def _free_name(logdir: Path) -> Path:
    number = 2
    while (path := Path(f"{logdir}_{number}")).exists():
        number += 1
    return path
