"""What happens to a sample before the model sees it.

`train_transform` and `valid_transform` take one sample (image, target), on the CPU, under a random stream of its own,
and bring images of any size to one. `batch_transform` mixes the samples of a batch in training; `normalize` works on a
whole batch in training and validation alike, after that; both do so on the device.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torchvision.transforms import v2

SIZE = 224  # pixels on a side of what the model sees; smaller is faster
# Mean and standard deviation of each channel on the scale 0 to 1. These are ImageNet's, as good a start as any for
# photographs; `python tools/split.py --keep --statistics` prints those of your train split.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def train_transform(image_size: int | None = None) -> Callable[..., tuple[Any, Any]] | None:
    """(image, target) -> (image, target): a random part of it in that size, mirrored or not (Szegedy et al. 2015)."""
    size = image_size or SIZE
    return v2.Compose([v2.RandomResizedCrop(size, scale=(0.25, 1.0), antialias=True), v2.RandomHorizontalFlip()])


def valid_transform(image_size: int | None = None) -> Callable[..., tuple[Any, Any]] | None:
    """(image, target) -> (image, target), without chance: the middle of it in that size."""
    size = image_size or SIZE
    return v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])


def batch_transform(
    num_classes: int, mixup: float = 0.0, cutmix: float = 0.0
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """(images, targets) of a batch -> mixed float images and soft targets (N, num_classes); None without an alpha.

    Each sample is mixed with the one before it, by mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019); where both
    have an alpha, by either, in half of the steps each. Works on the device, under the stream of its step.
    """
    kinds: list[Callable] = [v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup > 0 else []
    kinds += [v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix > 0 else []
    return v2.Compose([v2.ToDtype(torch.float32), v2.RandomChoice(kinds)]) if kinds else None


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Images (N, C, H, W), 0 to 255, as float32 of mean 0 and deviation 1 over the data set."""
    scale, shift = _constants(images.device)
    # In place on a copy: 21 ms for 64 images of 3x224x224 on one core, where (images / 255 - MEAN) / STD takes 76.
    return images.to(torch.float32, copy=True).mul_(scale).add_(shift)


@cache
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """1 / (255 STD) and -MEAN / STD on `device`, shape (C, 1, 1): sent once, since a copy to a GPU waits for it."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (MEAN, STD))
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)
