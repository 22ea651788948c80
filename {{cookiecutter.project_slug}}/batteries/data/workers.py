"""Worker processes of a loader."""

import io
import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from batteries.core.errors import UserError
from batteries.core.signals import SIGNALS
from batteries.data.dataset import SampleRequest, SeededDataset
from batteries.data.transport import PREFETCH_FACTOR, CopiedBatches, SharedBuffers

SECONDS_TO_LIVE = 10  # of a worker after SIGTERM, so that the main process can finish its step


def choose_num_workers(device: torch.device) -> int:
    """Choose the number of workers per rank.

    Returns:
        The CPU cores per process of the machine, 1 to 8, for a GPU; 0 for a CPU, because the model needs the cores.
    """
    if device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def make_loader(
    samples: SeededDataset,
    requests: list[SampleRequest],
    device: torch.device,
    num_workers: int | None,
    start_method: str | None,
) -> Iterable[Any]:
    """Build a loader that returns a batch for each request.

    Args:
        samples: The data set.
        requests: The batches; the list is read again at the start of each pass.
        device: For a GPU, batches are pinned.
        num_workers: The loader processes; None chooses their number.
        start_method: How they are started: fork, spawn, or None for the default.
    """
    workers = choose_num_workers(device) if num_workers is None else num_workers
    if workers < 0:
        raise UserError(f"--num-workers {workers} must be 0 or more.")
    if workers == 0 and device.type != "cuda":
        return InProcessLoader(samples, requests)
    if workers > 0 and multiprocessing.get_context(start_method).get_start_method() != "fork":
        _check_picklable(samples, workers)
    batches = DataLoader(
        samples,  # type: ignore[arg-type]
        batch_sampler=requests,  # type: ignore[arg-type]
        collate_fn=_identity,
        num_workers=workers,
        prefetch_factor=PREFETCH_FACTOR if workers else None,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        multiprocessing_context=start_method if workers else None,
        worker_init_fn=_WorkerInit() if workers else None,
        generator=torch.Generator(),  # without it each pass draws a seed from the global generator
    )
    is_pinned = device.type == "cuda"  # batches are copied to pinned memory
    return batches if is_pinned else CopiedBatches(batches)


def _check_picklable(samples: SeededDataset, workers: int) -> None:
    """Raise UserError if the data set or its transform cannot be sent to workers that are not forked.

    Tensors and arrays are left out, so that this takes neither time nor memory.
    """
    for name, value in (("transform", samples.transform), ("data set", samples.dataset)):
        try:
            _Pickler(_NullFile()).dump(value)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UserError(
                f"--num-workers {workers}: the {name} cannot be sent to worker processes ({error}); replace a lambda "
                "or a function inside a function by a function of a module or functools.partial, open files in "
                "__getitem__, or give --num-workers 0."
            ) from None
        except RuntimeError:  # a lock of multiprocessing, which can be sent only while a process starts
            continue


class _NullFile(io.RawIOBase):
    """A file that keeps nothing."""

    def write(self, data: Any) -> int:
        """Return the size of `data`."""
        return len(data)


class _Pickler(ForkingPickler):
    """The pickler of worker processes, without the contents of tensors and arrays."""

    def persistent_id(self, value: Any) -> str | None:
        """Return a placeholder for a tensor or an array of numbers."""
        is_array = isinstance(value, np.ndarray) and not value.dtype.hasobject
        return "values" if is_array or isinstance(value, torch.Tensor) else None


@dataclass(frozen=True)
class InProcessLoader:
    """Load batches in this process, with less overhead than a torch DataLoader without workers."""

    samples: SeededDataset
    requests: list[SampleRequest]

    def __iter__(self) -> Iterator[Any]:
        return map(self.samples.__getitems__, self.requests)


def _identity(batch: Any) -> Any:
    return batch


class _WorkerInit:
    """The initialisation of a worker process.

    A worker ignores the signals that ask the main process to save and exit, because it needs its data until then. It
    gets the sharing strategy of the main process; a spawned one would start with the default of torch. It sends its
    batches in its own shared memory.
    """

    def __init__(self) -> None:
        self.sharing_strategy = torch.multiprocessing.get_sharing_strategy()

    def __call__(self, worker: int) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if hasattr(signal, "alarm"):  # Python sends SIGTERM to remaining workers at exit, and waits for them
            signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_TO_LIVE))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the worker, whatever handler the main process has
        torch.multiprocessing.set_sharing_strategy(self.sharing_strategy)
        if (info := get_worker_info()) is not None:
            info.dataset.buffers = SharedBuffers()  # type: ignore[attr-defined]
