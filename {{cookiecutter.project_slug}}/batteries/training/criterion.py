"""The loss function of the user: on the device, and a mean over samples."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from batteries.core.errors import UserError
from batteries.training.state import StepLogger

RELATIVE_TOLERANCE = 1e-3  # float32 means of two halves and of the whole batch differ by about 1e-7
ABSOLUTE_TOLERANCE = 1e-6
DEPENDS_ON_BATCHES = (
    "The loss of a batch is not the mean over its samples, for example because of class weights, ignore_index or "
    "reduction='sum'. So the gradient depends on --accumulation-steps and the number of processes, and the validation "
    "loss on --valid-batch-size. In build_criterion, multiply the loss of each sample (reduction='none') by its "
    "weight, and take the mean."
)
Criterion = Callable[..., torch.Tensor]


def prepare_criterion(criterion: Criterion, run: StepLogger) -> Criterion:
    """Move a loss function to the device of a run, and warn if its value is not the mean over samples.

    The gradient of a step is the mean over its micro-batches and ranks, and the validation loss that over its batches.
    Both are right only for a loss that is itself a mean over samples, which the first call checks: the loss of a batch
    must be the mean of the losses of its halves.

    Args:
        criterion: The output of build_criterion: a module, or another function of outputs and targets.
        run: The run, which logs the warning once.

    Returns:
        A function that returns the loss, shape ().
    """
    return _CheckedCriterion(_move(criterion, run.device), run)


class _CheckedCriterion:
    """Calls a loss function; the first call checks it."""

    def __init__(self, criterion: Criterion, run: StepLogger) -> None:
        self._criterion = criterion
        self._run = run
        self._is_checked = False

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        loss = self._criterion(*tensors)
        if not self._is_checked:
            self._is_checked = True
            if isinstance(loss, torch.Tensor) and loss.ndim > 0:
                raise UserError(
                    f"the loss has shape {tuple(loss.shape)} and must be one number; in build_criterion, take the mean "
                    "over samples (reduction='mean', or .mean())."
                )
            if _depends_on_batches(self._criterion, tensors, loss):
                self._run.warn_once(DEPENDS_ON_BATCHES)
        return loss


@torch.no_grad()
def _depends_on_batches(criterion: Criterion, tensors: tuple[Any, ...], loss: torch.Tensor) -> bool:
    """Return whether the loss of a batch differs from the mean of the losses of its two halves.

    False if it is unknown: for one sample, for arguments that are not batches, and for a value that is not finite.
    """
    if not all(isinstance(tensor, torch.Tensor) and tensor.ndim > 0 for tensor in tensors):
        return False
    count = len(tensors[0])
    if count < 2 or any(len(tensor) != count for tensor in tensors):
        return False
    tensors = tuple(tensor.detach().float() if tensor.is_floating_point() else tensor for tensor in tensors)
    half = count // 2
    try:
        copied = copy.deepcopy(criterion)  # the criterion can count its calls
        whole, first, second = (
            float(copied(*part)) for part in (tensors, [t[:half] for t in tensors], [t[half:] for t in tensors])
        )
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    mean = (half * first + (count - half) * second) / count
    is_known = math.isfinite(whole) and math.isfinite(mean)
    return is_known and not math.isclose(whole, mean, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)


def _move(criterion: Criterion, device: torch.device) -> Criterion:
    """Move the tensors of a loss function: those of a module, also plain attributes, and the arguments of a partial."""
    if isinstance(criterion, partial):
        arguments = [_move_tensor(value, device) for value in criterion.args]
        keywords = {name: _move_tensor(value, device) for name, value in criterion.keywords.items()}
        return partial(_move(criterion.func, device), *arguments, **keywords)
    if not isinstance(criterion, nn.Module):
        return criterion
    for module in criterion.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor):
                setattr(module, name, value.to(device))
    return criterion.to(device)


def _move_tensor(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
