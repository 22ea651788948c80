"""The .jsonl files of a run: one JSON object per line; a full disk loses no line."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from batteries.core.errors import UserError
from batteries.core.files import DiskFullError, append_text, is_disk_full

logger = logging.getLogger("batteries")


class JsonlWriter:
    """Appends lines to the .jsonl files of a run.

    Lines that a full disk rejects are written by a later call, and are saved in the checkpoints until then.

    Attributes:
        logdir: The run directory.
        unwritten: The pairs of file name and line that are not written yet.
    """

    def __init__(self, logdir: Path) -> None:
        self.logdir = logdir
        self.unwritten: list[list[str]] = []

    def add(self, file: str, record: Mapping[str, Any]) -> None:
        """Append `record` as one line to the file called `file`."""
        # A new list, because a checkpoint that is being written may hold the old one.
        self.unwritten = [*self.unwritten, [file, json.dumps(record)]]
        self.write()

    def restore(self, unwritten: list[list[str]]) -> None:
        """Write the lines that a checkpoint saved, except those that were written after it."""
        self.unwritten = [[file, line] for file, line in unwritten if line not in _read_text(self.logdir / file)]
        self.write()

    def write(self, tolerate_full_disk: bool = True) -> None:
        """Append the lines that are not written yet.

        Args:
            tolerate_full_disk: On a full disk, log a warning and keep the lines.

        Raises:
            DiskFullError: If the disk is full and that is not tolerated.
        """
        while self.unwritten:
            file, line = self.unwritten[0]
            try:
                append_text(self.logdir / file, line + "\n")
            except OSError as error:
                if not is_disk_full(error):
                    raise
                full = DiskFullError(self.logdir / file, len(line))
                if not tolerate_full_disk:
                    raise full from None
                logger.warning(f"{full} The line is kept and will be written later.")
                return
            self.unwritten = self.unwritten[1:]


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a .jsonl file.

    Args:
        path: The file; if it does not exist, it is treated as empty.

    Yields:
        Each line, with its line break, and its object. An incomplete last line, which a killed process can leave, is
        skipped.

    Raises:
        UserError: If a complete line is not valid JSON.
    """
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            return
        try:
            yield line, json.loads(line)
        except ValueError:
            raise UserError(f"{path} is damaged in line {number}; restore it, or use another directory.") from None


def _read_text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
