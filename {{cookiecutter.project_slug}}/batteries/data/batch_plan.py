"""How an epoch is divided into steps, micro-batches and ranks."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from batteries.core.errors import UserError
from batteries.core.ranks import world_size
from batteries.core.seeding import Stream


class MicroBatch(NamedTuple):
    """What one rank pushes through at once, as positions [start, stop) in the order of the epoch."""

    start: int
    stop: int
    loss_weight: (
        float  # weight of its mean loss, so that the sum over micro-batches and mean over ranks is the step's mean
    )
    ends_step: bool


def plan_epoch(
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
            loss_weight = (stop - start) * world_size / (end - begin)
            yield MicroBatch(start, stop, loss_weight, ends_step=index == micro_batches - 1)


def count_steps(size: int, batch_size: int, drop_last: bool) -> int:
    """Optimizer steps in one pass over `size` samples."""
    return size // batch_size if drop_last else -(-size // batch_size)


def check_batch_size(batch_size: int, accumulation_steps: int, size: int, drop_last: bool) -> None:
    """Raise BadInput where `batch_size` does not divide over ranks and micro-batches, or is over `size`."""
    ranks = world_size()
    assert accumulation_steps > 0
    pieces = ranks * accumulation_steps
    if batch_size < 1 or batch_size % pieces:
        below, above = batch_size // pieces * pieces, (batch_size // pieces + 1) * pieces
        legal = f"{below} or {above}" if below > 0 else f"{pieces}"
        raise UserError(
            f"--batch-size {batch_size} must be a multiple of {pieces} "
            f"({ranks} process{'es' * (ranks > 1)} x {accumulation_steps} accumulation steps); the nearest: {legal}."
        )
    if drop_last and size < batch_size:
        raise UserError(
            f"--batch-size {batch_size} does not fit: the train split has {size} samples; "
            f"use --batch-size {max(size // pieces * pieces, pieces)} or less, or --no-drop-last."
        )
    if not drop_last and 0 < size % batch_size < ranks:
        raise UserError(
            f"--batch-size {batch_size} leaves {size % batch_size} samples for the last step of an epoch, "
            f"fewer than the {ranks} processes; use --drop-last or another --batch-size."
        )


def epoch_permutation(size: int, *key: int) -> np.ndarray:
    """The order of an epoch: a permutation of `size` positions drawn from the stream `key`."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((*key, Stream.ORDER)))).permutation(size)
