"""The data set: the handwritten digits of scikit-learn on textured backgrounds, 1,797 grey images of 24x24 pixels.

The target is a mask with the pixels of the digit. Source: E. Alpaydin and C. Kaynak, "Optical Recognition of
Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import resize

SIZE = 24  # pixels on a side
DIGIT = 16  # pixels on a side of an enlarged digit
FOREGROUND = 100  # brightness from which on a pixel belongs to the digit, 0 to 255


class DigitMasks:
    """Images as uint8 tensors (1, 24, 24), 0 to 255; targets are masks (24, 24), uint8: 0 background, 1 digit.

    batteries/data/dataset.py documents the attributes and methods that a data set can have.

    Args:
        data_dir: Not used, because the digits come with scikit-learn.
    """

    classes = ("background", "digit")
    targets = None  # masks come with their images

    def __init__(self, data_dir: Path) -> None:
        from sklearn.datasets import load_digits

        pixels, _ = load_digits(return_X_y=True)  # 64 pixels per digit, 0 to 16
        digits = torch.from_numpy(np.round(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
        larger = resize(digits, [DIGIT, DIGIT], antialias=True)
        generator = np.random.RandomState(0)  # its numbers are the same in all versions of NumPy
        corners = generator.randint(SIZE - DIGIT + 1, size=(len(digits), 2))
        coarse = generator.randint(180, size=(len(digits), 1, SIZE // 3, SIZE // 3))
        fine = generator.randint(60, size=(len(digits), 1, SIZE, SIZE))
        self.images = torch.from_numpy((coarse.repeat(3, 2).repeat(3, 3) + fine).astype(np.uint8))
        self.masks = torch.zeros(len(digits), SIZE, SIZE, dtype=torch.uint8)
        for image, mask, digit, (top, left) in zip(self.images, self.masks, larger, corners, strict=True):
            window = image[:, top : top + DIGIT, left : left + DIGIT]
            is_digit = digit >= FOREGROUND
            window[is_digit] = digit[is_digit]
            mask[top : top + DIGIT, left : left + DIGIT] = is_digit[0]
        self.ids = [f"digit_{index:04d}" for index in range(len(digits))]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, tv_tensors.Mask]:
        """Return one image (1, 24, 24) and its mask (24, 24)."""
        return self.images[index], tv_tensors.Mask(self.masks[index])

    def get_batch(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images (N, 1, 24, 24) and masks (N, 24, 24): faster than one by one; used without a transform."""
        rows = torch.from_numpy(indices)
        return self.images.index_select(0, rows), self.masks.index_select(0, rows)

    def fingerprint(self) -> str:
        """Return a hash of the data; a run can be resumed only with the same data."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.masks.numpy().tobytes())
        return digest.hexdigest()


def load_dataset(data_dir: Path) -> DigitMasks:
    """Load the data set of this experiment."""
    return DigitMasks(data_dir)
