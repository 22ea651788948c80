"""Batch norm over all ranks on a CPU, where torch's own SyncBatchNorm refuses to run (torch 2.15)."""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with every batch norm taking its statistics over all ranks; parameters, buffers and their names stay."""
    if device.type == "cpu":
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.__class__ = SyncBatchNormCPU
        return model
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


class SyncBatchNormCPU(_BatchNorm):
    """The mean and variance of a micro-batch over all ranks (Ioffe and Szegedy 2015), differentiable.

    Input (N, C, ...), N of any size on each rank. In evaluation it is plain batch norm.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002 (torch's name)
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions (N, C, ...), got {input.ndim}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's name)
        """Normalised input, same shape."""
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
        output = output * self.weight.view(shape) + self.bias.view(shape) if self.affine else output
        return output.to(input.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, count: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """As nn.BatchNorm does: unbiased variance; momentum None means the average over all batches so far."""
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum  # type: ignore[operator]
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.running_mean.lerp_(mean, torch.as_tensor(momentum, dtype=mean.dtype))  # type: ignore[union-attr]
        self.running_var.lerp_(unbiased, torch.as_tensor(momentum, dtype=mean.dtype))  # type: ignore[union-attr]


def _statistics_over_ranks(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count, mean (C) and biased variance (C) of values (N, C, ...) over all ranks.

    In two passes, since the mean of squares less the square of the mean cancels in float32.
    """
    flat = values.transpose(0, 1).flatten(1)  # (C, N * ...)
    count = torch.tensor(float(flat.shape[1]), dtype=values.dtype)
    dist.all_reduce(count)
    mean = differentiable.all_reduce(flat.sum(1)) / count
    variance = differentiable.all_reduce((flat - mean.view(-1, 1)).square().sum(1)) / count
    return count, mean, variance
