"""Random resized crops of images in memory, faster than the crop of torchvision."""

import math
import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

TRIES = 10  # boxes that are drawn until one fits into the image, as in torchvision


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def draw_box(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """Draw the box of a random resized crop (Szegedy et al. 2015), with the distribution of torchvision.

    Args:
        height: Height of the image.
        width: Width of the image.
        scale: The least and the greatest fraction of the area of the image.
        ratio: The least and the greatest width divided by height.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(TRIES):
        area = height * width * random.uniform(*scale)
        aspect = math.exp(random.uniform(low, high))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = random.randint(0, height - box_height)
            return Box(top, random.randint(0, width - box_width), box_height, box_width)
    box_width = min(width, round(height * ratio[1]))  # the largest box in the centre with an allowed ratio
    box_height = min(height, round(width / ratio[0]))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def resized_crop(image: torch.Tensor, box: Box, size: int) -> torch.Tensor:
    """Resize a box of an image (C, H, W) to (C, size, size) with antialiasing.

    The result has the pixels of torchvision's `resized_crop`. The box is copied first, with the channels of a pixel
    side by side, because torch resizes such images about twice as fast.
    """
    top, left, height, width = box
    window = image[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
    return functional.resize(window, [size, size], antialias=True)[0]


@dataclass(frozen=True)
class RandomResizedCrop:
    """A transform (image, target) -> (image, target): a random resized crop, mirrored with the probability `flip`.

    It draws from Python's generator, which has a separate stream for each sample. It can be part of `v2.Compose`.

    Attributes:
        size: Height and width of the result, in pixels.
        scale: The least and the greatest fraction of the area of the image.
        ratio: The least and the greatest width divided by height.
        flip: The probability of a horizontal flip.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __call__(self, image: torch.Tensor, target: Any) -> tuple[torch.Tensor, Any]:
        """Return the crop, shape (C, size, size), and the target: a mask is cropped with its image."""
        height, width = image.shape[-2:]
        box = draw_box(height, width, self.scale, self.ratio)
        is_flipped = random.random() < self.flip
        crop = resized_crop(image, box, self.size)
        crop = crop.flip(-1) if is_flipped else crop
        if isinstance(target, tv_tensors.Mask):  # functions of v2 take its nearest pixels, and return a mask
            target = functional.resized_crop(target, *box, [self.size, self.size])
            target = functional.horizontal_flip(target) if is_flipped else target
        return crop, target
