"""Small networks for tests, for images that `normalize` has given their channels."""

import torch
from torch import nn

from experiment.augmentations import MEAN

CHANNELS = len(MEAN)


class ToType(nn.Module):
    """Images (N, C, H, W) as another float type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(self.dtype)


def plain_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A small network without dropout and without batch statistics."""
    torch.manual_seed(2)
    layers = [nn.Conv2d(CHANNELS, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, 4)]
    return nn.Sequential(ToType(dtype), *layers).to(dtype)


def batchnorm_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The same with batch norm."""
    torch.manual_seed(2)
    features = [nn.Conv2d(CHANNELS, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten()]
    layers = [*features, nn.Linear(4 * 36, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)]
    return nn.Sequential(ToType(dtype), *layers).to(dtype)


def tiny_network(num_classes: int) -> nn.Module:
    """In place of experiment.model.build_model, so that a whole run takes a second."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(CHANNELS * 16, num_classes))
