"""The .jsonl files of a run, one object a line, which a full disk does not lose."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from batteries.core.errors import UserError
from batteries.core.files import DiskFullError, append_text, is_disk_full

logger = logging.getLogger("batteries")


class JsonlWriter:
    """Appends to files in `logdir`. On a full disk lines wait for the next call, and go into checkpoints meanwhile."""

    def __init__(self, logdir: Path) -> None:
        self.logdir = logdir
        self.unwritten: list[list[str]] = []  # file and line

    def add(self, file: str, record: Mapping[str, Any]) -> None:
        """One more line."""
        self.unwritten += [[file, json.dumps(record)]]
        self.write()

    def restore(self, unwritten: list[list[str]]) -> None:
        """Go on with what a checkpoint kept; a line that came into its file after all is not written twice."""
        self.unwritten = [[file, line] for file, line in unwritten if line not in _read_text(self.logdir / file)]
        self.write()

    def write(self, tolerate_full_disk: bool = True) -> None:
        """Append what is not written yet. Raises DiskFull where there is no room, or only warns."""
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
                logger.warning(f"{full} The line is kept until there is.")
                return
            self.unwritten = self.unwritten[1:]


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of a .jsonl file and what it holds, up to one that a kill has torn. Raises BadInput for another."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            return
        try:
            yield line, json.loads(line)
        except ValueError:
            raise UserError(f"{path} is damaged in line {number}; put it back, or use another folder.") from None


def _read_text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
