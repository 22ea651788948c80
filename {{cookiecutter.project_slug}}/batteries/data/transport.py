"""Shared memory in which the workers of a loader send their batches.

By default torch creates a shared memory file for each batch: the system clears its pages, both processes map them, and
they are released a moment later. Here each worker writes its batches to the same few files in turn, and the main
process copies each batch before it requests the next one.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

# A worker starts a batch when the main process has taken the one that is PREFETCH_FACTOR batches older, which it may
# still be copying. Every batch before that has been copied, so its memory can be written again.
PREFETCH_FACTOR = 2  # batches that are requested from each worker in advance, as torch's default
BUFFERS = PREFETCH_FACTOR + 1


class SharedBuffers:
    """The shared memory of one worker: BUFFERS for each part of a batch, used in turn."""

    def __init__(self) -> None:
        self._batches = 0
        self._parts = 0
        self._buffers: dict[tuple[int, int], torch.Tensor] = {}

    def start_batch(self) -> None:
        """Begin a batch in the memory of the oldest one."""
        self._batches += 1
        self._parts = 0

    def stack(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Stack tensors of equal shape and dtype in shared memory."""
        first = tensors[0]
        shape = (len(tensors), *first.shape)
        size = math.prod(shape) * first.element_size()
        return torch.stack(tensors, out=self._take(size)[:size].view(first.dtype).view(shape))

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor in shared memory, or the tensor itself if it is shared or not contiguous."""
        if tensor.is_shared() or not tensor.is_contiguous() or tensor.device.type != "cpu":
            return tensor
        size = tensor.numel() * tensor.element_size()
        return self._take(size)[:size].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def _take(self, size: int) -> torch.Tensor:
        """Return the buffer of the next part of the batch, at least `size` bytes, shape (N,), uint8."""
        key = self._batches % BUFFERS, self._parts
        self._parts += 1
        if key not in self._buffers or len(self._buffers[key]) < size:
            self._buffers[key] = torch.empty(size, dtype=torch.uint8).share_memory_()
        return self._buffers[key]


class CopiedBatches:
    """The batches of a loader with workers, each copied out of the shared memory of its worker."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        mapped: dict[int, torch.Tensor] = {}  # while a tensor of it exists, a buffer stays mapped into this process

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            mapped[tensor.untyped_storage().data_ptr()] = tensor
            return tensor.clone()

        for batch in self.batches:
            yield map_tensors(batch, copy)


def map_tensors(data: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply a function to a tensor, or to the tensors in lists, tuples and dicts."""
    if isinstance(data, torch.Tensor):
        return function(data)
    if isinstance(data, dict):
        return {name: map_tensors(value, function) for name, value in data.items()}
    if isinstance(data, list | tuple):
        items = [map_tensors(value, function) for value in data]
        is_named_tuple = hasattr(data, "_fields")
        return type(data)(*items) if is_named_tuple else type(data)(items)
    return data
