"""An index becomes one sample: CIFAR-10, 50,000 colour images of 32x32 for training and validation.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
torchvision downloads it once (170 MB).
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10


class Cifar10:
    """Images as uint8 tensors (3, 32, 32), 0 to 255; targets as whole numbers 0 to 9.

    The official test images are another file, which training never opens.
    """

    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def __init__(self, data_dir: Path) -> None:
        try:
            files = CIFAR10(str(data_dir), train=True, download=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"--data-dir {data_dir} has no sound CIFAR-10 and it cannot be downloaded ({error}); put the folder "
                f"cifar-10-batches-py there."
            ) from error
        self.images = torch.from_numpy(np.ascontiguousarray(files.data.transpose(0, 3, 1, 2)))
        self.targets = torch.tensor(files.targets)
        self.ids = [f"train_{index:05d}" for index in range(len(self.targets))]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One image (3, 32, 32) and its target ()."""
        return self.images[index], self.targets[index]

    def get_batch(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (N, 3, 32, 32) and targets (N,) at once: faster than one by one where no sample is transformed."""
        return self.images[indices], self.targets[indices]

    def fingerprint(self) -> str:
        """Tells these data from any others: a run is resumed on the same alone."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.targets.numpy().tobytes())
        return digest.hexdigest()


def load_dataset(data_dir: Path) -> Cifar10:
    """The data set of this experiment."""
    return Cifar10(data_dir)
