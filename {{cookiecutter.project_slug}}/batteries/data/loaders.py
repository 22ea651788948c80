"""Loaders for training and evaluation."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from batteries.core.ranks import rank, world_size
from batteries.core.seeding import Stream, preserved_random_state, reseed, reseed_devices, stream_seeds
from batteries.data.batch_plan import (
    MicroBatch,
    check_batch_size,
    count_steps,
    plan_epoch,
    plan_shards,
    smallest_micro_batch,
)
from batteries.data.class_weights import find_class_weights
from batteries.data.dataset import Mixer, SampleRequest, Samples, SeededDataset, Transform, dataset_info, receive
from batteries.data.sampling import Sampling, balance_classes, epoch_order
from batteries.data.workers import make_loader


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its device.

    Attributes:
        images: The images of the micro-batch.
        targets: Their targets.
        loss_weight: The weight of its loss in the mean loss of the step.
        ends_step: Whether it is the last micro-batch of its optimizer step.
        seed: The seed of what the model draws, such as dropout.
        step_seed: The seed of what the optimizer draws, equal for all ranks.
    """

    images: Any
    targets: Any
    loss_weight: float
    ends_step: bool
    seed: int
    step_seed: int

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Weight the loss of the micro-batch, so that the losses of a step add up to the mean loss of the step.

        A loss that is not finite makes all gradients of the step NaN on all ranks, so that the whole step is skipped.

        Args:
            loss: The mean loss of the micro-batch, shape ().
        """
        if loss.device.type != "cpu":
            return loss * (self.loss_weight + 0.0 * loss.detach())  # without waiting for the device
        loss_weight = self.loss_weight if math.isfinite(loss.detach()) else math.nan
        return loss if loss_weight == 1 else loss * loss_weight


class TrainLoader:
    """Load micro-batches for training. `len()` is the number of optimizer steps in an epoch.

    The samples of each step, augmentations included, are bit-identical for any number of workers, start method, number
    of ranks and accumulation steps. With a `mixer`, each sample is mixed with the one before it in its step (the first
    with the last), with one draw per step; each micro-batch is loaded with one additional sample for that.

    With `shards`, each micro-batch is a shard: the micro-batches are the same for any number of ranks, with any
    `accumulation_steps`, and a shard is mixed within itself.

    Args:
        dataset: The data set.
        indices: The samples of the train split, shape (N,).
        transform: Applied to each sample.
        device: Where the batches are moved to.
        seed: The seed of the run.
        batch_size: The samples of one optimizer step, over all ranks and micro-batches.
        accumulation_steps: The micro-batches of one optimizer step.
        shards: The shards of one optimizer step, or None.
        sampling: `shuffled`, each sample once in an epoch, or `balanced`, all classes equally often.
        class_weights: `balanced`, or a CSV file with the columns class and weight; None for none.
        drop_last: Skip the short last step of an epoch.
        limit_batches: The maximum number of steps in an epoch.
        num_workers: The loader processes per rank; None chooses it for the machine.
        start_method: How worker processes are started: fork, spawn, or None for the default.
        mixer: Mixes the samples of a step on the device.

    Attributes:
        class_weights: The weights of classes for the loss, float32, shape (C,), or (2, C) for labels; or None.

    Raises:
        UserError: If `batch_size` is not divisible by ranks and micro-batches or by shards, or larger than the split.
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
        shards: int | None = None,
        sampling: Sampling = "shuffled",
        class_weights: str | None = None,
        drop_last: bool = True,
        limit_batches: int | None = None,
        num_workers: int | None = 0,
        start_method: str | None = None,
        mixer: Mixer | None = None,
    ) -> None:
        check_batch_size(batch_size, accumulation_steps, len(indices), drop_last, shards)
        self.indices = np.asarray(indices)
        self.ids = dataset_info(dataset).ids
        self.balance = balance_classes(dataset, self.indices) if sampling == "balanced" else None
        self.class_weights = find_class_weights(class_weights, dataset, self.indices)
        self.batch_size = batch_size
        self.accumulation_steps = accumulation_steps
        self.shards = shards
        self.drop_last = drop_last
        self.device = device
        self.seed = seed
        self.mixer = mixer
        self.rank = rank()
        self.world_size = world_size()
        steps = count_steps(len(indices), batch_size, drop_last)
        self.size = len(indices) if limit_batches is None else min(len(indices), limit_batches * batch_size)
        self.steps = min(steps, limit_batches or steps)
        self.smallest_micro_batch = smallest_micro_batch(
            self.size, batch_size, accumulation_steps, self.world_size, drop_last, shards
        )
        self.requests: list[SampleRequest] = []  # of the current epoch; the loader reads this list
        self.samples = SeededDataset(dataset, transform)
        self.batches = make_loader(self.samples, self.requests, device, num_workers, start_method)

    def __len__(self) -> int:
        return self.steps

    def plan(self, first_step: int) -> list[MicroBatch]:
        """Return the micro-batches of an epoch on this rank, from `first_step` (counted from 0)."""
        plan, parts = (plan_epoch, self.accumulation_steps) if self.shards is None else (plan_shards, self.shards)
        return list(plan(self.size, self.batch_size, parts, self.rank, self.world_size, self.drop_last, first_step))

    def epoch(self, stage: int, epoch: int, first_step: int = 0) -> "EpochBatches":
        """Return the micro-batches of one epoch from `first_step` (counted from 0); nothing before it is loaded."""
        return EpochBatches(self, (self.seed, stage, epoch), first_step)


class EpochBatches:
    """One pass over the train split, as an iterable of micro-batches.

    `len()` is the number of optimizer steps in the whole epoch.

    Args:
        loader: The loader.
        key: The seed of the run, the stage (from 0) and the epoch (from 1).
        first_step: The step to start from, counted from 0.
    """

    def __init__(self, loader: TrainLoader, key: tuple[int, int, int], first_step: int) -> None:
        self.loader = loader
        self.key = key
        self.first_step = first_step
        self.order = loader.indices[epoch_order(len(loader.indices), loader.balance, *key)]
        self.sample_seeds = loader.samples.make_seeds(loader.size, *key)

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def epoch(self) -> int:
        """The epoch, from 1."""
        return self.key[2]

    @property
    def class_weights(self) -> torch.Tensor | None:
        """The weights of classes for the loss, on the CPU."""
        return self.loader.class_weights

    @property
    def device(self) -> torch.device:
        """The device of the batches."""
        return self.loader.device

    def samples_of(self, step: int) -> list[str]:
        """Return the ids, or else the indices, of the samples of one step (counted from 1) over all ranks."""
        size = self.loader.batch_size
        ids = self.loader.ids
        return [str(index if ids is None else ids[index]) for index in self.order[(step - 1) * size : step * size]]

    def __iter__(self) -> Iterator[Batch]:
        loader = self.loader
        model_seeds = stream_seeds(len(loader), *self.key, Stream.MODEL).tolist()
        mixing_seeds = stream_seeds(len(loader), *self.key, Stream.MIXING).tolist()
        plan = loader.plan(self.first_step)
        loader.requests[:] = [self._request(micro_batch.start, micro_batch.stop) for micro_batch in plan]
        for micro_batch, loaded in zip(plan, loader.batches, strict=True):
            step, offset = divmod(micro_batch.start, loader.batch_size)
            images, targets = self._receive(loaded, _mixing_seed(mixing_seeds[step], offset, loader))
            seed = (model_seeds[step] + offset) % 2**64
            step_seed = (model_seeds[step] + loader.batch_size) % 2**64  # after those of all micro-batches
            yield Batch(images, targets, micro_batch.loss_weight, micro_batch.ends_step, seed, step_seed)

    def peek(self, count: int) -> tuple[list[Any], Any, Any]:
        """Load the first samples of the epoch in this process; the epoch itself is not changed.

        Args:
            count: The number of samples, limited to one step.

        Returns:
            The images as the data set returns them, and the images and targets as training gets them.
        """
        count = min(count, self.loader.batch_size, self.loader.size)
        seed = int(stream_seeds(1, *self.key, Stream.MIXING)[0])
        with preserved_random_state():
            originals = [self.loader.samples.dataset[index][0] for index in self.order[:count].tolist()]
        if self.loader.mixer is None or self.loader.shards is None:
            images, targets = self._receive(self.loader.samples.__getitems__(self._request(0, count)), seed)
            return originals, images, targets
        images, targets = zip(*self._mixed_shards(count, seed), strict=True)
        return originals, torch.cat(images)[:count], torch.cat(targets)[:count]

    def sample(self, index: int) -> tuple[Any, Any]:
        """Return (image, target) of the sample `index` of the data set, as this epoch augments it, before mixing."""
        position = np.flatnonzero(self.order == index)[0]
        loaded = self.loader.samples.__getitems__(self._request_positions(np.array([position])))
        images, targets = receive(loaded, self.loader.device)
        return images[0], targets[0]

    def _mixed_shards(self, count: int, seed: int) -> Iterator[tuple[Any, Any]]:
        """Load the shards of the first step that have its first `count` samples; `seed` is that of the step."""
        loader = self.loader
        for shard in plan_shards(loader.size, loader.batch_size, loader.shards or 1, 0, 1, drop_last=False):
            if shard.start >= count:
                return
            loaded = loader.samples.__getitems__(self._request(shard.start, shard.stop))
            yield self._receive(loaded, _mixing_seed(seed, shard.start, loader))

    def _request_positions(self, positions: np.ndarray | slice) -> SampleRequest:
        seeds = None if self.sample_seeds is None else self.sample_seeds[positions]
        return SampleRequest(self.order[positions], seeds)

    def _request(self, start: int, stop: int) -> SampleRequest:
        """Request positions [start, stop) of the order; for mixing, the one before them in their step comes first.

        A shard is mixed within itself and needs no other sample.
        """
        if self.loader.mixer is None or self.loader.shards is not None:
            return self._request_positions(slice(start, stop))
        begin = start - start % self.loader.batch_size
        end = min(begin + self.loader.batch_size, self.loader.size)
        previous = start - 1 if start > begin else end - 1
        return self._request_positions(np.append(previous, np.arange(start, stop)))

    def _receive(self, loaded: Any, seed: int) -> tuple[Any, Any]:
        """Move a batch to the device and mix it under `seed`, the random stream of its step or shard."""
        images, targets = receive(loaded, self.loader.device)
        if self.loader.mixer is None:
            return images, targets
        with preserved_random_state():
            reseed(seed)
            reseed_devices(seed)
            images, targets = self.loader.mixer(images, targets)
        if self.loader.shards is not None:
            return images, targets
        return images[1:], targets[1:]  # the first was loaded only to be mixed into the second


def _mixing_seed(seed_of_step: int, offset: int, loader: TrainLoader) -> int:
    """Return the seed for mixing the micro-batch that begins `offset` samples after its step: one for each shard."""
    return seed_of_step if loader.shards is None else (seed_of_step + offset) % 2**64


class EvalLoader:
    """Load every sample exactly once, in order, over all ranks: rank r gets batches r, r + world size, and so on.

    Ranks get whole batches, so each batch has the same samples, and the model returns the same bits, for any world
    size. Iteration yields (images, targets), and seeds the random numbers that the model draws for each batch.

    Args:
        dataset: The data set.
        indices: The samples to load, shape (N,).
        transform: Applied to each sample.
        device: Where the batches are moved to.
        batch_size: The samples of a batch.
        limit_batches: The maximum number of batches over all ranks.
        num_workers: The loader processes per rank; None chooses it for the machine.
        start_method: How worker processes are started: fork, spawn, or None for the default.

    Attributes:
        size: The number of samples over all ranks.
        classes: The classes of the data set; empty if it has none.
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
        self.classes = tuple(dataset_info(dataset).classes or ())
        self.device = device
        samples = SeededDataset(dataset, transform)
        # Each sample has a random stream here too, so that evaluation with a random transform is reproducible.
        seeds = samples.make_seeds(len(indices))
        self.model_seeds = stream_seeds(len(starts), Stream.MODEL)[rank() :: world_size()].tolist()
        requests = []
        for start in starts[rank() :: world_size()]:
            positions = slice(start, start + batch_size)
            requests.append(SampleRequest(indices[positions], None if seeds is None else seeds[positions]))
        self.batches = make_loader(samples, requests, device, num_workers, start_method)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        with preserved_random_state():
            for seed, loaded in zip(self.model_seeds, self.batches, strict=True):
                batch = receive(loaded, self.device)
                reseed(seed)
                reseed_devices(seed)
                yield batch
