"""The model."""

from torch import nn
from torchvision.models import resnet18


def build_model(num_classes: int) -> nn.Module:
    """Build a network from normalised images (N, 1, H, W) to logits (N, num_classes)."""
    return fit_small_images(resnet18(num_classes=num_classes), channels=1)


def fit_small_images(model: nn.Module, channels: int) -> nn.Module:
    """Replace the stem of a torchvision ResNet, which reduces the resolution by four, with one that keeps it.

    As He et al. 2016 (section 4.2) for CIFAR: a 3x3 convolution and no max pooling.
    """
    model.conv1 = nn.Conv2d(channels, 64, kernel_size=3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model
