"""Data for whole runs in tests: this project's own, which need no files."""

from pathlib import Path

NEEDS_PATCH = False  # scripts, which start processes of their own, can read it


def make_data(folder: Path) -> Path:
    """The `data_dir` for a test."""
    return folder
