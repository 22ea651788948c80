"""The device to train on, and how it shall behave."""

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.utils.deterministic as deterministic_settings

from batteries.distributed import process_group
from batteries.errors import BadInput
from batteries.parallel import check_sharing
from batteries.randomness import preserved_random_state
from batteries.ranks import local_rank, world_size
from batteries.steps import check_precision

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h; see man 3 mallopt


def find_device(name: str) -> torch.device:
    """The device for this process: `auto` takes a GPU where there is one, under DDP the one of the local rank.

    Raises BadInput for a device that is not there, with those that are.
    """
    if name == "auto":
        name = _best_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise BadInput(f"--device {name} is not a device; use one of: auto, {', '.join(_devices())}.")
    if device.type == "cuda":
        return _find_gpu(device, name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise BadInput(f"--device {name} is not on this machine; use one of: auto, {', '.join(_devices())}.")
    if device.type == "mps" and world_size() > 1:
        raise BadInput("--device mps cannot be shared between processes; use scripts/train_device.sh or --device cpu.")
    return device


def _find_gpu(device: torch.device, name: str) -> torch.device:
    """A GPU that is there; under DDP each process on a machine takes the one with its local rank."""
    if world_size() > 1 and device.index is not None:
        raise BadInput(f"--device {name} is one GPU, but {world_size()} processes run; use --device cuda.")
    index = local_rank() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise BadInput(
            f"--device {name} needs GPU {index}, but this machine has {torch.cuda.device_count()}; "
            f"use one of: auto, {', '.join(_devices())}{', or fewer processes (NPROC)' if world_size() > 1 else ''}."
        )
    return torch.device("cuda", index)


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() and world_size() == 1 else "cpu"


def _devices() -> list[str]:
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


@contextmanager
def start_process(config: Any) -> Iterator[torch.device]:
    """Set torch up, join the other processes, and leave them at the end; gives the device of this process.

    `config` has the knobs of train.py that concern the machine. Raises BadInput for what it cannot do.
    """
    found = find_device(config.device)
    check_precision(found, config.precision)
    check_sharing(found, data_parallel=config.data_parallel, compiled=config.compile)
    if not config.show_warnings:
        warnings.filterwarnings("ignore")
    torch.autograd.set_detect_anomaly(False)  # it slows every step down; turn it on to find a NaN
    torch.multiprocessing.set_sharing_strategy(config.sharing_strategy)
    _set_determinism(config.deterministic)
    if found.type == "cpu":
        keep_freed_memory()
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.tf32
    if found.type == "cuda":
        torch.cuda.set_device(found)
    with process_group(found):
        yield found


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next step; else it maps each block of over 32 MB anew, page by page.

    Measured on 2 cores with torch 2.15: a step of resnet50 with AdamW on 24 images of 160x160 takes 2.25 s instead of
    3.01 s, six epochs of 160 photographs of many sizes 46 s instead of 59 s. The memory at the peak is the same;
    between its blocks some stays unused until `return_freed_memory`.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Give the system what is free; after each epoch, so that what was kept does not add up."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    """The C library of this process where it is glibc: Windows, macOS and musl have no such calls."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


@contextmanager
def preserved_settings() -> Iterator[None]:
    """Give back what `start_process` sets, and the random state of CPU and GPUs, as they were found."""
    environment, cudnn = os.environ.copy(), _cudnn_flags()
    is_deterministic, fills = torch.are_deterministic_algorithms_enabled(), _fills_memory()
    precision, anomaly = torch.get_float32_matmul_precision(), torch.is_anomaly_enabled()
    strategy = torch.multiprocessing.get_sharing_strategy()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        with warnings.catch_warnings(), preserved_random_state():
            yield
    finally:
        torch.cuda.set_rng_state_all(gpus)
        torch.multiprocessing.set_sharing_strategy(strategy)
        torch.autograd.set_detect_anomaly(anomaly)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(is_deterministic)
        deterministic_settings.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        for name, value in cudnn.items():
            setattr(torch.backends.cudnn, name, value)
        os.environ.clear()
        os.environ.update(environment)


def _cudnn_flags() -> dict[str, bool]:
    return {name: getattr(torch.backends.cudnn, name) for name in ("deterministic", "benchmark", "allow_tf32")}


def _fills_memory() -> bool:
    return deterministic_settings.fill_uninitialized_memory  # type: ignore[attr-defined]


def _set_determinism(deterministic: bool) -> None:
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic  # it times algorithms, so the choice varies from run to run
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it, before the first cuBLAS call
    torch.use_deterministic_algorithms(deterministic)
    # A debugging aid of torch that fills each new tensor with NaN; it costs memory bandwidth and changes no result.
    deterministic_settings.fill_uninitialized_memory = False  # type: ignore[attr-defined]
