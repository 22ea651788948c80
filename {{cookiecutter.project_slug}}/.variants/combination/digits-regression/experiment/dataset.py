"""The data set: the handwritten digits of scikit-learn, each turned by an angle, 1,797 grey images of 16x16 pixels.

The target is the angle in degrees, from -45 to 45, counter-clockwise. Source: E. Alpaydin and C. Kaynak, "Optical
Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize, rotate

MAX_ANGLE = 45.0  # degrees
# The loss compares (target - TARGET_MEAN) / TARGET_STD; one value for each target, or one for all. `tools/split.py
# --keep --statistics` prints those of the train split.
TARGET_MEAN = (0.0,)
TARGET_STD = (26.0,)


class TurnedDigits:
    """Images as uint8 tensors (1, 16, 16), 0 to 255; targets are angles in degrees, float32.

    batteries/data/dataset.py documents the attributes and methods that a data set can have.

    Args:
        data_dir: Not used, because the digits come with scikit-learn.
    """

    classes = ("angle",)

    def __init__(self, data_dir: Path) -> None:
        from sklearn.datasets import load_digits

        pixels, _ = load_digits(return_X_y=True)  # 64 pixels per digit, 0 to 16
        digits = torch.from_numpy(np.round(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
        generator = np.random.RandomState(0)  # its numbers are the same in all versions of NumPy
        self.targets = generator.uniform(-MAX_ANGLE, MAX_ANGLE, size=len(digits)).astype(np.float32)
        larger = resize(digits, [12, 12], antialias=True)
        framed = torch.nn.functional.pad(larger, (2, 2, 2, 2))
        pairs = zip(framed, self.targets.tolist(), strict=True)
        self.images = torch.stack([rotate(image, angle, InterpolationMode.BILINEAR) for image, angle in pairs])
        self.ids = [f"digit_{index:04d}" for index in range(len(self.targets))]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one image (1, 16, 16) and its angle ()."""
        return self.images[index], torch.tensor(self.targets[index])

    def get_batch(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images (N, 1, 16, 16) and angles (N,): faster than one by one; used without a transform."""
        return self.images.index_select(0, torch.from_numpy(indices)), torch.from_numpy(self.targets[indices])

    def fingerprint(self) -> str:
        """Return a hash of the data; a run can be resumed only with the same data."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.targets.tobytes())
        return digest.hexdigest()


def load_dataset(data_dir: Path) -> TurnedDigits:
    """Load the data set of this experiment."""
    return TurnedDigits(data_dir)
