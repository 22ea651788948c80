"""The data set: MNIST, 60,000 grey images of 28x28 pixels for training and 10,000 for test.

Source: Y. LeCun, C. Cortes and C. J. C. Burges, "The MNIST database of handwritten digits", 1998.
torchvision downloads it once (12 MB).
"""

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import MNIST

from batteries.core.errors import UserError
from batteries.core.files import without_empty_directories

TEST_SIZE = 10_000  # images of the official test split


class Mnist:
    """Images as uint8 tensors (1, 28, 28), 0 to 255; targets are integers from 0 to 9.

    The files of the official test split are read with its first sample, which training never loads. So `targets` is -1
    (not known) for its samples; `self[index]` returns their targets.

    batteries/data/dataset.py documents the attributes and methods that a data set can have.
    """

    classes = tuple("0123456789")

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
        """Return one image (1, 28, 28) and its target ()."""
        size = len(self.labels)
        if index < size:
            return self.images[index], self.labels[index]
        images, labels = self.test
        return images[index - size], labels[index - size]

    def get_batch(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images (N, 1, 28, 28) and targets (N,) faster than one by one; used without a transform."""
        if (indices < len(self.labels)).all():
            return self.images[indices], self.labels[indices]
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
            with without_empty_directories(self.data_dir / "MNIST/raw"):
                files = MNIST(str(self.data_dir), train=train, download=train)
        except (OSError, RuntimeError, ValueError, AssertionError) as error:  # the last two for truncated files
            reason = " ".join(str(error).split())
            raise UserError(
                f"--data-dir {self.data_dir} has no valid MNIST files, or they cannot be downloaded ({reason}); put "
                "the directory MNIST/raw there."
            ) from error
        return files.data[:, None], files.targets


def load_dataset(data_dir: Path) -> Mnist:
    """Load the data set of this experiment."""
    return Mnist(data_dir)
