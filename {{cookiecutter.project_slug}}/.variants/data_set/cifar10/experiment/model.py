"""The network and the loss that it minimises."""

from torch import nn
from torchvision.models import resnet18


def build_model(num_classes: int) -> nn.Module:
    """A network from normalised images (N, 3, 32, 32) to logits (N, num_classes)."""
    return fit_small_images(resnet18(num_classes=num_classes), channels=3)


def build_criterion() -> nn.Module:
    """The loss: mean over a micro-batch, from logits (N, num_classes) and targets (N,)."""
    return nn.CrossEntropyLoss()


def fit_small_images(model: nn.Module, channels: int) -> nn.Module:
    """A torchvision ResNet whose stem keeps the resolution: its own shrinks 224 pixels by four before the first block.

    As He et al. 2016 (section 4.2) do for CIFAR: a 3x3 convolution and no max pooling.
    """
    model.conv1 = nn.Conv2d(channels, 64, kernel_size=3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model
