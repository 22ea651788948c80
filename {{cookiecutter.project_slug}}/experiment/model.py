"""The model, the loss and the accuracy."""

import torch
from torch import nn
from torchvision.models import resnet18


def build_model(num_classes: int) -> nn.Module:
    """Build a network from normalised images (N, 1, H, W) to logits (N, num_classes)."""
    return fit_small_images(resnet18(num_classes=num_classes), channels=1)


def build_criterion(label_smoothing: float = 0.0) -> nn.Module:
    """Build the loss: the mean over a micro-batch, from logits (N, num_classes) and targets (N,) or (N, num_classes).

    Args:
        label_smoothing: The fraction of the target spread over all classes (Szegedy et al. 2016, section 7).
    """
    return nn.CrossEntropyLoss(label_smoothing=label_smoothing)


def to_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return the probabilities of logits (N, num_classes); tools/predict.py writes them, and SCORES use them."""
    return logits.softmax(1)


def sample_accuracy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the accuracy of each sample; their mean is the accuracy.

    With soft targets, which mixing makes, it is the weight of the predicted class in the target: lambda * accuracy on
    the one class + (1 - lambda) * accuracy on the other. Random predictions have 1 / num_classes, as without mixing.

    Args:
        logits: The output of the model, shape (N, num_classes).
        targets: The classes, shape (N,), or soft targets, shape (N, num_classes).

    Returns:
        The accuracy, shape (N,): bool for classes, float for soft targets.
    """
    predicted = logits.argmax(1)
    if targets.ndim == 1:
        return predicted == targets
    return targets.gather(1, predicted[:, None])[:, 0]


def fit_small_images(model: nn.Module, channels: int) -> nn.Module:
    """Replace the stem of a torchvision ResNet, which reduces the resolution by four, with one that keeps it.

    As He et al. 2016 (section 4.2) for CIFAR: a 3x3 convolution and no max pooling.
    """
    model.conv1 = nn.Conv2d(channels, 64, kernel_size=3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model
