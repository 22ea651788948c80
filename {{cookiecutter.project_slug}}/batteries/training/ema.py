"""Exponential moving average of the weights."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import get_ema_multi_avg_fn

from batteries.core.errors import UserError
from batteries.core.ranks import is_rank_zero
from batteries.distributed.unwrap import unwrap_model

logger = logging.getLogger("batteries")


def decay_of_step(decay: float, step: int) -> float:
    """Return the decay after `step` earlier steps: min(decay, (1 + step) / (10 + step)).

    It rises from 0.1, so that the random start is forgotten at any decay, as in tf.train.ExponentialMovingAverage.
    """
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """A copy of a model with averaged weights: average = d * average + (1 - d) * weights after each step.

    The decay d rises to `decay`, see `decay_of_step`; then the average covers about 1 / (1 - decay) steps. Trainable
    parameters and batch norm statistics are averaged; frozen parameters and other buffers, such as a mask of -inf, are
    copied. The arithmetic is that of torch.optim.swa_utils; its AveragedModel is not used because it waits for the GPU
    in each step.

    Attributes:
        model: The model with the averaged weights.
        steps: The number of optimizer steps so far; each stage starts from 0.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start with the present weights.

        Args:
            model: The model; it can be wrapped.
            decay: The maximum decay per step, between 0 and 1.

        Raises:
            UserError: If the model cannot be copied.
        """
        self.model = copy_model(unwrap_model(model)).requires_grad_(False)
        self.steps = 0
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the weights of `model`; call it after each optimizer step."""
        network = unwrap_model(model)
        _match_buffers(self.model, network)
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
        update_averages = get_ema_multi_avg_fn(decay_of_step(self._decay, self.steps))
        update_averages(averages, averaged_values, 0)
        if copies:
            torch._foreach_copy_(copies, copied_values)  # type: ignore[attr-defined]
        self.steps += 1

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the averaged weights, with the names of the model."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load the output of `state_dict`."""
        self.model.load_state_dict(state)


class NamedStage(Protocol):
    """The options of a stage that determine its length."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def epochs(self) -> int:
        """The passes over the train split."""
        ...


def warn_of_short_stages(decay: float | None, stages: Sequence[NamedStage], steps_per_epoch: int) -> None:
    """Log a warning for each stage that is shorter than the 1 / (1 - decay) steps which the average covers.

    Args:
        decay: The maximum decay; None without EMA.
        stages: All stages.
        steps_per_epoch: The optimizer steps of an epoch.
    """
    if decay is None or not is_rank_zero():
        return
    covered = round(1 / (1 - decay))
    for stage in stages:
        steps = stage.epochs * steps_per_epoch
        if covered > steps:
            logger.warning(
                f"--ema-decay {decay:g} averages over about {covered:,} steps, but {stage.name} has {steps:,}, in "
                f"which the decay rises to {decay_of_step(decay, steps - 1):.3g}; use a smaller one, or more epochs."
            )


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model. Tensors that it keeps with their graph are copied without it.

    copy.deepcopy rejects such tensors. torch.nn.utils.weight_norm keeps one, and so does a module that keeps an output.

    Raises:
        UserError: If the model has an attribute that cannot be copied, such as an open file.
    """
    visited: set[int] = set()
    with_graph = [tensor for module in model.modules() for tensor in _tensors_with_graph(vars(module), visited)]
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in with_graph}
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0].strip()
        raise UserError(f"--ema-decay needs a copy of the model, which cannot be copied ({reason}).") from error


def _tensors_with_graph(value: Any, visited: set[int]) -> Iterator[torch.Tensor]:
    """Find the tensors with a graph in an attribute: in it, in containers, and in the attributes of other objects."""
    if isinstance(value, torch.Tensor):
        if value.grad_fn is not None:
            yield value
        return
    if id(value) in visited or isinstance(value, nn.Module | type):  # all modules are visited separately
        return
    visited.add(id(value))
    if isinstance(value, Mapping):
        children = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        children = value
    else:
        children = getattr(value, "__dict__", {}).values()
    for child in list(children):
        yield from _tensors_with_graph(child, visited)


def _match_buffers(copied: nn.Module, model: nn.Module) -> None:
    """Give the copy the buffers that a module of the model has added, or replaced by ones of another shape."""
    for own, module in zip(copied.modules(), model.modules(), strict=True):
        for name, value in module._buffers.items():
            before = own._buffers.get(name)
            if _layout(before) != _layout(value):
                persistent = name not in module._non_persistent_buffers_set
                own.register_buffer(name, None if value is None else value.detach().clone(), persistent)


def _layout(buffer: torch.Tensor | None) -> tuple[Any, ...] | None:
    return None if buffer is None else (buffer.shape, buffer.dtype, buffer.device)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _averaged_tensor_ids(model: nn.Module) -> set[int]:
    """Return the `id` of each tensor to average: trainable parameters, and running means and variances."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    statistics = [buffer for module in norms for buffer in module.buffers(recurse=False)]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {id(tensor) for tensor in [*weights, *statistics] if tensor.is_floating_point()}
