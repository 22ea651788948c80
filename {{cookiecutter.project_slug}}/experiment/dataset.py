"""The data set: the handwritten digits of scikit-learn, 1,797 grey images of 8x8 pixels.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch


class Digits:
    """Images as uint8 tensors (1, 8, 8), 0 to 255; targets are integers from 0 to 9.

    batteries/data/dataset.py documents the attributes and methods that a data set can have.

    Args:
        data_dir: Not used, because the images come with scikit-learn.
    """

    classes = tuple("0123456789")

    def __init__(self, data_dir: Path) -> None:
        from sklearn.datasets import load_digits

        pixels, targets = load_digits(return_X_y=True)  # 64 pixels per image, 0 to 16
        pixels = np.round(pixels * (255 / 16)).astype(np.uint8)
        self.images = torch.from_numpy(pixels).view(-1, 1, 8, 8)
        self.targets = torch.from_numpy(targets)
        self.ids = [f"digit_{index:04d}" for index in range(len(self.targets))]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one image (1, 8, 8) and its target ()."""
        return self.images[index], self.targets[index]

    def get_batch(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images (N, 1, 8, 8) and targets (N,): faster than one by one; used without a transform."""
        rows = torch.from_numpy(indices)  # index_select takes half the time of self.images[indices]
        return self.images.index_select(0, rows), self.targets.index_select(0, rows)

    def fingerprint(self) -> str:
        """Return a hash of the data; a run can be resumed only with the same data."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.targets.numpy().tobytes())
        return digest.hexdigest()


def load_dataset(data_dir: Path) -> Digits:
    """Load the data set of this experiment."""
    return Digits(data_dir)
