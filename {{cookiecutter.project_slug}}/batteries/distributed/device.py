"""Device selection."""

import torch

from batteries.core.errors import UserError
from batteries.core.ranks import local_rank, world_size


def find_device(name: str) -> torch.device:
    """Return the device of this process.

    Args:
        name: auto, cpu, cuda, cuda:N or mps. `auto` prefers a GPU; under DDP, `cuda` is the GPU of the local rank.

    Raises:
        UserError: If the device is not available; the message lists the available ones.
    """
    if name == "auto":
        name = _best_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name} is not a device; use one of: {_choices()}.")
    if device.type == "cuda":
        return _find_gpu(device, name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name} is not available on this machine; use one of: {_choices()}.")
    if device.type == "mps" and world_size() > 1:
        raise UserError("--device mps supports one process only; use scripts/train_device.sh or --device cpu.")
    return device


def _find_gpu(device: torch.device, name: str) -> torch.device:
    """Return `device` with its index. Raises UserError if there is no such GPU, or several ranks would use it."""
    if world_size() > 1 and device.index is not None:
        raise UserError(f"--device {name} is one GPU, but {world_size()} processes run; use --device cuda.")
    index = local_rank() if device.index is None else device.index
    count = torch.cuda.device_count()
    if index >= count:
        fewer_processes = ", or fewer processes (NPROC)" if world_size() > 1 else ""
        raise UserError(
            f"--device {name} needs GPU {index}, but this machine has {count}; "
            f"use one of: {_choices()}{fewer_processes}."
        )
    return torch.device("cuda", index)


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() and world_size() == 1 else "cpu"


def _choices() -> str:
    """List the values of --device that this machine supports."""
    names = ["auto", "cpu"]
    names += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return ", ".join(names)
