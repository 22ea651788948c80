"""Small networks for tests. Their input has the channels of the output of `normalize`."""

import torch
from torch import nn

from experiment.augmentations import MEAN

CHANNELS = len(MEAN)


class ToType(nn.Module):
    """Convert images (N, C, H, W) to another floating-point dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(self.dtype)


def plain_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Build a small network without dropout and batch norm."""
    torch.manual_seed(2)
    layers = [nn.Conv2d(CHANNELS, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, 4)]
    return nn.Sequential(ToType(dtype), *layers).to(dtype)


def batchnorm_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Build a small network with batch norm."""
    torch.manual_seed(2)
    features = [nn.Conv2d(CHANNELS, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten()]
    layers = [*features, nn.Linear(4 * 36, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)]
    return nn.Sequential(ToType(dtype), *layers).to(dtype)


def tiny_network(num_classes: int) -> nn.Module:
    """Build a network that replaces experiment.model.build_model, so that a complete run takes a second."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(CHANNELS * 16, num_classes))


def any_network(num_classes: int, name: str = "tiny", **options: object) -> nn.Module:
    """Build the network of `tiny_network` for any `--model` and `--model-args`."""
    return tiny_network(num_classes)


def dropout_network(num_classes: int) -> nn.Module:
    """Build a small network with dropout and batch norm, so that any state that is not restored changes the result."""
    layers = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(CHANNELS * 16, 16), nn.BatchNorm1d(16)]
    return nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(16, num_classes))
