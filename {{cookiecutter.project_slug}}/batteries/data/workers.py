"""Worker processes of a loader."""

import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from batteries.core.errors import UserError
from batteries.core.signals import SIGNALS
from batteries.data.dataset import SampleRequest, SeededDataset


def choose_num_workers(device: torch.device) -> int:
    """With a GPU: the machine's cores over its processes, at most 8; on a CPU none: the model needs the cores."""
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
    """Batches for ready-made requests; the list is read anew at the start of each pass."""
    workers = choose_num_workers(device) if num_workers is None else num_workers
    if workers < 0:
        raise UserError(f"--num-workers {workers} must be 0 or more.")
    if workers == 0 and device.type != "cuda":
        return InProcessLoader(samples, requests)
    return DataLoader(
        samples,  # type: ignore[arg-type]
        batch_sampler=requests,  # type: ignore[arg-type]
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        multiprocessing_context=start_method if workers else None,
        worker_init_fn=_WorkerInit() if workers else None,
        generator=torch.Generator(),  # else each pass draws a seed from the global generator
    )


@dataclass(frozen=True)
class InProcessLoader:
    """What a torch DataLoader without workers gives, in less time: nothing to pin, and no profiler to tell."""

    samples: SeededDataset
    requests: list[SampleRequest]

    def __iter__(self) -> Iterator[Any]:
        return map(self.samples.__getitems__, self.requests)


def _as_it_is(batch: Any) -> Any:
    return batch


SECONDS_TO_LIVE = 10  # of a worker after SIGTERM: the main process finishes its step with it


class _WorkerInit:
    """What a worker does first. A signal to all processes reaches it as well, but the main one still needs its data.

    The sharing strategy is that of the process that made it; a spawned one would start with torch's default.
    """

    def __init__(self) -> None:
        self.sharing_strategy = torch.multiprocessing.get_sharing_strategy()

    def __call__(self, worker: int) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if hasattr(signal, "alarm"):  # python ends workers that are left over with SIGTERM, and waits for them
            signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_TO_LIVE))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # its end, whatever it is for the main process
        torch.multiprocessing.set_sharing_strategy(self.sharing_strategy)
