"""Random streams that depend on a key only, so that processes, workers and restarts do not change them.

A key is a tuple of integers, such as (seed, stage, epoch, position). numpy's SeedSequence hashes it to 64 bits that are
independent for any two keys, except keys that differ in trailing zeros only (O'Neill 2015, "Developing a seed_seq
alternative"). Epochs count from 1, so no two keys here differ in that way. A key never contains a rank or a worker id.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What a stream is used for: the last element of its key."""

    ORDER = 0  # the order of the samples in an epoch
    SAMPLE = 1  # the augmentations of one sample
    MODEL = 2  # the model in one micro-batch (dropout)
    WEIGHTS = 3  # the initial weights of a model
    MIXING = 4  # mixing the samples of one step (mixup, CutMix)


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch, including those of all GPUs."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def stream_seeds(count: int, *key: int) -> np.ndarray:
    """Return `count` seeds, uint64, of the stream `key`; the i-th seed does not depend on `count`."""
    return np.random.SeedSequence(key).generate_state(count, np.uint64)


def reseed(seed: int) -> None:
    """Seed the CPU generators as `seed_all` does, in 9 µs; it is called for each micro-batch and sample.

    torch.manual_seed takes 180 µs because it also builds a stack trace and visits all devices (timeit on one core of an
    x86-64 server, torch 2.15). `reseed_devices` seeds the devices that are in use.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


def reseed_devices(seed: int) -> None:
    """Seed the generators of the GPUs that this process uses, without waiting for them."""
    if torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(seed)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the CPU generators of Python, numpy and torch on exit."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.default_generator.set_state(torch_state)


@contextmanager
def random_stream(*key: int) -> Iterator[None]:
    """Draw CPU random numbers from the stream `key` inside the context; restore the generators on exit."""
    with preserved_random_state():
        reseed(int(stream_seeds(1, *key)[0]))
        yield
