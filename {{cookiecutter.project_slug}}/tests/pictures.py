"""Small data for tests: quick, and the same for every data set that this project may have.

It imports little, since each spawned worker imports it.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class Pictures:
    """`size` random images (channels, 8, 8), uint8, in four classes."""

    classes = ("north", "east", "south", "west")

    def __init__(self, size: int, channels: int = 1) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randint(256, (size, channels, 8, 8), generator=generator, dtype=torch.uint8)
        self.targets = torch.arange(size) % len(self.classes)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.targets[index]


def patterned(labels: Sequence[int], channels: int, size: int) -> np.ndarray:
    """uint8 images (N, channels, size, size): a coarse pattern for each class, the same in a mirror, under some noise.

    A linear model learns them in a few steps.
    """
    generator = np.random.default_rng(0)
    half = generator.uniform(40, 215, size=(max(labels) + 1, channels, 4, 2))
    patterns = np.concatenate([half, half[..., ::-1]], axis=-1).repeat(size // 4, 2).repeat(size // 4, 3)
    noise = generator.normal(0, 15, size=(len(labels), channels, size, size))
    return (patterns[np.asarray(labels)] + noise).clip(0, 255).astype(np.uint8)


class Shake:
    """An augmentation that draws from all three generators."""

    def __call__(self, image: torch.Tensor, target: Any) -> tuple[torch.Tensor, Any]:
        noise = torch.randint(4, image.shape) + random.randrange(4) + np.random.randint(4)
        return (image // 2 + noise).to(torch.uint8), target
