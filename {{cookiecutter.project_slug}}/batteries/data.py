"""From a data set to the batches of a step: the same bytes for any number of workers and processes.

An epoch's order is a permutation drawn from (seed, stage, epoch). It is cut into steps of `batch_size` samples, a step
into micro-batches, a micro-batch into one slice for each rank. Each sample draws its augmentation from a stream of
its own, keyed by its position in that order. So who loads a sample, and when, changes nothing.
"""

import math
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from batteries.errors import BadInput, is_bad_input
from batteries.interrupts import SIGNALS
from batteries.randomness import Stream, preserved_random_state, reseed, reseed_devices, stream_seeds
from batteries.ranks import rank, world_size

Transform = Callable[[Any, Any], tuple[Any, Any]]
# Mixes a batch (images, targets) on the device, each sample with the one before it alone (torchvision's MixUp and
# CutMix do), and draws for the batch, not for a sample.
Mixer = Callable[[Any, Any], tuple[Any, Any]]


class SampleSource(Protocol):
    """What experiment/dataset.py gives: an index becomes one (image, target).

    It may also have `get_batch(indices) -> (images, targets)`, which reads many samples at once; that is used where
    there is no transform, and must draw no random numbers.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Any, Any]: ...


class MicroBatch(NamedTuple):
    """What one rank pushes through at once, as positions [start, stop) in the order of the epoch."""

    start: int
    stop: int
    share: float  # weight of its mean loss, so that the sum over micro-batches and mean over ranks is the step's mean
    ends_step: bool


def cut_epoch(
    size: int,
    batch_size: int,
    accumulation_steps: int,
    rank: int,
    world_size: int,
    drop_last: bool,
    first_step: int = 0,
) -> Iterator[MicroBatch]:
    """The micro-batches of one rank, in order, from step `first_step` (counted from 0) on.

    A step is cut into micro-batches first and those into slices per rank: so micro-batch j holds the same samples for
    any `world_size`, and synchronised batch norm sees the same statistics. A short last
    step is cut as evenly as it goes, into fewer micro-batches where there is not a sample for each.
    """
    for step in range(first_step, count_steps(size, batch_size, drop_last)):
        begin, end = step * batch_size, min((step + 1) * batch_size, size)
        micro_batches = min(accumulation_steps, (end - begin) // world_size)
        pieces = micro_batches * world_size
        for index in range(micro_batches):
            piece = index * world_size + rank
            start = begin + (end - begin) * piece // pieces
            stop = begin + (end - begin) * (piece + 1) // pieces
            share = (stop - start) * world_size / (end - begin)
            yield MicroBatch(start, stop, share, ends_step=index == micro_batches - 1)


def count_steps(size: int, batch_size: int, drop_last: bool) -> int:
    """Optimizer steps in one pass over `size` samples."""
    return size // batch_size if drop_last else -(-size // batch_size)


class Request(NamedTuple):
    """What a worker is asked for: samples by index, and one seed each; none where nothing is drawn."""

    indices: np.ndarray
    seeds: np.ndarray | None


@dataclass(frozen=True)
class Refusal:
    """What a worker sends instead of a batch where the data are bad."""

    sentence: str


class Samples:
    """A data set as the loader reads it: by whole batches, each sample under its own random stream."""

    def __init__(self, dataset: SampleSource, transform: Transform | None) -> None:
        self.dataset = dataset
        self.transform = transform
        self._get_batch = getattr(dataset, "get_batch", None) if transform is None else None

    def __len__(self) -> int:
        return len(self.dataset)

    def make_seeds(self, count: int, *key: int) -> np.ndarray | None:
        """The seeds of `count` samples in an epoch; none where they are read by whole batches, which draw nothing."""
        return None if self._get_batch is not None else stream_seeds(count, *key, Stream.SAMPLE)

    def __getitems__(self, request: Request) -> Any:
        """A collated batch; torch's fetcher calls this with whatever the batch sampler gave.

        A Refusal where the user has to mend something: torch would send an error of a worker as a page of text.
        """
        try:
            return self._load(request)
        except Exception as error:
            if is_bad_input(error):
                return Refusal(str(error))
            raise

    def _load(self, request: Request) -> Any:
        if self._get_batch is not None:
            return self._get_batch(request.indices)
        assert request.seeds is not None
        with preserved_random_state():
            pairs = zip(request.indices.tolist(), request.seeds.tolist(), strict=True)
            samples = [self._sample(index, seed) for index, seed in pairs]
        self._check_shapes(samples, request.indices)
        return default_collate(samples)

    def _check_shapes(self, samples: Sequence[tuple[Any, Any]], indices: np.ndarray) -> None:
        """Raise BadInput where images of one batch differ in shape."""
        shapes = [tuple(getattr(image, "shape", ())) for image, _ in samples]
        if len(set(shapes)) == 1:
            return
        place = next(place for place, shape in enumerate(shapes) if shape != shapes[0])
        ids = getattr(self.dataset, "ids", range(len(self.dataset)))
        raise BadInput(
            f"images of one batch have different shapes: {shapes[0]} of {ids[int(indices[0])]} and {shapes[place]} of "
            f"{ids[int(indices[place])]}; bring all to one size, such as by v2.Resize in experiment/augmentations.py."
        )

    def _sample(self, index: int, seed: int) -> tuple[Any, Any]:
        reseed(seed)
        sample = self.dataset[index]
        return sample if self.transform is None else self.transform(*sample)


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its device. `share` weighs its loss; `seed` is the stream of what the model draws."""

    images: Any
    targets: Any
    share: float
    ends_step: bool
    seed: int

    def weigh(self, loss: torch.Tensor) -> torch.Tensor:
        """`loss` (a mean over the micro-batch) by its share: the micro-batches of a step add up to the mean over it.

        A loss that is not finite makes NaN of all gradients of the step, on all ranks: it is skipped as a whole.
        """
        if loss.device.type != "cpu":
            return loss * (self.share + 0.0 * loss.detach())  # nothing waits for the device
        share = self.share if math.isfinite(loss.detach()) else math.nan
        return loss if share == 1 else loss * share


class TrainLoader:
    """Micro-batches for training, by promise L0; `len()` is the number of optimizer steps in an epoch.

    `batch_size` counts the samples of one optimizer step over all ranks and micro-batches. Raises BadInput where it
    does not divide, and where `indices` do not fill one step.

    With a `mixer` each sample is mixed with the one before it in its step (the first with the last), by one draw a
    step. A rank loads one sample more for that, so that mixed batches follow L0 too, whatever the accumulation.
    """

    def __init__(
        self,
        dataset: SampleSource,
        indices: Sequence[int] | np.ndarray,
        transform: Transform | None,
        device: torch.device,
        *,
        seed: int,
        batch_size: int,
        accumulation_steps: int = 1,
        drop_last: bool = True,
        limit_batches: int | None = None,
        num_workers: int | None = 0,
        start_method: str | None = None,
        mixer: Mixer | None = None,
    ) -> None:
        check_batch_size(batch_size, accumulation_steps, len(indices), drop_last)
        self.indices = np.asarray(indices)
        self.ids = getattr(dataset, "ids", None)
        self.batch_size = batch_size
        self.device = device
        self.seed = seed
        self.mixer = mixer
        steps = count_steps(len(indices), batch_size, drop_last)
        self.size = len(indices) if limit_batches is None else min(len(indices), limit_batches * batch_size)
        self.steps = min(steps, limit_batches or steps)
        self.cutting = batch_size, accumulation_steps, rank(), world_size(), drop_last
        tail = self.size % batch_size if not drop_last else 0
        self.smallest_micro_batch = min(
            size // (min(accumulation_steps, size // world_size()) * world_size())
            for size in (batch_size, tail)
            if size
        )
        self.requests: list[Request] = []
        self.samples = Samples(dataset, transform)
        self.batches = _make_loader(self.samples, self.requests, device, num_workers, start_method)

    def __len__(self) -> int:
        return self.steps

    def epoch(self, stage: int, epoch: int, first_step: int = 0) -> "Epoch":
        """The micro-batches of one epoch from `first_step` (counted from 0) on; nothing before it is loaded."""
        return Epoch(self, (self.seed, stage, epoch), first_step)


class Epoch:
    """One pass over the train split, as an iterable of micro-batches; `len()` is the number of its optimizer steps."""

    def __init__(self, loader: TrainLoader, key: tuple[int, int, int], first_step: int) -> None:
        self.loader = loader
        self.key = key
        self.first_step = first_step
        self.order = loader.indices[_permutation(len(loader.indices), *key)]
        self.sample_seeds = loader.samples.make_seeds(loader.size, *key)

    def __len__(self) -> int:
        return len(self.loader)

    def samples_of(self, step: int) -> list[str]:
        """The ids of the samples of one step (counted from 1) over all ranks; their indices where there are no ids."""
        size, ids = self.loader.batch_size, self.loader.ids
        return [str(index if ids is None else ids[index]) for index in self.order[(step - 1) * size : step * size]]

    def __iter__(self) -> Iterator[Batch]:
        loader = self.loader
        model_seeds = stream_seeds(len(loader), *self.key, Stream.MODEL).tolist()
        mixing_seeds = stream_seeds(len(loader), *self.key, Stream.MIXING).tolist()
        cuts = list(cut_epoch(loader.size, *loader.cutting, self.first_step))
        loader.requests[:] = [self._request(cut.start, cut.stop) for cut in cuts]
        for cut, loaded in zip(cuts, loader.batches, strict=True):
            step, place = divmod(cut.start, loader.batch_size)
            images, targets = self._receive(loaded, mixing_seeds[step])
            yield Batch(images, targets, cut.share, cut.ends_step, seed=(model_seeds[step] + place) % 2**64)

    def peek(self, count: int) -> tuple[list[Any], Any, Any]:
        """The first `count` samples of the epoch: as the data set has them, and their images and targets in training.

        They are loaded in this process, and nothing of the epoch is used up.
        """
        count = min(count, self.loader.batch_size, self.loader.size)
        seed = int(stream_seeds(1, *self.key, Stream.MIXING)[0])
        with preserved_random_state():
            originals = [self.loader.samples.dataset[index][0] for index in self.order[:count].tolist()]
        return originals, *self._receive(self.loader.samples.__getitems__(self._request(0, count)), seed)

    def sample(self, index: int) -> tuple[Any, Any]:
        """(image, target) of the sample `index` of the data set as this epoch augments it, before any mixing."""
        [position] = np.flatnonzero(self.order == index)
        images, targets = receive(
            self.loader.samples.__getitems__(self._plain(np.array([position]))), self.loader.device
        )
        return images[0], targets[0]

    def _plain(self, positions: np.ndarray | slice) -> Request:
        seeds = None if self.sample_seeds is None else self.sample_seeds[positions]
        return Request(self.order[positions], seeds)

    def _request(self, start: int, stop: int) -> Request:
        """Positions [start, stop) of the order; where samples are mixed, after the one before them in their step."""
        if self.loader.mixer is None:
            return self._plain(slice(start, stop))
        begin = start - start % self.loader.batch_size
        end = min(begin + self.loader.batch_size, self.loader.size)
        return self._plain(np.append(start - 1 if start > begin else end - 1, np.arange(start, stop)))

    def _receive(self, loaded: Any, seed: int) -> tuple[Any, Any]:
        """What was loaded, on the device, and mixed under the stream `seed` of its step."""
        images, targets = receive(loaded, self.loader.device)
        if self.loader.mixer is None:
            return images, targets
        with preserved_random_state():
            reseed(seed)
            reseed_devices(seed)
            images, targets = self.loader.mixer(images, targets)
        return images[1:], targets[1:]  # the first was there for the second alone


class EvalLoader:
    """Every sample exactly once, in order, over all ranks: batch j goes to rank j modulo the number of ranks.

    Whole batches are dealt out, so that each has the same samples, and the model gives the same bits, for any world
    size. Gives (images, targets); `size` is the number of samples over all ranks.
    """

    def __init__(
        self,
        dataset: SampleSource,
        indices: Sequence[int] | np.ndarray,
        transform: Transform | None,
        device: torch.device,
        *,
        batch_size: int,
        limit_batches: int | None = None,
        num_workers: int | None = 0,
        start_method: str | None = None,
    ) -> None:
        assert batch_size > 0
        indices = np.asarray(indices)
        starts = range(0, len(indices), batch_size)[:limit_batches]
        self.size = min(len(indices), len(starts) * batch_size)
        self.device = device
        # Evaluation draws from streams as well, one for each sample, so that a random transform cannot make it vary.
        samples = Samples(dataset, transform)
        seeds = samples.make_seeds(len(indices))
        mine = [slice(start, start + batch_size) for start in starts[rank() :: world_size()]]
        requests = [Request(indices[part], None if seeds is None else seeds[part]) for part in mine]
        self.batches = _make_loader(samples, requests, device, num_workers, start_method)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for loaded in self.batches:
            images, targets = receive(loaded, self.device)
            yield images, targets


def check_batch_size(batch_size: int, accumulation_steps: int, size: int, drop_last: bool) -> None:
    """Raise BadInput where `batch_size` does not divide over ranks and micro-batches, or is over `size`."""
    ranks = world_size()
    assert accumulation_steps > 0
    pieces = ranks * accumulation_steps
    if batch_size < 1 or batch_size % pieces:
        below, above = batch_size // pieces * pieces, (batch_size // pieces + 1) * pieces
        legal = f"{below} or {above}" if below > 0 else f"{pieces}"
        raise BadInput(
            f"--batch-size {batch_size} must be a multiple of {pieces} "
            f"({ranks} process{'es' * (ranks > 1)} x {accumulation_steps} accumulation steps); the nearest: {legal}."
        )
    if drop_last and size < batch_size:
        raise BadInput(
            f"--batch-size {batch_size} does not fit: the train split has {size} samples; "
            f"use --batch-size {max(size // pieces * pieces, pieces)} or less, or --no-drop-last."
        )
    if not drop_last and 0 < size % batch_size < ranks:
        raise BadInput(
            f"--batch-size {batch_size} leaves {size % batch_size} samples for the last step of an epoch, "
            f"fewer than the {ranks} processes; use --drop-last or another --batch-size."
        )


def receive(loaded: Any, device: torch.device) -> tuple[Any, Any]:
    """(images, targets) as a worker sent them, on `device`. Raises BadInput with what it had to say instead."""
    if isinstance(loaded, Refusal):
        raise BadInput(loaded.sentence)
    images, targets = loaded
    return to_device(images, device), to_device(targets, device)


def to_device(data: Any, device: torch.device) -> Any:
    """`data` (a tensor, or tensors in lists, tuples and dicts) on `device`; the copy overlaps with work on a GPU."""
    if isinstance(data, torch.Tensor):
        return data.to(device, non_blocking=True)
    if isinstance(data, dict):
        return {name: to_device(value, device) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(to_device(value, device) for value in data)
    return data


def choose_num_workers(device: torch.device) -> int:
    """With a GPU: the machine's cores over its processes, at most 8; on a CPU none: the model needs the cores."""
    if device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _permutation(size: int, *key: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((*key, Stream.ORDER)))).permutation(size)


def _make_loader(
    samples: Samples, requests: list[Request], device: torch.device, num_workers: int | None, start_method: str | None
) -> Iterable[Any]:
    """Batches for ready-made requests; the list is read anew at the start of each pass."""
    workers = choose_num_workers(device) if num_workers is None else num_workers
    if workers < 0:
        raise BadInput(f"--num-workers {workers} must be 0 or more.")
    if workers == 0 and device.type != "cuda":
        return InThisProcess(samples, requests)
    return DataLoader(
        samples,  # type: ignore[arg-type]
        batch_sampler=requests,  # type: ignore[arg-type]
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        multiprocessing_context=start_method if workers else None,
        worker_init_fn=_WorkerStart() if workers else None,
        generator=torch.Generator(),  # else each pass draws a seed from the global generator
    )


@dataclass(frozen=True)
class InThisProcess:
    """What a torch DataLoader without workers gives, in less time: nothing to pin, and no profiler to tell."""

    samples: Samples
    requests: list[Request]

    def __iter__(self) -> Iterator[Any]:
        return map(self.samples.__getitems__, self.requests)


def _as_it_is(batch: Any) -> Any:
    return batch


def explain_lost_worker(error: BaseException) -> str | None:
    """Why a loader's worker is gone, and what helps, in one sentence; None where `error` says nothing of that."""
    text = str(error)
    if re.search(r"Too many open files|ancdata", text):
        return (
            "too many files are open, since each batch that a worker sends takes one: use --sharing-strategy "
            "file_system, fewer --num-workers, or a higher limit (ulimit -n)."
        )
    if re.search(r"shared memory|\(shm\)|bus error|shm_open|torch_shm_manager", text, re.IGNORECASE):
        return (
            "the loader's workers have no shared memory left (/dev/shm; in a container it is small): use fewer "
            "--num-workers, another --sharing-strategy, or more of it (docker run --shm-size)."
        )
    if lost := re.search(
        r"DataLoader worker \(pid\S* ([\d, ]+)\) (is killed by signal: \w+|exited unexpectedly)", text
    ):
        return (
            f"a loader's worker (process {lost[1]}) {lost[2].replace('is killed by signal:', 'was ended by signal')}: "
            "most often memory is short: use fewer --num-workers, or 0 to see an error of its own. If shared memory is "
            "short, another --sharing-strategy helps; after a segmentation fault it may be a damaged file."
        )
    return None


SECONDS_TO_LIVE = 10  # of a worker after SIGTERM: the main process finishes its step with it


class _WorkerStart:
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
