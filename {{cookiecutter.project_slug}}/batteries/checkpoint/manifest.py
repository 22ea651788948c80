"""The manifest of a stage, checkpoints.json: its checkpoints and the best of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batteries.core.errors import UserError
from batteries.core.files import read_json

MANIFEST = "checkpoints.json"
AVERAGE = "swa.pth"  # written by tools/average.py; swa.json next to it has its sha256, score and sources


@dataclass(frozen=True)
class ManifestEntry:
    """One checkpoint of a stage.

    Attributes:
        file: The file name.
        bytes: The size of the file.
        sha256: The sha256 of the file, in hexadecimal.
        epoch: The epoch, from 1.
        step: The optimizer steps of the stage so far.
        score: The main metric; None if it is not finite (JSON has no NaN), or if the checkpoint is within an epoch.
    """

    file: str
    bytes: int
    sha256: str
    epoch: int
    step: int
    score: float | None


@dataclass(frozen=True)
class BestEpoch:
    """The best epoch of a stage and its score; both are None while no score was finite."""

    epoch: int | None = None
    score: float | None = None


@dataclass(frozen=True)
class Manifest:
    """The contents of checkpoints.json.

    Attributes:
        entries: The checkpoints, oldest first.
        best: The best epoch.
    """

    entries: list[ManifestEntry] = field(default_factory=list)
    best: BestEpoch = field(default_factory=BestEpoch)


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a stage directory; an empty one if the directory has no checkpoints.

    Raises:
        UserError: If there are checkpoints without a manifest, or the manifest is damaged.
    """
    path = directory / MANIFEST
    if not path.is_file():
        # One checkpoint without a manifest is normal: the first of a stage, killed before the manifest was written.
        if len(list(directory.glob("epoch_*.pth"))) > 1:
            raise UserError(f"{path} is missing, so the checkpoints in {directory} cannot be verified; restore it.")
        return Manifest()
    contents = read_json(path)
    entries = [ManifestEntry(**entry) for entry in contents["checkpoints"]]
    return Manifest(entries, BestEpoch(**contents["best"]))


def read_average(directory: Path) -> dict[str, Any]:
    """Read swa.json, which describes the averaged checkpoint of a stage; an empty dict if there is none."""
    path = (directory / AVERAGE).with_suffix(".json")
    return read_json(path) if path.is_file() else {}
