"""Networks of torchvision, chosen with `--model`."""

import difflib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models import get_model, list_models, segmentation

from batteries.core.errors import UserError
from batteries.models.options import build_network

# These return a second output in training by default.
WITH_AUXILIARY_OUTPUT = ("googlenet", "inception_v3")


class MainOutput(nn.Module):
    """A network that returns a tuple or a dict, as one that returns its first output, or its output `out`.

    Args:
        network: The network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of normalised images (N, C, H, W)."""
        outputs = self.network(images)
        if isinstance(outputs, dict):
            return outputs["out"]
        return outputs[0] if isinstance(outputs, tuple) else outputs


def make_classifier(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Build a classification network with random weights, from images (N, 3, H, W) to logits (N, num_classes).

    Args:
        name: A name of `torchvision.models.list_models(torchvision.models)`.
        num_classes: The number of outputs.
        options: Arguments of the network, such as `stochastic_depth_prob` of ConvNeXt.

    Raises:
        UserError: If torchvision does not have the network, or the network does not have an argument.
    """
    _check_name(name, list_models(torchvision.models), "classification")
    if name in WITH_AUXILIARY_OUTPUT:
        options = {"aux_logits": False, "init_weights": True} | options
    network = build_network(name, partial(get_model, name, num_classes=num_classes), **options)
    return MainOutput(network) if options.get("aux_logits") else network


def make_segmenter(name: str, num_classes: int, others: Sequence[str] = (), **options: Any) -> nn.Module:
    """Build a segmentation network with random weights, from images (N, 3, H, W) to logits (N, num_classes, H, W).

    Args:
        name: A name of `torchvision.models.list_models(torchvision.models.segmentation)`.
        num_classes: The number of classes.
        others: More names that are possible, for the error.
        options: Arguments of the network.

    Raises:
        UserError: As `make_classifier`.
    """
    _check_name(name, [*others, *list_models(segmentation)], "segmentation")
    build = partial(get_model, name, weights_backbone=None, num_classes=num_classes)
    return MainOutput(build_network(name, build, **options))


def set_input_channels(network: nn.Module, channels: int) -> nn.Module:
    """Replace the first convolution of a network, unless it has `channels` inputs already; return the network."""
    name, first = next((name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d))
    if first.in_channels == channels:
        return network
    replacement = nn.Conv2d(
        channels,
        first.out_channels,
        kernel_size=first.kernel_size,  # type: ignore[arg-type]
        stride=first.stride,  # type: ignore[arg-type]
        padding=first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    network.set_submodule(name, replacement)
    return network


def _check_name(name: str, names: Sequence[str], kind: str) -> None:
    if name in names:
        return
    nearest = difflib.get_close_matches(name, names, n=5, cutoff=0.5) or list(names)
    raise UserError(f"--model {name} is not a {kind} network of torchvision; use one of {', '.join(nearest)}.")
