"""Device selection."""

import torch

from batteries.core.errors import UserError
from batteries.core.ranks import local_rank, world_size


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
        raise UserError(f"--device {name} is not a device; use one of: auto, {', '.join(_devices())}.")
    if device.type == "cuda":
        return _find_gpu(device, name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name} is not on this machine; use one of: auto, {', '.join(_devices())}.")
    if device.type == "mps" and world_size() > 1:
        raise UserError("--device mps cannot be shared between processes; use scripts/train_device.sh or --device cpu.")
    return device


def _find_gpu(device: torch.device, name: str) -> torch.device:
    """A GPU that is there; under DDP each process on a machine takes the one with its local rank."""
    if world_size() > 1 and device.index is not None:
        raise UserError(f"--device {name} is one GPU, but {world_size()} processes run; use --device cuda.")
    index = local_rank() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UserError(
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
