"""One thread a process: tests fork, and a fork after torch has started its thread pool would hang.

What every run imports is imported here, once, for all forks.
"""

import importlib
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)
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
        patch.setattr("batteries.runs.make_report", lambda *_: None)
        yield


@pytest.fixture
def cpu() -> torch.device:
    return torch.device("cpu")
