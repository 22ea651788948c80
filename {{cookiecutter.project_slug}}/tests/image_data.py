"""Small in-memory image data for tests, the same for every data set that a project can have.

It imports little, because each spawned worker imports it.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


class RandomImages:
    """A data set of `size` random images (channels, 8, 8), uint8, of four classes."""

    classes = ("north", "east", "south", "west")

    def __init__(self, size: int, channels: int = 1) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randint(256, (size, channels, 8, 8), generator=generator, dtype=torch.uint8)
        self.targets = torch.arange(size) % len(self.classes)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.targets[index]


def patterned_images(labels: Sequence[int], channels: int, size: int) -> np.ndarray:
    """Return images with a coarse, mirror-symmetric pattern for each class and some noise.

    A linear model learns them in a few steps.

    Args:
        labels: The class of each image.
        channels: The number of channels.
        size: Height and width, a multiple of 4.

    Returns:
        The images, shape (N, channels, size, size), uint8.
    """
    generator = np.random.default_rng(0)
    half = generator.uniform(40, 215, size=(max(labels) + 1, channels, 4, 2))
    patterns = np.concatenate([half, half[..., ::-1]], axis=-1).repeat(size // 4, 2).repeat(size // 4, 3)
    noise = generator.normal(0, 15, size=(len(labels), channels, size, size))
    return (patterns[np.asarray(labels)] + noise).clip(0, 255).astype(np.uint8)


def write_jpeg(image: torch.Tensor, path: Path) -> None:
    """Write an image (C, H, W), uint8, as a JPEG file."""
    from torchcodec.encoders import JpegEncoder

    JpegEncoder(image).to_file(path)


def write_png(image: torch.Tensor, path: Path) -> None:
    """Write an image (C, H, W), uint8, as a PNG file."""
    from torchcodec.encoders import PngEncoder

    PngEncoder(image).to_file(path)


class RandomNoise:
    """An augmentation that draws from the generators of Python, numpy and torch."""

    def __call__(self, image: torch.Tensor, target: Any) -> tuple[torch.Tensor, Any]:
        noise = torch.randint(4, image.shape) + random.randrange(4) + np.random.randint(4)
        return (image // 2 + noise).to(torch.uint8), target
