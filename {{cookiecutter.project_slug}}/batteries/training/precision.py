"""Numeric precision."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch.amp import GradScaler

from batteries.core.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager:
    """The forward pass goes in here: matrix products and convolutions in `precision`, what needs it in float32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


def check_precision(device: torch.device, precision: Precision) -> None:
    """Raise BadInput where `device` cannot compute in `precision`, with what it can."""
    if precision == "fp32":
        return
    lacking = device.type == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported(False)
    try:
        with autocast(device, precision):
            torch.mm(torch.ones(2, 2, device=device), torch.ones(2, 2, device=device))
    except RuntimeError:
        lacking = True
    if lacking:
        raise UserError(f"--precision {precision} is not for {device}; use fp32{' or fp16' * (precision == 'bf16')}.")


def make_scaler(device: torch.device, precision: Precision) -> GradScaler:
    """What scales the loss, so that small gradients survive fp16, and skips steps without a wait for a GPU."""
    if precision == "fp16":
        return GradScaler(device.type)
    return _Unscaled(device.type, init_scale=1.0) if device.type == "cuda" else GradScaler(device.type, enabled=False)


class _Unscaled(GradScaler):
    """Only skips. On a GPU the optimizer's own kernel does that: no python has to know, so none waits for it."""

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        super().update(1.0)
