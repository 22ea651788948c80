"""Pretrained weights from torchvision or from a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from batteries.checkpoint.io import scored_weights
from batteries.core.errors import UserError
from batteries.core.text import list_first
from batteries.distributed.collectives import run_on_rank_zero

# Parts that wrappers add to the names of weights: DataParallel, torch.compile, FSDP, activation checkpointing, Fabric.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}


class PretrainedReport(NamedTuple):
    """Which tensors did not fit.

    Attributes:
        missing: The tensors of the model that keep their initial values.
        unused: The tensors of the source that the model does not have.
    """

    missing: list[str]
    unused: list[str]


def load_pretrained(model: nn.Module, source: str) -> PretrainedReport:
    """Load the pretrained tensors whose names and shapes fit the model. Every rank must call it.

    Args:
        model: The model, not wrapped.
        source: A name in torchvision (`ResNet18_Weights.IMAGENET1K_V1`, which rank 0 downloads once to torch's cache),
            or a file with weights or a checkpoint.

    Raises:
        UserError: On all ranks, if the source is neither, or if less than half of the tensors fit, which means another
            architecture.
    """
    expected = model.state_dict()
    weights = run_on_rank_zero(lambda: _read_weights(source))
    weights = _match_wrapped_names(weights, expected)
    fitting = {
        name: value for name, value in weights.items() if name in expected and value.shape == expected[name].shape
    }
    missing = [name for name in expected if name not in fitting]
    unused = [name for name in weights if name not in expected]
    if len(fitting) < len(expected) / 2:
        raise UserError(
            f"--pretrained {source} has a different architecture: only {len(fitting)} of {len(expected)} tensors fit. "
            f"These do not fit: {list_first(missing, 5)}."
        )
    model.load_state_dict({**expected, **fitting})
    return PretrainedReport(missing, unused)


def _match_wrapped_names(
    weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Rename weights that were saved inside wrappers, such as `module._orig_mod.fc.bias`, to the names of the model."""
    name_without_wrappers = {_remove_wrappers(name): name for name in expected}
    renamed: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        plain = _remove_wrappers(name)
        renamed[name if name in expected else name_without_wrappers.get(plain, plain)] = value
    return renamed


def _remove_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _read_weights(source: str) -> Mapping[str, torch.Tensor]:
    return _read_file(source) if Path(source).is_file() else _download(source)


def _read_file(source: str) -> Mapping[str, torch.Tensor]:
    try:
        contents = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"--pretrained {source} cannot be read as weights ({type(error).__name__}).") from error
    weights = contents if isinstance(contents, dict) else {}
    if "model_state_dict" in weights:
        weights = scored_weights(weights)
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(
            f"--pretrained {source} is not a dict of tensors; give the output of torch.save(model.state_dict(), …)."
        )
    return weights


def _download(source: str) -> Mapping[str, torch.Tensor]:
    from torchvision.models import get_weight

    try:
        weights = get_weight(source)
    except (ValueError, AttributeError, KeyError):
        raise UserError(
            f"--pretrained {source} is neither a file nor a name in torchvision, such as ResNet18_Weights.DEFAULT."
        ) from None
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise UserError(f"--pretrained {source} cannot be downloaded ({error}); give a file of weights.") from None
