"""Optimizer steps that are skipped because their gradient is not finite."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from batteries.checkpoint.io import materialize_buffers
from batteries.core.errors import RunError
from batteries.core.files import write_text
from batteries.core.text import list_first
from batteries.distributed.collectives import run_on_rank_zero
from batteries.distributed.unwrap import unwrap_model

logger = logging.getLogger("batteries")

MAX_SKIPPED_IN_A_ROW = 5  # steps; then the run ends
FP16_SCALE_HALVINGS = 16  # more steps that fp16 may skip until its loss scale of 2^16 is down to one


class GradientMonitor:
    """Keeps the gradient norm of each step on its device and reads many at once, since each read waits for the device.

    Attributes:
        skipped: The number of steps so far whose norm was not finite.
        last: The norm of the last step that was read; NaN before the first.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self.last = math.nan
        self._norms: list[torch.Tensor] = []

    def add(self, norm: torch.Tensor) -> None:
        """Keep the norm of one step, shape ()."""
        self._norms.append(norm)

    def read(self, step: int) -> list[tuple[int, bool]]:
        """List (step, was skipped) for the steps since the last read; `step` is the number of the last one."""
        norms = torch.stack(self._norms).tolist() if self._norms else []
        self._norms.clear()
        if norms:
            self.last = norms[-1]
        self.skipped += sum(not math.isfinite(norm) for norm in norms)
        return [(number, not math.isfinite(norm)) for number, norm in enumerate(norms, start=step - len(norms) + 1)]


class NonFiniteGuard:
    """Reports skipped steps, and ends the run after too many in a row.

    Attributes:
        monitor: The gradient norms.
        streak: The current streak of skipped steps: the ids of the samples of each, by the label of the step.
    """

    def __init__(self, file: Path, *, fp16: bool) -> None:
        """Create a guard.

        Args:
            file: Where the samples are listed if the run ends.
            fp16: The loss is scaled, so the first steps may overflow.
        """
        self.monitor = GradientMonitor()
        self.streak: dict[str, list[str]] = {}
        self._file = file
        self._fp16 = fp16

    def check(self, epoch_label: str, step: int, samples_of: Callable[[int], list[str]], lr_flag: str) -> None:
        """Read the steps up to `step` and log each one that was skipped. Every rank must call it.

        Args:
            epoch_label: The stage and epoch, as logged.
            step: The number of the last step in its epoch, from 1.
            samples_of: Returns the ids of the samples of a step.
            lr_flag: The option for the learning rate, which the error names.

        Raises:
            RunError: If too many steps in a row were skipped.
        """
        for number, was_skipped in self.monitor.read(step):
            if not was_skipped:
                self.streak = {}
                continue
            label = f"{epoch_label} step {number}"
            self.streak[label] = samples_of(number)
            reason = "its gradient is not finite"
            if self._fp16:
                reason = "its gradient overflowed fp16, so the loss scale is halved"
            logger.warning(f"{label} was skipped: {reason}.")
            if len(self.streak) >= MAX_SKIPPED_IN_A_ROW + FP16_SCALE_HALVINGS * self._fp16:
                self._end_run(label, lr_flag)

    def _end_run(self, last: str, lr_flag: str) -> None:
        """Write the samples of the streak and raise RunError."""
        text = json.dumps(self.streak, indent=2) + "\n"
        run_on_rank_zero(lambda: write_text(self._file, text))
        raise RunError(
            f"the run ends after {len(self.streak)} skipped steps in a row, up to {last}: their gradients are not "
            f"finite. Their samples are listed in {self._file}; those of the last step: "
            f"{list_first(self.streak[last])}. Check these samples, or try a smaller {lr_flag}."
        )


class BufferSnapshot:
    """The buffers of a model (batch norm's running statistics) before a step, restored if the step is skipped.

    A forward pass over an input that is not finite has already overwritten them, in place or by assignment
    (`self.mean = ...`), so they are found by module and name. Buffers of one device and dtype are kept in one tensor: a
    network has hundreds, and on a GPU starting a copy takes longer than the copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(unwrap_model(model).modules())
        self._places: list[tuple[nn.Module, str, torch.Tensor | None]] = []
        self._ids: list[int] = []  # of the buffers at these places
        self._groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        self.save()

    def save(self) -> None:
        """Copy the present values."""
        self._find()
        self._saved = {kind: _flatten(buffers) for kind, buffers in self._groups.items()}

    def restore_if_nonfinite(self, norm: torch.Tensor) -> None:
        """Restore the saved values if the gradient `norm`, shape (), is not finite; otherwise save the present ones.

        Does not wait for a GPU, unless a module has assigned a buffer.
        """
        if norm.device.type != "cpu" and self._ids == [id(buffer) for _, _, buffer in self._present()]:
            self._select(norm)
        elif math.isfinite(norm):
            self.save()
        else:
            self.restore()

    @torch.no_grad()
    def _select(self, norm: torch.Tensor) -> None:
        for kind, buffers in self._groups.items():
            kept = torch.where(torch.isfinite(norm), _flatten(buffers), self._saved[kind])
            torch._foreach_copy_(buffers, _split(kept, buffers))  # type: ignore[attr-defined]
            self._saved[kind] = kept

    @torch.no_grad()
    def restore(self) -> None:
        """Put the buffers of the last save back into their modules, with the saved values."""
        for module in self._modules:
            module._buffers.clear()  # also of those that the step has added
        for module, name, buffer in self._places:
            module._buffers[name] = buffer
        for kind, buffers in self._groups.items():
            torch._foreach_copy_(buffers, _split(self._saved[kind], buffers))  # type: ignore[attr-defined]

    def _find(self) -> None:
        """Note the present buffers, in groups of one device and dtype."""
        if self._ids == [id(buffer) for _, _, buffer in self._present()]:
            return
        for module in self._modules:
            materialize_buffers(module)
        self._places = self._present()
        self._ids = [id(buffer) for _, _, buffer in self._places]
        self._groups = {}
        for _, _, buffer in self._places:
            if buffer is not None:
                self._groups.setdefault((buffer.device, buffer.dtype), []).append(buffer)

    def _present(self) -> list[tuple[nn.Module, str, torch.Tensor | None]]:
        """List the module, the name and the tensor of each buffer; None for one that is registered without a value."""
        return [(module, name, buffer) for module in self._modules for name, buffer in module._buffers.items()]


def _flatten(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return all numbers of `tensors` in one dimension."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _split(numbers: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return views of `numbers` with the shapes of `like`: the inverse of `_flatten`."""
    pieces = numbers.split([tensor.numel() for tensor in like])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, like, strict=True)]
