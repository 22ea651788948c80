"""Pretrained weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from batteries.checkpoint.io import scored_weights
from batteries.core.errors import UserError
from batteries.distributed.collectives import run_on_rank_zero


class PretrainedReport(NamedTuple):
    """How pretrained weights fitted, by the names of tensors."""

    left: list[str]  # of the model, which stay as they were made
    unused: list[str]  # of the source, which have no place in the model


def load_pretrained(model: nn.Module, source: str) -> PretrainedReport:
    """Put pretrained weights into `model` where names and shapes fit.

    `source` is a torchvision name (`ResNet18_Weights.IMAGENET1K_V1`, downloaded once by rank 0 into torch's cache) or a
    file of weights or of a checkpoint. Every rank calls this. Raises BadInput, on all of them, for a source that is
    neither, and where less than half of the tensors fit: that is another architecture.
    """
    state = run_on_rank_zero(lambda: _read_weights(source))
    own = model.state_dict()
    if all(name.startswith("module.") for name in state) and not any(name.startswith("module.") for name in own):
        state = {name.removeprefix("module."): value for name, value in state.items()}  # saved inside DataParallel
    fitting = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    left = [name for name in own if name not in fitting]
    if len(fitting) < len(own) / 2:
        raise UserError(
            f"--pretrained {source} is of another architecture: {len(fitting)} of {len(own)} tensors fit; "
            f"these do not: {', '.join(left[:5])}{', and more' if len(left) > 5 else ''}."
        )
    model.load_state_dict({**own, **fitting})
    return PretrainedReport(left, [name for name in state if name not in own])


def _read_weights(source: str) -> Mapping[str, torch.Tensor]:
    from torchvision.models import get_weight

    if Path(source).is_file():
        try:
            found = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"--pretrained {source} cannot be read as weights ({type(error).__name__}).") from error
        state = found if isinstance(found, dict) else None
        if state and "model_state_dict" in state:
            state = scored_weights(state)
        if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise UserError(
                f"--pretrained {source} holds no weights by name; give what torch.save(model.state_dict()) made."
            )
        return state
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
