"""checkpoints.json, the manifest of a stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batteries.core.errors import UserError
from batteries.core.files import read_json

MANIFEST = "checkpoints.json"
AVERAGE = "swa.pth"  # what average.py makes of the others; swa.json beside it says what should be in it


@dataclass(frozen=True)
class ManifestEntry:
    """One line of the ledger. `score` is None where it was not finite (JSON has no NaN)."""

    file: str
    bytes: int
    sha256: str
    epoch: int
    step: int
    score: float | None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The rows of the ledger in `folder`, oldest first, and the best; none where the folder has no checkpoints.

    Raises BadInput where checkpoints are there without their ledger.
    """
    path = folder / MANIFEST
    if not path.is_file():
        # One file may lie there alone: the first of a stage, killed before its ledger was written.
        if len(list(folder.glob("epoch_*.pth"))) > 1:
            raise UserError(f"{path} is missing, so nothing says which checkpoints in {folder} are sound; put it back.")
        return {"rows": [], "best": {"epoch": None, "score": None}}
    ledger = read_json(path)
    return {"rows": [ManifestEntry(**row) for row in ledger["checkpoints"]], "best": ledger["best"]}


def read_average(folder: Path) -> dict[str, Any]:
    """What average.py noted of swa.pth: its bytes and sha256, its score and what it was made of; nothing without it."""
    path = (folder / AVERAGE).with_suffix(".json")
    return read_json(path) if path.is_file() else {}
