"""Reading and writing one checkpoint file."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol, cast

import torch
from torch import nn

from batteries.checkpoint.manifest import AVERAGE, MANIFEST, read_average, read_manifest
from batteries.core.errors import UserError
from batteries.core.files import DiskFullError, is_disk_full, write_atomically
from batteries.distributed.collectives import run_on_rank_zero
from batteries.distributed.unwrap import unwrap_model

FORMAT = 2


class Scheduler(Protocol):
    """What a checkpoint asks of a scheduler, of torch or not."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        ...

    def load_state_dict(self, state: Any, /) -> None:
        """Go on from what `state_dict` gave."""


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
    """Everything that a later run needs, as tensors and plain values.

    `step` counts the optimizer steps of the stage; `extra` is what a run keeps besides. The model's state is the bare
    one, without a wrapper's prefix.
    """
    return {
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


def save_checkpoint(path: str | Path, checkpoint: Mapping[str, Any]) -> tuple[int, str]:
    """Write `checkpoint` into `path` in one step; gives its size in bytes and its sha256.

    Raises DiskFull where there is no room for it; what was at `path` before is still there then.
    """
    digest = _HashingWriter()
    try:
        write_atomically(Path(path), lambda file: torch.save(dict(checkpoint), cast(IO[bytes], digest.over(file))))
    except Exception as error:
        if is_disk_full(digest.error or error):
            raise DiskFullError(Path(path), count_bytes(checkpoint)) from None
        raise
    return digest.bytes, digest.sha256


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Scheduler | None = None,
) -> dict[str, Any]:
    """Put a checkpoint into `model`, and into optimizer and scheduler where they are given; gives it back whole.

    The file is compared with the ledger beside it, and no code in it is run (`weights_only`). Every rank calls this;
    rank 0 reads for all. Raises BadInput, on all ranks, for a file that is missing, torn, changed, or of another
    architecture, before anything is loaded.
    """
    checkpoint = run_on_rank_zero(lambda: read_checkpoint(Path(path)))
    apply_checkpoint(checkpoint, str(path), model, optimizer, scheduler)
    return checkpoint


def load_weights(path: str | Path, model: nn.Module) -> None:
    """Put the weights of a checkpoint into `model`: the averaged ones where it has them, since those were scored."""
    checkpoint = run_on_rank_zero(lambda: read_checkpoint(Path(path)))
    apply_checkpoint({"model_state_dict": scored_weights(checkpoint)}, str(path), model)


def scored_weights(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights that the score of a checkpoint belongs to: their moving average where there is one."""
    return checkpoint.get("ema_state_dict") or checkpoint["model_state_dict"]


def apply_checkpoint(
    checkpoint: Mapping[str, Any],
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Scheduler | None = None,
) -> None:
    """Put a checkpoint that was read into model, optimizer and scheduler; `name` is what an error calls it."""
    network = unwrap_model(model)
    check_architecture(name, checkpoint["model_state_dict"], network)
    network.load_state_dict(checkpoint["model_state_dict"])
    if optimizer is not None:
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    if scheduler is not None:
        scheduler.load_state_dict(checkpoint["scheduler_state_dict"])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint in `path`, on the CPU, after its bytes were compared with the ledger beside it."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise UserError(f"{path} {what}; give the path of a checkpoint, such as logs/baseline/stage0/best.pth.")
    _check_bytes(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = type(error).__name__
        raise UserError(f"{path} cannot be read as a checkpoint of tensors and plain values ({reason}).") from error
    if not isinstance(checkpoint, dict) or "model_state_dict" not in checkpoint:
        raise UserError(f"{path} holds no model_state_dict; give a file that make_checkpoint made.")
    return checkpoint


class _HashingWriter:
    """Counts and hashes what is written through it, so that the file is not read again."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.bytes = 0
        self.error: OSError | None = None  # torch reports it as one of its own

    def over(self, file: BinaryIO) -> "_HashingWriter":
        self._file = file
        return self

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.bytes += len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def count_bytes(value: Any) -> int:
    """Bytes of all tensors in a checkpoint: nearly those of its file."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(count_bytes, value.values()))
    return sum(map(count_bytes, value)) if isinstance(value, list | tuple) else 0


def _check_bytes(path: Path) -> None:
    """Compare a file with the ledger beside it, by its contents: links have the contents of some row."""
    if path.name == AVERAGE:
        ledger, listed = path.with_suffix(".json"), [read_average(path.parent).get("sha256")]
    else:
        ledger, listed = path.parent / MANIFEST, [row.sha256 for row in read_manifest(path.parent)["rows"]]
    if not ledger.is_file():
        return
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 not in listed:
        raise UserError(
            f"{path} is not the file that {ledger.name} beside it lists: it was torn or changed; use another."
        )


def check_architecture(name: str, state: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """Raise BadInput where `state`, of the checkpoint called `name`, does not fit `model`, with the names."""
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    differences = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    found = [f"{kind}: {', '.join(names)}" for kind, names in differences.items() if names]
    if found:
        raise UserError(f"{name} is of another architecture than the model ({'; '.join(found)}).")
