"""Settings of all tests. Each process has one thread: tests fork, and a fork of torch's thread pool would hang.

Modules that every run imports are imported here once, so that forked processes have them.
"""

import builtins
import importlib
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator

import pytest
import torch
from gpus import hide_gpus

MODULES_OF_RUNS = (
    "sklearn.datasets",
    "sklearn.model_selection",
    "tyro",
    "rich.console",
    "torch.utils.tensorboard",
    "pandas",
    "scipy.optimize",
    "scipy.stats",
)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a background job of a shell script
    signal.signal(signal.SIGINT, signal.default_int_handler)
hide_gpus()
torch.set_num_threads(1)
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    # A fork invalidates torch's thread pool. The next call recreates it, but two threads that do so at once invalidate
    # it again ("Invalid thread pool!" in 1 of 150 forks on 2 busy cores).
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
for module in MODULES_OF_RUNS:
    try:
        importlib.import_module(module)
    except ImportError:  # a project can be generated without a tracker
        assert module == "torch.utils.tensorboard"


@pytest.fixture(scope="session", autouse=True)
def no_report() -> Iterator[None]:
    """Build no report after the runs of tests: it takes seconds, and has its own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("batteries.run.run.make_reports", lambda *_: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def deprecated_calls_are_errors_in_runs(pytestconfig: pytest.Config) -> Iterator[None]:
    """Keep the filters of pyproject.toml in runs, which ignore all other warnings of libraries."""

    def ignore_warnings() -> None:
        warnings.filterwarnings("ignore")
        for line in pytestconfig.getini("filterwarnings"):
            action, message, category, module = line.split(":")
            warnings.filterwarnings(action, message, getattr(builtins, category), module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("batteries.training.setup.ignore_warnings", ignore_warnings)
        yield


@pytest.fixture(autouse=True)
def no_remaining_processes() -> Iterator[None]:
    """Kill the processes that a failed test leaves: Python waits for its child processes at exit."""
    yield
    for child in multiprocessing.active_children():
        if not child.daemon:  # loader workers are daemons, which end with their loader
            child.kill()


@pytest.fixture
def cpu() -> torch.device:
    return torch.device("cpu")
