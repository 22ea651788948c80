"""The model: a small U-Net, or a segmentation network of torchvision."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from batteries.models.options import build_network
from batteries.models.torchvision_models import make_segmenter
from experiment.augmentations import MEAN

CHANNELS = len(MEAN)  # of an image
WIDTH = 32  # channels of the first level; each further level has twice as many
LEVELS = 3  # resolutions; height and width must be at least 2^(LEVELS - 1) pixels


class UNet(nn.Module):
    """A U-Net (Ronneberger et al. 2015) with batch norm and padding, so that the output has the size of the input.

    Args:
        channels: The channels of an image.
        num_classes: The number of classes.
        width: The channels of the first level.
        levels: The number of resolutions, each half of the one before.
    """

    def __init__(self, channels: int, num_classes: int, width: int = WIDTH, levels: int = LEVELS) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels)]
        inputs = [channels, *widths[:-1]]
        self.down = nn.ModuleList(_two_convolutions(*pair) for pair in zip(inputs, widths, strict=True))
        self.up = nn.ModuleList(_two_convolutions(3 * narrow, narrow) for narrow in reversed(widths[:-1]))
        self.classify = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (N, num_classes, H, W) of normalised images (N, channels, H, W)."""
        features: list[torch.Tensor] = []
        for block in self.down:
            images = block(functional.max_pool2d(features[-1], 2) if features else images)
            features.append(images)
        result = features.pop()
        for block in self.up:
            skipped = features.pop()
            larger = functional.interpolate(result, size=skipped.shape[-2:], mode="nearest")
            result = block(torch.cat([skipped, larger], dim=1))
        return self.classify(result)


def build_model(num_classes: int, name: str = "unet", **options: Any) -> nn.Module:
    """Build a network from normalised images (N, CHANNELS, H, W) to logits (N, num_classes, H, W).

    Args:
        num_classes: The number of classes.
        name: The name of the network (`--model`): unet, or a segmentation network of torchvision for three channels.
        options: Arguments of the network (`--model-args`), such as `width` and `levels` of unet.
    """
    if name == "unet":
        return build_network(name, UNet, CHANNELS, num_classes, **options)
    return make_segmenter(name, num_classes, others=["unet"], **options)


def _two_convolutions(channels: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (channels, width):
        layers += [nn.Conv2d(inputs, width, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)
