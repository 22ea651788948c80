"""Setup of a process: device, determinism, warnings and process group."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.utils.deterministic as deterministic_settings

from batteries.core.memory import keep_freed_memory
from batteries.core.seeding import preserved_random_state
from batteries.distributed.device import find_device
from batteries.distributed.process_group import process_group
from batteries.training.precision import Precision, check_precision
from batteries.training.wrap import check_wrapping

CUDNN_FLAGS = ("deterministic", "benchmark", "allow_tf32")


class SetupConfig(Protocol):
    """The options that concern the machine. train.py documents each one."""

    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def data_parallel(self) -> bool: ...
    @property
    def compile(self) -> bool: ...
    @property
    def deterministic(self) -> bool: ...
    @property
    def tf32(self) -> bool: ...
    @property
    def sharing_strategy(self) -> str: ...
    @property
    def show_warnings(self) -> bool: ...


@contextmanager
def setup_training(config: SetupConfig) -> Iterator[torch.device]:
    """Configure torch, join the process group, and leave it at the end.

    Args:
        config: The options.

    Yields:
        The device of this process.

    Raises:
        UserError: If the device does not exist or does not support the options.
    """
    device = find_device(config.device)
    check_precision(device, config.precision)
    check_wrapping(device, data_parallel=config.data_parallel, compiled=config.compile)
    if not config.show_warnings:
        warnings.filterwarnings("ignore")
    torch.autograd.set_detect_anomaly(False)  # slows down every step; enable it to find the origin of a NaN
    torch.multiprocessing.set_sharing_strategy(config.sharing_strategy)
    _set_determinism(config.deterministic)
    if device.type == "cpu":
        keep_freed_memory()
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.tf32
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with process_group(device):
        yield device


@contextmanager
def preserved_settings() -> Iterator[None]:
    """Restore the settings that `setup_training` changes, and the random state of CPU and GPUs, at the end."""
    environment = os.environ.copy()
    cudnn_flags = {name: getattr(torch.backends.cudnn, name) for name in CUDNN_FLAGS}
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    fills_memory = deterministic_settings.fill_uninitialized_memory  # type: ignore[attr-defined]
    matmul_precision = torch.get_float32_matmul_precision()
    detects_anomalies = torch.is_anomaly_enabled()
    sharing_strategy = torch.multiprocessing.get_sharing_strategy()
    gpu_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        with warnings.catch_warnings(), preserved_random_state():
            yield
    finally:
        torch.cuda.set_rng_state_all(gpu_states)
        torch.multiprocessing.set_sharing_strategy(sharing_strategy)
        torch.autograd.set_detect_anomaly(detects_anomalies)
        torch.set_float32_matmul_precision(matmul_precision)
        torch.use_deterministic_algorithms(is_deterministic)
        deterministic_settings.fill_uninitialized_memory = fills_memory  # type: ignore[attr-defined]
        for name, value in cudnn_flags.items():
            setattr(torch.backends.cudnn, name, value)
        os.environ.clear()
        os.environ.update(environment)


def _set_determinism(deterministic: bool) -> None:
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic  # benchmarks algorithms, so the choice varies from run to run
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch requires it before the first cuBLAS call
    torch.use_deterministic_algorithms(deterministic)
    # A debugging aid of torch that fills each new tensor with NaN; it costs memory bandwidth and changes no result.
    deterministic_settings.fill_uninitialized_memory = False  # type: ignore[attr-defined]
