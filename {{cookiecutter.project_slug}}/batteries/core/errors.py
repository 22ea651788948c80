"""User-facing errors, and explanations of library errors that users meet."""

import re


class UserError(Exception):
    """Invalid user input: a flag, a file or data. Shown as a one-line message without a traceback; exit code 2.

    It is not a ValueError because tyro replaces the message of a ValueError that Config raises.
    """


class RunError(Exception):
    """A run that cannot continue, for a reason the user can act on. One-line message, no traceback; exit code 1."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device or the host ran out of memory. torch has an exception class only for devices."""
    import torch

    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or on_cpu


def explain_nondeterministic(error: BaseException) -> str | None:
    """Name the option that allows an operation without a deterministic kernel; None if `error` is not about one."""
    text = str(error)
    if match := re.search(r"(\S+) does not have a deterministic implementation", text):
        operation = match[1]
    elif "CUBLAS_WORKSPACE_CONFIG" in text and "eterministic" in text:
        operation = "cuBLAS"
    else:
        return None
    return (
        f"{operation} has no deterministic implementation on this device; use --no-deterministic, or replace the "
        "operation in the model, the loss or the transforms."
    )


def explain_dead_worker(error: BaseException) -> str | None:
    """Explain why a DataLoader worker died and what helps; None if `error` is not about a worker."""
    text = str(error)
    if re.search(r"Too many open files|ancdata", text):
        return (
            "too many open files: each batch that a worker sends needs one. Use --sharing-strategy file_system, fewer "
            "--num-workers, or a higher limit (ulimit -n)."
        )
    if re.search(r"shared memory|\(shm\)|bus error|shm_open|torch_shm_manager", text, re.IGNORECASE):
        return (
            "DataLoader workers ran out of shared memory (/dev/shm, which is small in containers). Use fewer "
            "--num-workers, another --sharing-strategy, or a larger /dev/shm (docker run --shm-size)."
        )
    death = re.search(r"DataLoader worker \(pid\S* ([\d, ]+)\) (is killed by signal: (\w+)|exited unexpectedly)", text)
    if death is None:
        return None
    how = f"was ended by signal {death[3]}" if death[3] else "exited unexpectedly"
    return (
        f"DataLoader worker {death[1]} {how}, usually because RAM ran out. Reduce --num-workers, or use 0 to see the "
        "underlying error. If shared memory ran out, try another --sharing-strategy; after a segmentation fault, look "
        "for a damaged file."
    )
