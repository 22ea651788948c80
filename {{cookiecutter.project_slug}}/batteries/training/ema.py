"""Exponential moving average of the weights."""

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import get_ema_multi_avg_fn

from batteries.distributed.unwrap import unwrap_model


class EMA:
    """A copy of a model with averaged weights: average = decay * average + (1 - decay) * weights after each step.

    Trainable parameters and batch norm statistics are averaged; frozen parameters and other buffers, such as a mask
    of -inf, are copied. The average covers about 1 / (1 - decay) steps. The arithmetic is that of
    torch.optim.swa_utils; its AveragedModel is not used because it waits for the GPU in each step.

    Attributes:
        model: The model with the averaged weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start with the present weights.

        Args:
            model: The model; it can be wrapped.
            decay: The decay per step, between 0 and 1.
        """
        self.model = copy.deepcopy(unwrap_model(model)).requires_grad_(False)
        self._update_average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the weights of `model`; call it after each optimizer step."""
        network = unwrap_model(model)
        averaged_ids = _averaged_tensor_ids(network)
        averages: list[torch.Tensor] = []
        averaged_values: list[torch.Tensor] = []
        copies: list[torch.Tensor] = []
        copied_values: list[torch.Tensor] = []
        for own, value in zip(_tensors(self.model), _tensors(network), strict=True):
            if id(value) in averaged_ids:
                averages.append(own)
                averaged_values.append(value)
            else:
                copies.append(own)
                copied_values.append(value)
        self._update_average(averages, averaged_values, 0)
        if copies:
            torch._foreach_copy_(copies, copied_values)  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the averaged weights, with the names of the model."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load the output of `state_dict`."""
        self.model.load_state_dict(state)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _averaged_tensor_ids(model: nn.Module) -> set[int]:
    """Return the `id` of each tensor to average: trainable parameters, and running means and variances."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    statistics = [buffer for module in norms for buffer in module.buffers(recurse=False)]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {id(tensor) for tensor in [*weights, *statistics] if tensor.is_floating_point()}
