"""Setup of a process: device, determinism, warnings and process group."""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.utils.deterministic as deterministic_settings

from batteries.core.memory import keep_freed_memory
from batteries.core.seeding import preserved_random_state
from batteries.distributed.device import find_device
from batteries.distributed.process_group import process_group
from batteries.training.precision import Precision, check_precision
from batteries.training.wrap import check_wrapping

CUDNN_FLAGS = ("deterministic", "benchmark")
# The precision of fp32 products on GPUs. Code that sets or reads the former settings too, such as
# torch.get_float32_matmul_precision, raises. The setting of cuDNN comes first because the others inherit from it.
FP32_SETTINGS: tuple[Any, ...] = (
    torch.backends.cudnn,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn,  # type: ignore[attr-defined]
    torch.backends.cuda.matmul,
)

_one_run_at_a_time = threading.RLock()


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
    def shards(self) -> int | None: ...
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

    Runs in several threads wait for each other: the random generators and the settings of torch, the loggers and stdout
    belong to the whole process.

    Args:
        config: The options.

    Yields:
        The device of this process.

    Raises:
        UserError: If the device does not exist or does not support the options.
    """
    with _one_run_at_a_time:
        device = _configure(config)
        with process_group(device):
            yield device


def _configure(config: SetupConfig) -> torch.device:
    """Apply the options to this process, and return its device."""
    device = find_device(config.device)
    check_precision(device, config.precision)
    check_wrapping(
        device,
        data_parallel=config.data_parallel,
        compiled=config.compile,
        shards=config.shards,
        deterministic=config.deterministic,
    )
    if not config.show_warnings:
        ignore_warnings()
    torch.autograd.set_detect_anomaly(False)  # slows down every step; enable it to find the origin of a NaN
    torch.multiprocessing.set_sharing_strategy(config.sharing_strategy)
    _set_determinism(config.deterministic)
    if device.type == "cpu":
        keep_freed_memory()
        if config.shards is not None:
            torch.set_num_threads(1)  # kernels divide sums among the threads, whose number would change the rounding
    for setting in FP32_SETTINGS:
        setting.fp32_precision = "tf32" if config.tf32 else "ieee"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextmanager
def preserved_settings() -> Iterator[None]:
    """Restore the settings that `setup_training` changes, and the random state of CPU and GPUs, at the end."""
    environment = os.environ.copy()
    cudnn_flags = {name: getattr(torch.backends.cudnn, name) for name in CUDNN_FLAGS}
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    fills_memory = deterministic_settings.fill_uninitialized_memory  # type: ignore[attr-defined]
    fp32_precisions = [setting.fp32_precision for setting in FP32_SETTINGS]
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
        for setting, precision in zip(FP32_SETTINGS, fp32_precisions, strict=True):
            setting.fp32_precision = precision
        torch.use_deterministic_algorithms(is_deterministic)
        deterministic_settings.fill_uninitialized_memory = fills_memory  # type: ignore[attr-defined]
        for name, value in cudnn_flags.items():
            setattr(torch.backends.cudnn, name, value)
        os.environ.clear()
        os.environ.update(environment)


def ignore_warnings() -> None:
    """Show no Python warnings from now on."""
    warnings.filterwarnings("ignore")


def _set_determinism(deterministic: bool) -> None:
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic  # benchmarks algorithms, so the choice varies from run to run
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch requires it before the first cuBLAS call
    torch.use_deterministic_algorithms(deterministic)
    # A debugging aid of torch that fills each new tensor with NaN; it costs memory bandwidth and changes no result.
    deterministic_settings.fill_uninitialized_memory = False  # type: ignore[attr-defined]
