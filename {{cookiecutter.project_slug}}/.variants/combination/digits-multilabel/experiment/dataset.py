"""The data set: pairs of the handwritten digits of scikit-learn, 1,797 grey images of 8x16 pixels.

The labels of an image are the digits on it. Each digit of the source is on two images of the same group, and a group is
in one split only, so that no digit is in two splits. Source: E. Alpaydin and C. Kaynak, "Optical Recognition of
Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

GROUPS = 90


class DigitPairs:
    """Images as uint8 tensors (1, 8, 16), 0 to 255; targets are labels, 0 and 1, shape (10,).

    batteries/data/dataset.py documents the attributes and methods that a data set can have.

    Args:
        data_dir: Not used, because the digits come with scikit-learn.
    """

    classes = tuple("0123456789")

    def __init__(self, data_dir: Path) -> None:
        from sklearn.datasets import load_digits

        pixels, numbers = load_digits(return_X_y=True)  # 64 pixels per digit, 0 to 16
        digits = torch.from_numpy(np.round(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
        order = np.random.RandomState(0).permutation(len(digits))  # the same in all versions of NumPy
        groups = np.array_split(order, GROUPS)
        pairs = np.concatenate([np.stack([group, np.roll(group, 1)], axis=1) for group in groups])
        self.images = torch.cat([digits[pairs[:, 0]], digits[pairs[:, 1]]], dim=3)
        self.targets = np.zeros((len(pairs), 10), dtype=np.int64)
        self.targets[np.arange(len(pairs))[:, None], numbers[pairs]] = 1
        self.groups = [number for number, group in enumerate(groups) for _ in group]
        self.ids = [f"pair_{index:04d}" for index in range(len(pairs))]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one image (1, 8, 16) and its labels (10,)."""
        return self.images[index], torch.from_numpy(self.targets[index])

    def get_batch(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images (N, 1, 8, 16) and labels (N, 10): faster than one by one; used without a transform."""
        return self.images.index_select(0, torch.from_numpy(indices)), torch.from_numpy(self.targets[indices])

    def fingerprint(self) -> str:
        """Return a hash of the data; a run can be resumed only with the same data."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.targets.tobytes())
        return digest.hexdigest()


def load_dataset(data_dir: Path) -> DigitPairs:
    """Load the data set of this experiment."""
    return DigitPairs(data_dir)
