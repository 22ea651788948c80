"""Exponential moving average of the weights."""

import copy
import itertools
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import get_ema_multi_avg_fn

from batteries.distributed.unwrap import unwrap_model


class EMA:
    """A copy of a model whose weights and batch norm statistics follow it slowly: decay * own + (1 - decay) * its.

    What does not learn, and other buffers, such as a mask of -inf, are the model's own. It remembers about
    1 / (1 - decay) steps. The arithmetic is torch.optim.swa_utils'; its AveragedModel is not used, since it waits for a
    GPU in each step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(unwrap_model(model)).requires_grad_(False)
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After each optimizer step."""
        moving = _moving(unwrap_model(model))
        pairs = list(zip(_tensors(self.model), _tensors(unwrap_model(model)), strict=True))
        averaged = [pair for pair in pairs if id(pair[1]) in moving]
        copied = [pair for pair in pairs if id(pair[1]) not in moving]
        self._average([own for own, _ in averaged], [its for _, its in averaged], 0)
        if copied:
            torch._foreach_copy_([own for own, _ in copied], [its for _, its in copied])  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged weights, by the names that the model has."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from there."""
        self.model.load_state_dict(state)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*itertools.chain(model.parameters(), model.buffers())]


def _moving(model: nn.Module) -> set[int]:
    """By `id` the tensors that a step changes little by little: weights that learn, running means and variances."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    statistics = [buffer for module in norms for buffer in module.buffers(recurse=False)]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {id(tensor) for tensor in (*weights, *statistics) if tensor.is_floating_point()}
