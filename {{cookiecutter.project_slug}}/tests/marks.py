"""Marks of tests, and options that depend on the task of this project."""

import pytest

from experiment import task

CLASSES_ONLY = pytest.mark.skipif(
    task.PREDICTIONS != "class", reason="its data have one class per sample, and this project has another task"
)

# A pixel of a mask has one class, so masks have no mixup.
MIXING = {"cutmix": 0.2} if task.PREDICTIONS == "mask" else {"mixup": 0.2}
