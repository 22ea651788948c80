"""The model: a classification network of torchvision."""

from typing import Any

from torch import nn

from batteries.models.torchvision_models import make_classifier


def build_model(num_classes: int, name: str = "resnet18", **options: Any) -> nn.Module:
    """Build a network from normalised images (N, 3, 224, 224) to logits (N, num_classes).

    Args:
        num_classes: The number of outputs.
        name: The name of the network (`--model`).
        options: Arguments of the network (`--model-args`).
    """
    return make_classifier(name, num_classes, **options)
