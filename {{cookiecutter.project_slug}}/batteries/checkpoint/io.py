"""Reading and writing one checkpoint file."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from batteries.checkpoint.manifest import AVERAGE, MANIFEST, read_average, read_manifest
from batteries.checkpoint.plain_values import to_plain
from batteries.core.errors import UserError
from batteries.core.files import DiskFullError, is_disk_full, write_atomically
from batteries.core.text import list_first
from batteries.distributed.collectives import run_on_rank_zero
from batteries.distributed.unwrap import unwrap_model

FORMAT = 2


class DamagedCheckpoint(UserError):
    """A checkpoint that is missing, or whose bytes are not those that were written."""


class Scheduler(Protocol):
    """The methods of a learning-rate scheduler that checkpoints use; those of torch have them."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain values."""
        ...

    def load_state_dict(self, state: Any, /) -> None:
        """Load the output of `state_dict`."""


def make_checkpoint(
    stage: str,
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Scheduler | None = None,
    metrics: Mapping[str, Any] | None = None,
    experiment_args: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    step: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build a checkpoint of tensors and plain values. The tensors are those of the model, not copies.

    Scalars of numpy become plain numbers.

    Args:
        stage: The name of the stage.
        epoch: The epoch, from 1.
        model: The model; it can be wrapped. The names in the checkpoint are those of the unwrapped model.
        optimizer: The optimizer, if it is to be resumed.
        scheduler: The scheduler, if it is to be resumed.
        metrics: The metrics of the epoch, by split.
        experiment_args: The options of the run, as JSON values.
        model_args: The arguments of build_model.
        step: The optimizer steps of the stage so far.
        extra: More entries.

    Raises:
        UserError: If a value cannot be read again with `weights_only=True`; the message has its place.
    """
    checkpoint = {
        "format": FORMAT,
        "stage": stage,
        "epoch": epoch,
        "step": step,
        "model_state_dict": unwrap_model(model).state_dict(),
        "optimizer_state_dict": optimizer.state_dict() if optimizer else None,
        "scheduler_state_dict": scheduler.state_dict() if scheduler else None,
        "metrics": dict(metrics or {}),
        "experiment_args": dict(experiment_args or {}),
        "model_args": dict(model_args or {}),
        **(extra or {}),
    }
    return to_plain(checkpoint)


def save_checkpoint(path: str | Path, checkpoint: Mapping[str, Any]) -> tuple[int, str]:
    """Write a checkpoint atomically.

    Args:
        path: The file; its directory must exist.
        checkpoint: The output of `make_checkpoint`.

    Returns:
        The size of the file in bytes, and its sha256 in hexadecimal.

    Raises:
        UserError: If a value cannot be read again with `weights_only=True`.
        DiskFullError: If the disk is full; a previous file at `path` is unchanged.
    """
    writer = _HashingWriter()

    def write(file: BinaryIO) -> None:
        writer.file = file
        torch.save(to_plain(dict(checkpoint)), cast(IO[bytes], writer))

    try:
        write_atomically(Path(path), write)
    except Exception as error:
        if is_disk_full(writer.error or error):
            raise DiskFullError(Path(path), count_bytes(checkpoint)) from None
        raise
    return writer.bytes, writer.sha256


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Scheduler | None = None,
) -> dict[str, Any]:
    """Load a checkpoint into `model`, and into `optimizer` and `scheduler` if they are given. Every rank must call it.

    Rank 0 reads the file for all. The file is verified against the manifest next to it, and loading does not execute
    code (`weights_only=True`).

    Args:
        path: The file.
        model: The model; it can be wrapped.
        optimizer: The optimizer to resume.
        scheduler: The scheduler to resume.

    Returns:
        The complete checkpoint, on the CPU.

    Raises:
        UserError: On all ranks, before anything is loaded, if the file is missing, truncated, changed, or does not fit
            the architecture of the model.
    """
    checkpoint = run_on_rank_zero(lambda: read_checkpoint(Path(path)))
    apply_checkpoint(checkpoint, str(path), model, optimizer, scheduler)
    return checkpoint


def load_weights(path: str | Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint: the EMA weights if it has them, because its score is theirs."""
    checkpoint = run_on_rank_zero(lambda: read_checkpoint(Path(path)))
    apply_checkpoint({"model_state_dict": scored_weights(checkpoint)}, str(path), model)


def scored_weights(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the weights to which the score of a checkpoint belongs: the EMA weights if it has them."""
    return checkpoint.get("ema_state_dict") or checkpoint["model_state_dict"]


def apply_checkpoint(
    checkpoint: Mapping[str, Any],
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Scheduler | None = None,
) -> None:
    """Load the contents of a checkpoint into model, optimizer and scheduler.

    Args:
        checkpoint: The output of `read_checkpoint`.
        name: What errors call it, such as its path.
        model: The model; it can be wrapped.
        optimizer: The optimizer to resume.
        scheduler: The scheduler to resume.

    Raises:
        UserError: If the checkpoint does not fit the architecture of the model; then nothing is loaded.
    """
    network = unwrap_model(model)
    make_loadable(network)
    check_architecture(name, checkpoint["model_state_dict"], network)
    network.load_state_dict(checkpoint["model_state_dict"])
    if optimizer is not None:
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    if scheduler is not None:
        scheduler.load_state_dict(checkpoint["scheduler_state_dict"])


def make_loadable(model: nn.Module) -> None:
    """Make sure that values can be copied into every tensor of a model.

    Raises:
        UserError: If it has lazy modules, whose weights do not exist before the first forward pass.
    """
    lazy = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if is_lazy(tensor)]
    if lazy:
        raise UserError(
            f"build_model returns lazy modules, whose weights have no shape yet ({list_first(lazy, 3)}). Give their "
            "sizes, or initialise them in build_model with one forward pass, such as "
            "model.eval()(torch.zeros(1, 3, 32, 32))."
        )
    for module in model.modules():
        materialize_buffers(module)


def materialize_buffers(module: nn.Module) -> None:
    """Give each buffer memory for all of its elements: those of an expanded tensor share it."""
    for name, buffer in module._buffers.items():
        if buffer is not None and _is_expanded(buffer):
            module._buffers[name] = buffer.clone(memory_format=torch.contiguous_format)


def _is_expanded(tensor: torch.Tensor) -> bool:
    return any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, after its sha256 was compared with the manifest next to it.

    Raises:
        DamagedCheckpoint: If the file is missing, or its sha256 is not in the manifest.
        UserError: If it is not a checkpoint, or cannot be read as one.
    """
    if not path.is_file():
        problem = "is a directory" if path.is_dir() else "does not exist"
        raise DamagedCheckpoint(
            f"{path} {problem}; give the path of a checkpoint, such as logs/baseline/stage0/best.pth."
        )
    _verify_sha256(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint of tensors and plain values ({_describe_load_error(error)})."
        ) from error
    if not isinstance(checkpoint, dict) or "model_state_dict" not in checkpoint:
        raise UserError(f"{path} has no model_state_dict; give a file with the output of make_checkpoint.")
    return checkpoint


def _describe_load_error(error: Exception) -> str:
    """Return the type of an error of torch.load, and the type of the value that weights_only does not allow."""
    forbidden = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
    return type(error).__name__ + (f": it holds a {forbidden[1]}" if forbidden else "")


class _HashingWriter:
    """Counts and hashes the bytes that pass to `file`, so that the file need not be read again.

    Attributes:
        file: The file to write to.
        bytes: The number of bytes so far.
        error: The error of the last write, if it failed; torch replaces it with an error without a code.
    """

    file: BinaryIO

    def __init__(self) -> None:
        self.bytes = 0
        self.error: OSError | None = None
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.bytes += len(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def count_bytes(value: Any) -> int:
    """Return the bytes of all tensors in a checkpoint, which is nearly the size of its file."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(count_bytes, value.values()))
    return sum(map(count_bytes, value)) if isinstance(value, list | tuple) else 0


def _verify_sha256(path: Path) -> None:
    """Raise DamagedCheckpoint if the sha256 of a checkpoint is not in the manifest next to it.

    The file name is not compared: best.pth and last.pth have the contents of some entry.
    """
    if path.name == AVERAGE:
        manifest = path.with_suffix(".json")
        expected = [read_average(path.parent).get("sha256")]
    else:
        manifest = path.parent / MANIFEST
        expected = [entry.sha256 for entry in read_manifest(path.parent).entries]
    if not manifest.is_file():
        return
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 not in expected:
        raise DamagedCheckpoint(
            f"{path} does not match the sha256 in {manifest.name} next to it: it is truncated or was changed; use "
            "another checkpoint."
        )


def check_architecture(name: str, state: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """Raise UserError, with the names of the tensors, if weights do not fit a model.

    Args:
        name: What the error calls the checkpoint.
        state: The weights.
        model: The model, unwrapped.
    """
    expected = model.state_dict()
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    differences = {"missing": missing, "unexpected": unexpected, "different shape": shapes}
    found = [f"{kind}: {', '.join(keys)}" for kind, keys in differences.items() if keys]
    if found:
        raise UserError(f"{name} does not fit the architecture of the model ({'; '.join(found)}).")
