"""The data set: CIFAR-10, 50,000 colour images of 32x32 pixels for training and 10,000 for test.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
torchvision downloads it once (170 MB), and checks the md5 sums of the files that it reads.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torchvision.datasets import CIFAR10

from batteries.core.errors import UserError
from batteries.core.files import without_empty_directories

TEST_SIZE = 10_000  # images of the official test split


class TrainFiles(CIFAR10):
    """The train files only; torchvision would also read the test file, for its md5 sum."""

    test_list: ClassVar[list] = []


class Cifar10:
    """Images as uint8 tensors (3, 32, 32), 0 to 255; targets are integers from 0 to 9.

    The files of the official test split are read with its first sample, which training never loads. So `targets` is -1
    (not known) for its samples; `self[index]` returns their targets.

    batteries/data/dataset.py documents the attributes and methods that a data set can have.
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
        """Return one image (3, 32, 32) and its target ()."""
        size = len(self.labels)
        if index < size:
            return self.images[index], self.labels[index]
        images, labels = self.test
        return images[index - size], labels[index - size]

    def get_batch(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images (N, 3, 32, 32) and targets (N,) faster than one by one; used without a transform."""
        if (indices < len(self.labels)).all():
            rows = torch.from_numpy(indices)  # index_select takes half the time of self.images[indices]
            return self.images.index_select(0, rows), self.labels.index_select(0, rows)
        images, labels = zip(*(self[index] for index in indices.tolist()), strict=True)
        return torch.stack(images), torch.stack(labels)

    @cached_property
    def test(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The images and targets of the official test split."""
        return self._read(train=False)

    def fingerprint(self) -> str:
        """Return a hash of the data; a run can be resumed only with the same data."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    def _read(self, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        try:  # the first download includes the test files
            with without_empty_directories(self.data_dir):
                files = (TrainFiles if train else CIFAR10)(str(self.data_dir), train=train, download=train)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"--data-dir {self.data_dir} has no valid CIFAR-10 files, or they cannot be downloaded ({reason}); put "
                "the directory cifar-10-batches-py there."
            ) from error
        return torch.from_numpy(np.ascontiguousarray(files.data.transpose(0, 3, 1, 2))), torch.tensor(files.targets)


def load_dataset(data_dir: Path) -> Cifar10:
    """Load the data set of this experiment."""
    return Cifar10(data_dir)
