"""An index becomes one sample: CIFAR-10, 50,000 colour images of 32x32 to train on and 10,000 to test.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
torchvision downloads it once (170 MB), and compares the bytes of the files that it reads with their md5 sums.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torchvision.datasets import CIFAR10

from batteries.core.errors import UserError

TEST_SIZE = 10_000  # images of the official test split


class TrainFiles(CIFAR10):
    """The train split alone: torchvision would read the test file as well, for its md5 sum."""

    test_list: ClassVar[list] = []


class Cifar10:
    """Images as uint8 tensors (3, 32, 32), 0 to 255; targets as whole numbers 0 to 9.

    The files of the official test split are opened when one of its samples is asked for, which training never does.
    So `targets` has -1 (not known) for them; what an index gives has the target.
    """

    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = Path(data_dir)
        self.images, self.labels = self._read(train=True)
        size = len(self.labels)
        self.ids = [f"train_{index:05d}" for index in range(size)] + [f"test_{index:05d}" for index in range(TEST_SIZE)]
        self.targets = np.append(self.labels.numpy(), np.full(TEST_SIZE, -1))
        self.official_test = np.arange(size + TEST_SIZE) >= size

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One image (3, 32, 32) and its target ()."""
        size = len(self.labels)
        if index < size:
            return self.images[index], self.labels[index]
        images, labels = self.test
        return images[index - size], labels[index - size]

    def get_batch(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (N, 3, 32, 32) and targets (N,) at once: faster than one by one where no sample is transformed."""
        if (indices < len(self.labels)).all():
            rows = torch.from_numpy(indices)  # index_select takes half the time of self.images[indices]
            return self.images.index_select(0, rows), self.labels.index_select(0, rows)
        images, labels = zip(*(self[index] for index in indices.tolist()), strict=True)
        return torch.stack(images), torch.stack(labels)

    @cached_property
    def test(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and targets of the official test split."""
        return self._read(train=False)

    def fingerprint(self) -> str:
        """Tells these data from any others: a run is resumed on the same alone."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    def _read(self, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        try:  # the first download brings the test files too
            files = (TrainFiles if train else CIFAR10)(str(self.data_dir), train=train, download=train)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--data-dir {self.data_dir} has no sound CIFAR-10 or it cannot be downloaded ({error}); put the "
                f"folder cifar-10-batches-py there."
            ) from error
        return torch.from_numpy(np.ascontiguousarray(files.data.transpose(0, 3, 1, 2))), torch.tensor(files.targets)


def load_dataset(data_dir: Path) -> Cifar10:
    """The data set of this experiment."""
    return Cifar10(data_dir)
