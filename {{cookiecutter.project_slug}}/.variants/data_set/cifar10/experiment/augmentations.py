"""What happens to a sample before the model sees it.

`train_transform` and `valid_transform` take one sample (image, target), on the CPU, under a random stream of its own.
`normalize` works on a whole batch, on the device, in training and validation alike.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torchvision.transforms import v2

# Mean and standard deviation of CIFAR-10's training pixels, on the scale 0 to 1: one number per channel.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


def train_transform() -> Callable[..., tuple[Any, Any]] | None:
    """(image, target) -> (image, target): shift by up to 4 pixels and mirror, as He et al. 2016 (section 4.2)."""
    return v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])


def valid_transform() -> Callable[..., tuple[Any, Any]] | None:
    """(image, target) -> (image, target), without chance; None where there is nothing to do."""
    return None


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 images (N, C, H, W), 0 to 255, as float32 of mean 0 and deviation 1 over the data set."""
    mean, std = _constants(images.device)
    return (images.float() / 255 - mean) / std


@cache
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """MEAN and STD on `device`, shape (C, 1, 1): sent once, since each copy to a GPU would wait for it."""
    return torch.tensor(MEAN, device=device).view(-1, 1, 1), torch.tensor(STD, device=device).view(-1, 1, 1)
