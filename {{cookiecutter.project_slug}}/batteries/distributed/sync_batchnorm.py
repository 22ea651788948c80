"""Batch norm with statistics over all ranks, also on a CPU, where torch's SyncBatchNorm raises (torch 2.15)."""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def convert_sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Replace every batch norm of `model` by one that synchronises its statistics over all ranks.

    Parameters, buffers, hooks and state names stay. A subclass keeps its attributes and its `forward`, in which
    `super().forward` is the synchronised one. A subclass that calls F.batch_norm itself is not synchronised, such as
    timm's BatchNormAct2d, for which timm.layers has another convert_sync_batchnorm.

    Args:
        model: The model, modified in place.
        device: The device that it is going to run on.

    Returns:
        The model; another module only if it is a batch norm itself.
    """
    base = SyncBatchNormCPU if device.type == "cpu" else nn.SyncBatchNorm
    converted: dict[nn.Module, nn.Module] = {
        module: _convert(module, base)
        for module in model.modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, base)
    }
    for name, module in list(model.named_modules(remove_duplicate=False)):  # a module can have several names
        if name and module in converted:
            model.set_submodule(name, converted[module])
    return converted.get(model, model)


def _convert(module: _BatchNorm, base: type[_BatchNorm]) -> nn.Module:
    """Return a module that shares the state of `module`, with `base` right before _BatchNorm in its class hierarchy."""
    kind = type(module)
    is_plain = kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    synchronised = base if is_plain else _subclass(kind, base)
    result: Any = synchronised.__new__(synchronised)
    result.__dict__.update(module.__dict__)
    if base is nn.SyncBatchNorm:
        result.process_group = None  # all ranks; the group itself could not be copied, and EMA copies the model
    return result


def _subclass(kind: type, base: type[_BatchNorm]) -> type[_BatchNorm]:
    """Return a subclass of both; Python's method resolution order puts `base` between `kind` and _BatchNorm."""
    return type(f"Sync{kind.__name__}", (kind, base), {"__module__": kind.__module__})


class SyncBatchNormCPU(_BatchNorm):
    """Batch norm whose mean and variance are those of a micro-batch over all ranks; differentiable.

    Input: (N, C, ...), with any N on each rank. Output: the same shape. In evaluation mode it is plain batch norm.
    Source: Ioffe and Szegedy 2015.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002 (torch's name)
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions (N, C, ...), got {input.ndim}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's name)
        """Normalise `input`."""
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        self._check_input_dim(input)
        # In float32, as torch does: sums of halves overflow, and a count over 256 is not exact in bfloat16.
        values = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        count, mean, variance = _statistics_over_ranks(values)
        if self.track_running_stats:
            self._update_running_statistics(count, mean.detach(), variance.detach())
        shape = (1, -1, *[1] * (input.ndim - 2))
        output = (values - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            output = output * self.weight.view(shape)
        if self.bias is not None:
            output = output + self.bias.view(shape)
        return output.to(input.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, count: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Update as nn.BatchNorm does: unbiased variance; momentum None means the average over all batches so far."""
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum  # type: ignore[operator]
        weight = torch.as_tensor(momentum, dtype=mean.dtype)
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.running_mean.lerp_(mean, weight)  # type: ignore[union-attr]
        self.running_var.lerp_(unbiased, weight)  # type: ignore[union-attr]


def _statistics_over_ranks(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return count (), mean (C,) and biased variance (C,) of `values` (N, C, ...) over all ranks.

    In two passes, because the mean of squares minus the square of the mean cancels in float32.
    """
    flat = values.transpose(0, 1).flatten(1)  # (C, N * ...)
    count = torch.tensor(float(flat.shape[1]), dtype=values.dtype)
    dist.all_reduce(count)
    mean = differentiable.all_reduce(flat.sum(1)) / count
    variance = differentiable.all_reduce((flat - mean.view(-1, 1)).square().sum(1)) / count
    return count, mean, variance
