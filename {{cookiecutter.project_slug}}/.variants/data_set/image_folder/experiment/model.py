"""The model."""

from torch import nn
from torchvision.models import resnet18


def build_model(num_classes: int) -> nn.Module:
    """Build a network from normalised images (N, 3, 224, 224) to logits (N, num_classes)."""
    return resnet18(num_classes=num_classes)
