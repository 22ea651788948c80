"""Data for whole runs in tests: this project's own, which need no files."""

from pathlib import Path

from experiment.dataset import Digits

NEEDS_PATCH = False  # scripts, which start processes of their own, can read it
TEST_FILES = ()  # with nothing but the official test split in them


def make_data(folder: Path) -> Path:
    """The `data_dir` for a test."""
    return folder


def change_one_sample(dataset: Digits) -> Digits:
    """The same data but for one image."""
    dataset.images[0] = 255 - dataset.images[0]
    return dataset
