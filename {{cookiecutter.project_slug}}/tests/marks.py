"""Marks of tests, and options that depend on the task of this project."""

import pytest

from experiment import task

CLASSES_ONLY = pytest.mark.skipif(
    task.PREDICTIONS != "class", reason="its data have one class per sample, and this project has another task"
)

# CutMix is not defined for numbers, and mixup not for masks, of which a pixel has one class.
MIXING: dict[str, float] = {"mixup": 0.2, "cutmix": 1.0}
if task.PREDICTIONS == "numbers":
    del MIXING["cutmix"]
if task.PREDICTIONS == "mask":
    del MIXING["mixup"]
