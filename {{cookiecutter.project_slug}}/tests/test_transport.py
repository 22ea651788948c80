"""Batches of workers arrive unchanged, although a worker sends them in the same memory again."""

import itertools
import multiprocessing
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from processes import wait_until

from batteries.data.loaders import EvalLoader, TrainLoader
from batteries.data.transport import BUFFERS, PREFETCH_FACTOR, CopiedBatches, SharedBuffers, map_tensors

SIZE = 60
BATCH_SIZE = 4
WORKERS = 2


class Numbered:
    """Images of which each pixel is the number of the sample; it counts the samples that were read."""

    classes = ("one", "two")

    def __init__(self, kind: str = "tensor") -> None:
        self.kind = kind
        self.ids = [f"sample{index}" for index in range(SIZE)]
        self.targets = np.arange(SIZE) % 2
        self.read = multiprocessing.Value("i", 0)

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        with self.read.get_lock():
            self.read.value += 1
        image = torch.full((3, 5, 7), index, dtype=torch.uint8)
        if self.kind == "channels last":
            image = torch.full((5, 7, 3), index, dtype=torch.uint8).permute(2, 0, 1)
        if self.kind == "array":
            return image.numpy(), np.float32(index)
        if self.kind == "masks":
            return image, {"mask": torch.full((5, 7), index), "name": str(index), "pair": (index, 0.5)}
        return image, torch.tensor(index % 2)


class Batches(Numbered):
    """The same samples, which are read in batches."""

    def get_batch(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.as_tensor(indices, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 5, 7)
        return images, torch.as_tensor(indices) % 2


def make_loader(dataset: Any, num_workers: int = WORKERS, batch_size: int = BATCH_SIZE) -> EvalLoader:
    device = torch.device("cpu")
    return EvalLoader(dataset, np.arange(SIZE), None, device, batch_size=batch_size, num_workers=num_workers)


def assert_equal(batch: Any, expected: Any) -> None:
    """Assert that two batches have the same values, types and orders in memory."""
    assert type(batch) is type(expected)
    if isinstance(batch, torch.Tensor):
        assert torch.equal(batch, expected)
        assert (batch.dtype, batch.stride()) == (expected.dtype, expected.stride())
    elif isinstance(batch, dict):
        assert batch.keys() == expected.keys()
        for name in batch:
            assert_equal(batch[name], expected[name])
    elif isinstance(batch, list | tuple):
        for value, other in zip(batch, expected, strict=True):
            assert_equal(value, other)
    else:
        assert batch == expected


@pytest.fixture(params=["file_system", "file_descriptor"])
def sharing_strategy(request) -> Iterator[str]:
    """Each of torch's ways to share memory between processes; train.py uses the first one."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(request.param)
    yield request.param
    torch.multiprocessing.set_sharing_strategy(before)


@pytest.mark.usefixtures("sharing_strategy")
@pytest.mark.parametrize("make", [Numbered, Batches])
@pytest.mark.parametrize("kind", ["tensor", "channels last", "array", "masks"])
@pytest.mark.parametrize("batch_size", [4, 7])  # 7: the last batch is smaller
def test_batches_that_are_kept_equal_those_without_workers(make, kind, batch_size):
    kept = list(make_loader(make(kind), batch_size=batch_size))
    assert_equal(kept, list(make_loader(make(kind), num_workers=0, batch_size=batch_size)))


@pytest.mark.usefixtures("sharing_strategy")
def test_a_batch_is_not_overwritten_before_the_next_one_is_requested():
    dataset = Numbered()
    loader = make_loader(dataset)
    assert isinstance(loader.batches, CopiedBatches)
    total = SIZE // BATCH_SIZE
    for number, (images, _) in enumerate(loader.batches.batches):  # not copied
        requested = min(total, number + 1 + WORKERS * PREFETCH_FACTOR)
        wait_until(lambda count=requested: dataset.read.value == count * BATCH_SIZE, "the workers read in advance")
        expected = torch.arange(number * BATCH_SIZE, (number + 1) * BATCH_SIZE)
        assert torch.equal(images[:, 0, 0, 0], expected.to(torch.uint8))


@pytest.mark.usefixtures("sharing_strategy")
def test_an_abandoned_epoch_leaves_nothing_to_the_next_one():
    dataset = Numbered()
    loader = make_loader(dataset)
    expected = list(make_loader(dataset, num_workers=0))
    for taken in (1, 3, 0, 5):
        begun = list(itertools.islice(loader, taken))
        assert_equal(begun, expected[:taken])
        assert_equal(list(loader), expected)


@pytest.mark.usefixtures("sharing_strategy")
@pytest.mark.parametrize("kind", ["tensor", "channels last", "array", "masks"])
def test_all_batches_of_a_worker_are_in_the_same_memory(kind):
    loader = make_loader(Numbered(kind))
    assert isinstance(loader.batches, CopiedBatches)
    sent: list[Any] = []  # while they exist, no two buffers have one address
    places = set()
    for batch in loader.batches.batches:
        map_tensors(batch[0], lambda tensor: sent.append(tensor) or tensor)
        places.add(sent[-1].untyped_storage().data_ptr())
    assert len(sent) == SIZE // BATCH_SIZE
    assert len(places) == WORKERS * BUFFERS


def test_the_memory_of_a_batch_is_used_again():
    buffers = SharedBuffers()
    places = set()
    for number in range(4 * BUFFERS):
        buffers.start_batch()
        images = buffers.stack([torch.full((3, 4), number)] * 5)
        targets = buffers.place(torch.full((5,), number))
        assert images.is_shared()
        assert targets.is_shared()
        assert (images == number).all()
        assert (targets == number).all()
        places |= {images.untyped_storage().data_ptr(), targets.untyped_storage().data_ptr()}
    assert len(places) == 2 * BUFFERS


def test_a_larger_batch_gets_more_memory():
    buffers = SharedBuffers()
    for size in (1, 9, 4):
        for _ in range(2 * BUFFERS):
            buffers.start_batch()
            assert torch.equal(buffers.stack([torch.arange(size)] * 2), torch.arange(size).repeat(2, 1))


def test_a_train_loader_has_two_batches_of_each_worker_in_advance():
    dataset = Numbered()
    loader = TrainLoader(
        dataset, np.arange(SIZE), None, torch.device("cpu"), seed=0, batch_size=BATCH_SIZE, num_workers=WORKERS
    )
    next(iter(loader.epoch(0, 1)))
    expected = (1 + WORKERS * PREFETCH_FACTOR) * BATCH_SIZE
    wait_until(lambda: dataset.read.value == expected, "the workers read in advance")
