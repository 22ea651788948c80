"""Small data for tests: quick, and the same for every data set that this project may have.

It imports little, since each spawned worker imports it.
"""

import random
from typing import Any

import numpy as np
import torch


class Pictures:
    """`size` random images (1, 8, 8), uint8, in four classes."""

    classes = ("north", "east", "south", "west")

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randint(256, (size, 1, 8, 8), generator=generator, dtype=torch.uint8)
        self.targets = torch.arange(size) % len(self.classes)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.targets[index]


class Shake:
    """An augmentation that draws from all three generators."""

    def __call__(self, image: torch.Tensor, target: Any) -> tuple[torch.Tensor, Any]:
        noise = torch.randint(4, image.shape) + random.randrange(4) + np.random.randint(4)
        return (image // 2 + noise).to(torch.uint8), target
