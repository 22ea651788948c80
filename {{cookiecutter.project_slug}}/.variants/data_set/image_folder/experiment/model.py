"""The network and the loss that it minimises."""

import torch
from torch import nn
from torchvision.models import resnet18


def build_model(num_classes: int) -> nn.Module:
    """A network from normalised images (N, 3, 224, 224) to logits (N, num_classes)."""
    return resnet18(num_classes=num_classes)


def build_criterion(label_smoothing: float = 0.0) -> nn.Module:
    """The loss: mean over a micro-batch, from logits (N, num_classes) and targets (N,).

    `label_smoothing` is the share of the target that goes to all classes alike (Szegedy et al. 2016, section 7).
    """
    return nn.CrossEntropyLoss(label_smoothing=label_smoothing)


def to_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """What `predict.py` writes and SCORES are given, of the shape of logits (N, num_classes)."""
    return logits.softmax(1)


def sample_accuracy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The share that the most likely class has in each target, (N,): its mean is the accuracy.

    Targets (N,) are classes, of which one is right; soft ones (N, num_classes) come of mixing, where that is
    lambda * accuracy on the one class + (1 - lambda) * accuracy on the other, and chance stays 1 / num_classes.
    """
    predicted = logits.argmax(1)
    return predicted == targets if targets.ndim == 1 else targets.gather(1, predicted[:, None])[:, 0]
