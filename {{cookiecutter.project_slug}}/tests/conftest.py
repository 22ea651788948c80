"""One thread a process: tests fork, and a fork after torch has started its thread pool would hang.

What every run imports is imported here, once, for all forks.
"""

import importlib
import multiprocessing
import os
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)
if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    # A fork breaks torch's own thread pool. The next call mends it, but two threads that make it at once break it again
    # ("Invalid thread pool!" in 1 of 150 forks on 2 busy cores).
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
for module in (
    *("sklearn.datasets", "sklearn.model_selection", "tyro", "rich.console", "torch.utils.tensorboard"),
    *("pandas", "scipy.optimize", "scipy.stats"),
):
    try:
        importlib.import_module(module)
    except ImportError:  # this project may go without a tracker
        assert module == "torch.utils.tensorboard"


@pytest.fixture(scope="session", autouse=True)
def no_report() -> Iterator[None]:
    """Runs of tests make no page: it takes seconds, and imports of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("batteries.run.run.make_reports", lambda *_: None)
        yield


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    """Kill what a failed test leaves: at its end Python waits for its children, and for one that hangs for ever."""
    yield
    for child in multiprocessing.active_children():
        if not child.daemon:  # those of a loader are daemons, and end with it
            child.kill()


@pytest.fixture
def cpu() -> torch.device:
    return torch.device("cpu")
