"""Loaders for training and evaluation."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from batteries.core.ranks import rank, world_size
from batteries.core.seeding import Stream, preserved_random_state, reseed, reseed_devices, stream_seeds
from batteries.data.batch_plan import check_batch_size, count_steps, epoch_permutation, plan_epoch
from batteries.data.dataset import Mixer, SampleRequest, Samples, SeededDataset, Transform, receive
from batteries.data.workers import make_loader


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its device. `share` weighs its loss; `seed` is the stream of what the model draws."""

    images: Any
    targets: Any
    loss_weight: float
    ends_step: bool
    seed: int

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """`loss` (a mean over the micro-batch) by its share: the micro-batches of a step add up to the mean over it.

        A loss that is not finite makes NaN of all gradients of the step, on all ranks: it is skipped as a whole.
        """
        if loss.device.type != "cpu":
            return loss * (self.loss_weight + 0.0 * loss.detach())  # nothing waits for the device
        loss_weight = self.loss_weight if math.isfinite(loss.detach()) else math.nan
        return loss if loss_weight == 1 else loss * loss_weight


class TrainLoader:
    """Micro-batches for training, by promise L0; `len()` is the number of optimizer steps in an epoch.

    `batch_size` counts the samples of one optimizer step over all ranks and micro-batches. Raises BadInput where it
    does not divide, and where `indices` do not fill one step.

    With a `mixer` each sample is mixed with the one before it in its step (the first with the last), by one draw a
    step. A rank loads one sample more for that, so that mixed batches follow L0 too, whatever the accumulation.
    """

    def __init__(
        self,
        dataset: Samples,
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
        self.requests: list[SampleRequest] = []
        self.samples = SeededDataset(dataset, transform)
        self.batches = make_loader(self.samples, self.requests, device, num_workers, start_method)

    def __len__(self) -> int:
        return self.steps

    def epoch(self, stage: int, epoch: int, first_step: int = 0) -> "EpochBatches":
        """The micro-batches of one epoch from `first_step` (counted from 0) on; nothing before it is loaded."""
        return EpochBatches(self, (self.seed, stage, epoch), first_step)


class EpochBatches:
    """One pass over the train split, as an iterable of micro-batches; `len()` is the number of its optimizer steps."""

    def __init__(self, loader: TrainLoader, key: tuple[int, int, int], first_step: int) -> None:
        self.loader = loader
        self.key = key
        self.first_step = first_step
        self.order = loader.indices[epoch_permutation(len(loader.indices), *key)]
        self.sample_seeds = loader.samples.make_seeds(loader.size, *key)

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def epoch(self) -> int:
        """The epoch, from 1."""
        return self.key[2]

    def samples_of(self, step: int) -> list[str]:
        """The ids of the samples of one step (counted from 1) over all ranks; their indices where there are no ids."""
        size, ids = self.loader.batch_size, self.loader.ids
        return [str(index if ids is None else ids[index]) for index in self.order[(step - 1) * size : step * size]]

    def __iter__(self) -> Iterator[Batch]:
        loader = self.loader
        model_seeds = stream_seeds(len(loader), *self.key, Stream.MODEL).tolist()
        mixing_seeds = stream_seeds(len(loader), *self.key, Stream.MIXING).tolist()
        cuts = list(plan_epoch(loader.size, *loader.cutting, self.first_step))
        loader.requests[:] = [self._request(cut.start, cut.stop) for cut in cuts]
        for cut, loaded in zip(cuts, loader.batches, strict=True):
            step, place = divmod(cut.start, loader.batch_size)
            images, targets = self._receive(loaded, mixing_seeds[step])
            yield Batch(images, targets, cut.loss_weight, cut.ends_step, seed=(model_seeds[step] + place) % 2**64)

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

    def _plain(self, positions: np.ndarray | slice) -> SampleRequest:
        seeds = None if self.sample_seeds is None else self.sample_seeds[positions]
        return SampleRequest(self.order[positions], seeds)

    def _request(self, start: int, stop: int) -> SampleRequest:
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
        dataset: Samples,
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
        samples = SeededDataset(dataset, transform)
        seeds = samples.make_seeds(len(indices))
        mine = [slice(start, start + batch_size) for start in starts[rank() :: world_size()]]
        requests = [SampleRequest(indices[part], None if seeds is None else seeds[part]) for part in mine]
        self.batches = make_loader(samples, requests, device, num_workers, start_method)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for loaded in self.batches:
            images, targets = receive(loaded, self.device)
            yield images, targets
