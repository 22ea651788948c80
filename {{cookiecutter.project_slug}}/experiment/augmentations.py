"""Transforms and augmentations of samples.

`train_transform` and `valid_transform` get one sample (image, target) on the CPU; each sample has a separate random
stream. `batch_transform` mixes the samples of a batch in training. `normalize` gets each batch last, in training and
validation. Both run on the device.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torchvision.transforms import v2

# Mean and standard deviation of the pixels, on the scale 0 to 1, for each channel.
MEAN = (0.3053,)
STD = (0.3759,)


def train_transform(image_size: int | None = None) -> Callable[..., tuple[Any, Any]] | None:
    """Return the augmentation (image, target) -> (image, target): small rotations, shifts and scalings.

    Flips are left out, because a mirrored digit is a different sign.

    Args:
        image_size: Height and width in pixels; None keeps the size.
    """
    affine = v2.RandomAffine(
        degrees=(-10, 10),
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


def batch_transform(
    num_classes: int, mixup: float = 0.0, cutmix: float = 0.0
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """Return the mixing of a batch (images, targets), or None if both alphas are 0.

    Each sample is mixed with the one before it, by mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019); if both have
    an alpha, one of them is drawn for each step, with equal probability.

    Args:
        num_classes: The number of classes.
        mixup: The alpha of mixup.
        cutmix: The alpha of CutMix.

    Returns:
        A function to mixed float images and soft targets (N, num_classes).
    """
    mixers: list[Callable] = []
    if mixup > 0:
        mixers.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix > 0:
        mixers.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    return v2.Compose([v2.ToDtype(torch.float32), v2.RandomChoice(mixers)]) if mixers else None


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
