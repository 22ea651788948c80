"""The model: a classification network of torchvision."""

from typing import Any

from torch import nn
from torchvision.models import ResNet

from batteries.models.torchvision_models import make_classifier, set_input_channels


def build_model(num_classes: int, name: str = "resnet18", **options: Any) -> nn.Module:
    """Build a network from normalised images (N, 3, 32, 32) to logits (N, num_classes).

    Args:
        num_classes: The number of outputs.
        name: The name of the network (`--model`).
        options: Arguments of the network (`--model-args`).
    """
    return fit_small_images(make_classifier(name, num_classes, **options), channels=3)


def fit_small_images(model: nn.Module, channels: int) -> nn.Module:
    """Set the input channels, and replace the stem of a ResNet, which reduces the resolution by four.

    The new one keeps the resolution, as He et al. 2016 (section 4.2) for CIFAR: a 3x3 convolution and no max pooling.
    """
    if not isinstance(model, ResNet):
        return set_input_channels(model, channels)
    model.conv1 = nn.Conv2d(channels, 64, kernel_size=3, padding=1, bias=False)
    model.set_submodule("maxpool", nn.Identity())
    return model
