"""Data for whole runs in tests: this project's own, which need no files."""

from pathlib import Path


def make_data(folder: Path) -> Path:
    """The `data_dir` for a test."""
    return folder
