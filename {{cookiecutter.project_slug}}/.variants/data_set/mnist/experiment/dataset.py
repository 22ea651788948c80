"""An index becomes one sample: MNIST, 60,000 grey images of 28x28 to train on and 10,000 to test.

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

TEST_SIZE = 10_000  # images of the official test split


class Mnist:
    """Images as uint8 tensors (1, 28, 28), 0 to 255; targets as whole numbers 0 to 9.

    The files of the official test split are opened when one of its samples is asked for, which training never does.
    So `targets` has -1 (not known) for them; what an index gives has the target.
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
        """One image (1, 28, 28) and its target ()."""
        size = len(self.labels)
        if index < size:
            return self.images[index], self.labels[index]
        images, labels = self.test
        return images[index - size], labels[index - size]

    def get_batch(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (N, 1, 28, 28) and targets (N,) at once: faster than one by one where no sample is transformed."""
        if (indices < len(self.labels)).all():
            return self.images[indices], self.labels[indices]
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
            files = MNIST(str(self.data_dir), train=train, download=train)
        except (OSError, RuntimeError, ValueError, AssertionError) as error:  # the last two of files that are cut short
            raise UserError(
                f"--data-dir {self.data_dir} has no sound MNIST or it cannot be downloaded ({error}); put the folder "
                f"MNIST/raw there."
            ) from error
        return files.data[:, None], files.targets


def load_dataset(data_dir: Path) -> Mnist:
    """The data set of this experiment."""
    return Mnist(data_dir)
