"""Numeric precision: autocast and loss scaling."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch.amp import GradScaler

from batteries.core.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager:
    """Return the context of the forward pass: torch.autocast, or nothing for fp32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


def check_precision(device: torch.device, precision: Precision) -> None:
    """Raise UserError if `device` does not support `precision`."""
    if precision == "fp32" or _supports(device, precision):
        return
    alternatives = "fp32 or fp16" if precision == "bf16" else "fp32"
    raise UserError(f"--precision {precision} is not supported on {device}; use {alternatives}.")


def _supports(device: torch.device, precision: Precision) -> bool:
    """Return whether a matrix product works in `precision`, and bf16 without emulation."""
    if device.type == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported(False):
        return False
    try:
        with autocast(device, precision):
            torch.mm(torch.ones(2, 2, device=device), torch.ones(2, 2, device=device))
    except RuntimeError:
        return False
    return True


def make_scaler(device: torch.device, precision: Precision) -> GradScaler:
    """Build the loss scaler. It skips steps whose gradient is not finite, without waiting for a GPU.

    Returns:
        For fp16 a scaler that keeps small gradients representable. Otherwise a scaler with a constant scale of 1 on a
        GPU, and a disabled one on other devices.
    """
    if precision == "fp16":
        return GradScaler(device.type)
    if device.type == "cuda":
        return _ConstantScaler(device.type, init_scale=1.0)
    return GradScaler(device.type, enabled=False)


class _ConstantScaler(GradScaler):
    """Skips steps but does not scale. The kernel of a fused optimizer skips, so Python does not wait for the GPU."""

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        super().update(1.0)
