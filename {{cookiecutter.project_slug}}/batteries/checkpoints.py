"""Checkpoints: last, best and n best, each file whole or not there, with a ledger that says what should be in it.

A stage's folder holds `epoch_7.pth` and its like, `best.pth` and `last.pth` (second names of two of them), and
`checkpoints.json`, the ledger: file, bytes, sha256, epoch, step and score of each. Tensors and plain values only.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import nn

from batteries.distributed import on_main
from batteries.errors import BadInput
from batteries.files import link_atomically, write_atomically, write_text
from batteries.parallel import bare

FORMAT = 1
LEDGER = "checkpoints.json"


@dataclass(frozen=True)
class Row:
    """One line of the ledger. `score` is None where it was not finite (JSON has no NaN)."""

    file: str
    bytes: int
    sha256: str
    epoch: int
    step: int
    score: float | None


def make_checkpoint(
    stage: str,
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    metrics: Mapping[str, Any] | None = None,
    experiment_args: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    step: int = 0,
    resume: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that a later run needs, as tensors and plain values.

    `step` counts the optimizer steps of the stage; `resume` is what batteries.resume needs besides. The model's state
    is the bare one, without a wrapper's prefix.
    """
    return {
        "format": FORMAT,
        "stage": stage,
        "epoch": epoch,
        "step": step,
        "model_state_dict": bare(model).state_dict(),
        "optimizer_state_dict": optimizer.state_dict() if optimizer else None,
        "scheduler_state_dict": scheduler.state_dict() if scheduler else None,
        "metrics": dict(metrics or {}),
        "experiment_args": dict(experiment_args or {}),
        "model_args": dict(model_args or {}),
        "resume": dict(resume or {}),
    }


def save_checkpoint(path: str | Path, checkpoint: Mapping[str, Any]) -> tuple[int, str]:
    """Write `checkpoint` into `path` in one step; gives its size in bytes and its sha256."""
    digest = _Digest()
    write_atomically(Path(path), lambda file: torch.save(dict(checkpoint), cast(IO[bytes], digest.over(file))))
    return digest.bytes, digest.sha256


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> dict[str, Any]:
    """Put a checkpoint into `model`, and into optimizer and scheduler where they are given; gives it back whole.

    The file is compared with the ledger beside it, and no code in it is run (`weights_only`). Every rank calls this;
    rank 0 reads for all. Raises BadInput, on all ranks, for a file that is missing, torn, changed, or of another
    architecture, before anything is loaded.
    """
    checkpoint = on_main(lambda: read_checkpoint(Path(path)))
    apply_checkpoint(checkpoint, str(path), model, optimizer, scheduler)
    return checkpoint


def apply_checkpoint(
    checkpoint: Mapping[str, Any],
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> None:
    """Put a checkpoint that was read into model, optimizer and scheduler; `name` is what an error calls it."""
    network = bare(model)
    _check_architecture(name, checkpoint["model_state_dict"], network)
    network.load_state_dict(checkpoint["model_state_dict"])
    if optimizer is not None:
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    if scheduler is not None:
        scheduler.load_state_dict(checkpoint["scheduler_state_dict"])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint in `path`, on the CPU, after its bytes were compared with the ledger beside it."""
    if not path.is_file():
        raise BadInput(f"{path} is not there; give the path of a checkpoint, such as logs/baseline/stage0/best.pth.")
    _check_bytes(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{path} cannot be read as a checkpoint of tensors and plain values ({reason}).") from error
    if not isinstance(checkpoint, dict) or "model_state_dict" not in checkpoint:
        raise BadInput(f"{path} holds no model_state_dict; give a file that make_checkpoint made.")
    return checkpoint


class CheckpointManager:
    """Keeps the n best checkpoints of one stage in `logdir`, and the two newest: one in reserve, should a disk fail.

    A score that is not finite is never best; a tie keeps the earlier. Every rank makes the same calls; rank 0 writes.
    """

    def __init__(
        self, logdir: str | Path, metric: str = "accuracy", metric_minimization: bool = False, save_n_best: int = 5
    ) -> None:
        assert save_n_best > 0
        self.logdir = Path(logdir)
        self.metric = metric
        self.metric_minimization = metric_minimization
        self.save_n_best = save_n_best
        self.rows: list[Row] = []
        self.best_score: float | None = None
        self.best_epoch: int | None = None

    def process(self, score: float, epoch: int, checkpoint: Mapping[str, Any]) -> bool:
        """Write the checkpoint of `epoch`, point last and best at what they name; whether it is the new best."""
        score = float(score)
        is_best = self.is_better(score)
        if is_best:
            self.best_score, self.best_epoch = score, epoch
        on_main(lambda: self._write(f"epoch_{epoch}.pth", score, checkpoint, is_best))
        return is_best

    def save(self, checkpoint: Mapping[str, Any]) -> None:
        """Write a checkpoint within an epoch: it has no score, and stays until two newer ones are there."""
        name = f"epoch_{checkpoint['epoch']}_step_{checkpoint['step']}.pth"
        on_main(lambda: self._write(name, math.nan, checkpoint, is_best=False))

    def restore(self, checkpoint: Mapping[str, Any] | None = None) -> None:
        """Go on with the ledger in `logdir`: up to `checkpoint`, or to its end where the stage is finished."""
        ledger = on_main(lambda: read_ledger(self.logdir))
        self.rows = [row for row in ledger["rows"] if checkpoint is None or row.step <= checkpoint["step"]]
        best = (checkpoint or ledger)["best"]
        self.best_epoch, self.best_score = best["epoch"], best["score"]
        if checkpoint is not None:
            on_main(self._mend)

    def discard(self) -> None:
        """Drop what a stage has left that is done again from its start."""
        on_main(lambda: [path.unlink() for path in [*self._files(), *self.logdir.glob(LEDGER)]])

    def best(self) -> dict[str, Any]:
        """Epoch and score of the best checkpoint; None where there is none."""
        return {"epoch": self.best_epoch, "score": self.best_score}

    def is_better(self, score: float) -> bool:
        """Whether `score` is finite and better than the best so far."""
        if not math.isfinite(score):
            return False
        return self.best_score is None or self._signed(score) > self._signed(self.best_score)

    def best_path(self) -> Path:
        """The best checkpoint; the last one where no score was finite."""
        return self.logdir / ("last.pth" if self.best_score is None else "best.pth")

    def _signed(self, score: float) -> float:
        return -score if self.metric_minimization else score

    def _write(self, name: str, score: float, checkpoint: Mapping[str, Any], is_best: bool) -> None:
        """The file, the ledger, the links, retention, in this order: so the ledger always lists what is on disk."""
        self.logdir.mkdir(parents=True, exist_ok=True)
        path = self.logdir / name
        size, sha256 = save_checkpoint(path, {**checkpoint, "best": self.best()})
        finite = score if math.isfinite(score) else None
        self.rows.append(Row(name, size, sha256, int(checkpoint["epoch"]), int(checkpoint["step"]), finite))
        self._write_ledger()
        link_atomically(path, self.logdir / "last.pth")
        if is_best:
            link_atomically(path, self.logdir / "best.pth")
        self._retire()

    def _mend(self) -> None:
        """Make links and ledger fit the rows: a kill may have come between them, or a damaged file was set aside."""
        listed = {"last.pth"} | {row.file for row in self.rows}
        link_atomically(self.logdir / self.rows[-1].file, self.logdir / "last.pth")
        for row in self.rows:
            if row.score is not None and row.epoch == self.best_epoch:
                link_atomically(self.logdir / row.file, self.logdir / "best.pth")
                listed.add("best.pth")
        self._write_ledger()
        for path in self._files():
            if path.name not in listed:
                path.unlink()  # written just before a kill, or by steps that are done again

    def _files(self) -> list[Path]:
        return [*self.logdir.glob("*.pth"), *self.logdir.glob(".*.tmp")]

    def _retire(self) -> None:
        """Drop what is neither among the n best nor the two newest."""
        finite = [row for row in self.rows if row.score is not None]
        ranked = sorted(finite, key=lambda row: (-self._signed(row.score), row.epoch))  # type: ignore[arg-type]
        kept = {row.file for row in ranked[: self.save_n_best]} | {row.file for row in self.rows[-2:]}
        retired = [row for row in self.rows if row.file not in kept]
        self.rows = [row for row in self.rows if row.file in kept]
        if retired:
            self._write_ledger()
        for row in retired:
            (self.logdir / row.file).unlink(missing_ok=True)

    def _write_ledger(self) -> None:
        ledger = {
            "format": FORMAT,
            "metric": self.metric,
            "metric_minimization": self.metric_minimization,
            "best": self.best(),
            "checkpoints": [asdict(row) for row in self.rows],
        }
        write_text(self.logdir / LEDGER, json.dumps(ledger, indent=2) + "\n")


def best_of(stages: Sequence[CheckpointManager]) -> tuple[float, CheckpointManager]:
    """The best score over all stages and the stage that has it, the earlier on a tie; NaN where none was finite."""
    best = stages[0]
    for stage in stages[1:]:
        if stage.best_score is not None and best.is_better(stage.best_score):
            best = stage
    return (math.nan if best.best_score is None else best.best_score), best


def read_ledger(folder: Path) -> dict[str, Any]:
    """The rows of the ledger in `folder`, oldest first, and the best; none where the folder has no checkpoints.

    Raises BadInput where checkpoints are there without their ledger.
    """
    path = folder / LEDGER
    if not path.is_file():
        # One file may lie there alone: the first of a stage, killed before its ledger was written.
        if len(list(folder.glob("epoch_*.pth"))) > 1:
            raise BadInput(f"{path} is missing, so nothing says which checkpoints in {folder} are sound; put it back.")
        return {"rows": [], "best": {"epoch": None, "score": None}}
    ledger = json.loads(path.read_text())
    return {"rows": [Row(**row) for row in ledger["checkpoints"]], "best": ledger["best"]}


class _Digest:
    """Counts and hashes what is written through it, so that the file is not read again."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.bytes = 0

    def over(self, file: BinaryIO) -> "_Digest":
        self._file = file
        return self

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def _check_bytes(path: Path) -> None:
    """Compare a file with the ledger beside it, by its contents: links have the contents of some row."""
    ledger = path.parent / LEDGER
    if not ledger.is_file():
        return
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 not in {row.sha256 for row in read_ledger(path.parent)["rows"]}:
        raise BadInput(
            f"{path} is not the file that {ledger.name} beside it lists: it was torn or changed; use another."
        )


def _check_architecture(name: str, state: Mapping[str, torch.Tensor], model: nn.Module) -> None:
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
        raise BadInput(f"{name} is of another architecture than the model ({'; '.join(found)}).")
