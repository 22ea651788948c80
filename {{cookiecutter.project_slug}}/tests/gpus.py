"""GPUs in tests. They are hidden, so that all tests run on the CPU and can fork; a test of a GPU runs in a new process.

A process that has used CUDA cannot fork another one that uses it.
"""

import os
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import pytest
import torch

SECONDS = 300  # a test of a GPU that takes longer hangs

# pytest-xdist starts its workers after this file was imported, with the environment that it sets.
HAS_GPU = os.environ.setdefault("BATTERIES_TESTS_HAVE_GPU", str(torch.cuda.device_count() > 0)) == "True"
VISIBLE_GPUS = os.environ.setdefault("BATTERIES_TESTS_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")


def hide_gpus() -> None:
    """Hide all GPUs from this process and the processes that it starts."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def run_on_gpu(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function of a module in a new process that sees the GPUs; fail if it raises."""
    process = get_context("spawn").Process(target=function, args=arguments)
    if VISIBLE_GPUS == "all":
        del os.environ["CUDA_VISIBLE_DEVICES"]
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = VISIBLE_GPUS
    try:
        process.start()
    finally:
        hide_gpus()
    process.join(SECONDS)
    process.kill()
    assert process.exitcode == 0
