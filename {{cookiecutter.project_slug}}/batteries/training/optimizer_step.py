"""One optimizer step."""

import math

import torch
from torch.amp import GradScaler

from batteries.training.nonfinite import BufferSnapshot


def start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Initialise the momentum of SGD with zeros, which gives the same steps as torch.

    torch (2.15) allocates the momentum of fused SGD in the first step and does not initialise it if that step is
    skipped; the weights are invalid from then on. fp16 often skips the first step. Other optimizers are not changed.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if not group["momentum"]:
            continue
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return the norm of all gradients together, shape ().

    Like torch.nn.utils.get_total_norm, but without grouping by device and dtype: 13 µs instead of 25 for six small
    gradients.
    """
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))  # type: ignore[attr-defined]


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
    clip_norm: float | None = None,
    buffers: BufferSnapshot | None = None,
) -> torch.Tensor:
    """Unscale and clip the gradients, update the weights, and clear the gradients.

    If the gradient norm is not finite, the step is skipped: weights, optimizer and `buffers` stay as they were before
    it. All ranks decide alike, because their gradients are equal.

    Args:
        optimizer: The optimizer.
        scaler: The loss scaler, from `make_scaler`.
        clip_norm: The maximum gradient norm; None disables clipping.
        buffers: The buffers of the model before the step.

    Returns:
        The norm of all gradients together before clipping, shape ().
    """
    scaler.unscale_(optimizer)
    parameters = [value for group in optimizer.param_groups for value in group["params"] if value.grad is not None]
    norm = _total_norm([value.grad for value in parameters])
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    elif math.isfinite(norm):
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    if buffers is not None:
        buffers.restore_if_nonfinite(norm)
    return norm
