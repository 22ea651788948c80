"""One optimizer step."""

import math

import torch
from torch.amp import GradScaler

from batteries.training.nonfinite import BufferSnapshot


def start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Let the momentum of SGD begin at zero, which gives the same steps.

    Fused, torch (2.15) takes memory for it in the first step, and leaves it as it was found where that step is skipped:
    from then on the weights are garbage. fp16 often skips its first step.
    """
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else []:
        for parameter in group["params"]:
            if group["momentum"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The norm of all `gradients` as one vector, shape (): that of their norms.

    As torch.nn.utils.get_total_norm without sorting them by device and type: 13 µs instead of 25 for six small ones.
    """
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))  # type: ignore[attr-defined]


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
    clip_norm: float | None = None,
    buffers: BufferSnapshot | None = None,
) -> torch.Tensor:
    """Unscale and clip the gradients, step, clear them; gives the norm of all together before it was clipped, shape ().

    Where the norm is not finite weights, optimizer and `buffers` stay as they were before the step. That is so on all
    ranks, since their gradients are the same.
    """
    scaler.unscale_(optimizer)
    parameters = [value for group in optimizer.param_groups for value in group["params"] if value.grad is not None]
    norm = _norm([value.grad for value in parameters])
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
