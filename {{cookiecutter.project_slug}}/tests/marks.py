"""Marks of tests."""

import pytest

from experiment import task

CLASSES_ONLY = pytest.mark.skipif(
    task.PREDICTIONS != "class", reason="its data have one class per sample, and this project has another task"
)
