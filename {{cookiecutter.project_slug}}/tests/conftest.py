"""One thread a process: tests fork, and a fork after torch has started its thread pool would hang."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def cpu() -> torch.device:
    return torch.device("cpu")
