"""Metrics, summed on the device and read once: a read waits for the GPU, so no step may do it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from batteries.distributed import gather_over_ranks, is_main, rank, sum_over_ranks, union_over_ranks, world_size


class Averages:
    """Means over samples, exact for any number of batches and ranks.

    Sums in float64, or float32 on mps, which has no float64.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        self.sums: dict[str, torch.Tensor] = {}
        self.device = device
        self.dtype = torch.float32 if device.type == "mps" else torch.float64

    def update(self, count: int, **values: torch.Tensor) -> None:
        """Add `count` samples; a value is one number per sample, shape (count,), or their mean, shape ()."""
        self.count += count
        for name, value in values.items():
            if value.shape not in ((), (count,)):
                raise ValueError(
                    f"metric {name} has shape {tuple(value.shape)} for {count} samples; give () or ({count},)"
                )
            value = value.detach()
            total = value.sum(dtype=self.dtype) if value.ndim else value.to(self.dtype) * count
            self.sums[name] = self.sums[name] + total if name in self.sums else total

    def compute(self, expected_count: int | None = None) -> dict[str, float]:
        """The means over all ranks. Waits for the device. Every rank has to call it.

        `expected_count` asserts how many samples there must have been, over all ranks.
        """
        names = union_over_ranks(self.sums)  # a rank without a batch knows none
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        values = [torch.full_like(zero, self.count), *(self.sums.get(name, zero) for name in names)]
        count, *sums = sum_over_ranks(torch.stack(values)).tolist()
        assert expected_count is None or count == expected_count, f"{count} samples instead of {expected_count}"
        return {name: total / count for name, total in zip(names, sums, strict=True)}

    def compute_local(self) -> dict[str, float]:
        """The means on this rank so far, for the progress bar. Waits for the device."""
        return {name: (total / self.count).item() for name, total in self.sums.items()}

    def state(self) -> list[dict[str, Any]]:
        """The sums of every rank, as plain values. Every rank has to call it."""
        sums = {name: total.item() for name, total in self.sums.items()}
        return gather_over_ranks({"count": self.count, "sums": sums})

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Go on from what `state` gave; with another number of ranks the first takes the sums of all."""
        parts = [state[rank()]] if len(state) == world_size() else state if is_main() else []
        self.count = sum(part["count"] for part in parts)
        for name in sorted(set().union(*(part["sums"] for part in parts))):
            total = sum(part["sums"].get(name, 0.0) for part in parts)
            self.sums[name] = torch.tensor(total, dtype=self.dtype, device=self.device)
