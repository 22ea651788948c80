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
from typing import IO, Any, BinaryIO, Literal, Protocol, cast

import torch
from torch import nn

from batteries.background import Writer
from batteries.console import logger
from batteries.distributed import on_main
from batteries.errors import BadInput
from batteries.files import DiskFull, is_disk_full, link_atomically, read_json, write_atomically, write_text
from batteries.parallel import bare

FORMAT = 2
LEDGER = "checkpoints.json"
AVERAGE = "swa.pth"  # what average.py makes of the others; swa.json beside it says what should be in it


class Scheduler(Protocol):
    """What a checkpoint asks of a scheduler, of torch or not."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        ...

    def load_state_dict(self, state: Any, /) -> None:
        """Go on from what `state_dict` gave."""


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
        "model_state_dict": bare(model).state_dict(),
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
    digest = _Digest()
    try:
        write_atomically(Path(path), lambda file: torch.save(dict(checkpoint), cast(IO[bytes], digest.over(file))))
    except Exception as error:
        if is_disk_full(digest.error or error):
            raise DiskFull(Path(path), count_bytes(checkpoint)) from None
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
    checkpoint = on_main(lambda: read_checkpoint(Path(path)))
    apply_checkpoint(checkpoint, str(path), model, optimizer, scheduler)
    return checkpoint


def load_weights(path: str | Path, model: nn.Module) -> None:
    """Put the weights of a checkpoint into `model`: the averaged ones where it has them, since those were scored."""
    checkpoint = on_main(lambda: read_checkpoint(Path(path)))
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
    network = bare(model)
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
        raise BadInput(f"{path} {what}; give the path of a checkpoint, such as logs/baseline/stage0/best.pth.")
    _check_bytes(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = type(error).__name__
        raise BadInput(f"{path} cannot be read as a checkpoint of tensors and plain values ({reason}).") from error
    if not isinstance(checkpoint, dict) or "model_state_dict" not in checkpoint:
        raise BadInput(f"{path} holds no model_state_dict; give a file that make_checkpoint made.")
    return checkpoint


class CheckpointManager:
    """Keeps the n best checkpoints of one stage in `logdir`, and the two newest: one in reserve, should a disk fail.

    A score that is not finite is never best; a tie keeps the earlier. Every rank makes the same calls; rank 0 writes.
    With a `writer` it writes in the background, until `wait`; a full disk is then forgiven once in a row.
    """

    def __init__(
        self,
        logdir: str | Path,
        metric: str = "accuracy",
        metric_minimization: bool = False,
        save_n_best: int = 5,
        writer: Writer | None = None,
    ) -> None:
        assert save_n_best > 0
        self.logdir = Path(logdir)
        self.metric = metric
        self.metric_minimization = metric_minimization
        self.save_n_best = save_n_best
        self._writer = writer or Writer()
        self._in_background = writer is not None
        self.rows: list[Row] = []
        self.best_score: float | None = None
        self.best_epoch: int | None = None
        self._in_flight: tuple[str, dict[str, Any]] | None = None  # the file being written, and the best without it
        self._forgiven = False  # whether the last save found the disk full

    def process(self, score: float, epoch: int, checkpoint: Mapping[str, Any]) -> bool:
        """Write the checkpoint of `epoch`, point last and best at what they name; whether it is the new best."""
        score = float(score)
        is_best = self.is_better(score)
        before = self.best()
        if is_best:
            self.best_score, self.best_epoch = score, epoch
        self._submit(f"epoch_{epoch}.pth", score, checkpoint, before)
        return is_best

    def save(self, checkpoint: Mapping[str, Any]) -> None:
        """Write a checkpoint within an epoch: it has no score, and stays until two newer ones are there."""
        self._settle(forgiving=True)
        self._submit(f"epoch_{checkpoint['epoch']}_step_{checkpoint['step']}.pth", math.nan, checkpoint, self.best())

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk. Raises what its writing failed with, on all ranks."""
        self._settle(forgiving=False)

    def restore(self, checkpoint: Mapping[str, Any] | None = None) -> None:
        """Go on with the ledger in `logdir`: up to `checkpoint`, or to its end where the stage is finished."""
        ledger = on_main(lambda: read_ledger(self.logdir))
        self.rows = ledger["rows"]
        if checkpoint is not None:  # later ones were set aside
            there = on_main(lambda: {path.name for path in self.logdir.glob("*.pth")})
            self.rows = [row for row in self.rows if row.step <= checkpoint["step"] and row.file in there]
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
        self._settle(forgiving=True)
        if not math.isfinite(score):
            return False
        return self.best_score is None or self._signed(score) > self._signed(self.best_score)

    def best_path(self) -> Path:
        """The best checkpoint; the last one where no score was finite."""
        return self.path_of("best")

    def path_of(self, which: Literal["best", "last"]) -> Path:
        """The best checkpoint or the last; the last one, too, where no score was finite."""
        self.wait()
        return self.logdir / ("last.pth" if which == "last" or self.best_score is None else "best.pth")

    def _signed(self, score: float) -> float:
        return -score if self.metric_minimization else score

    def _submit(self, name: str, score: float, checkpoint: Mapping[str, Any], best_before: dict[str, Any]) -> None:
        """Have rank 0 write one file, and all that follows from it."""
        state = {**checkpoint, "best": self.best()}
        self._in_flight = name, best_before
        on_main(lambda: self._writer.submit(state, lambda copy: self._write(name, score, copy)))
        if not self._in_background:
            self.wait()

    def _settle(self, forgiving: bool) -> None:
        """Wait for the save in flight. Where it failed, what was best before it is so again."""
        if self._in_flight is None:
            return
        (name, before), self._in_flight = self._in_flight, None
        written = False
        try:
            written = on_main(lambda: self._is_written(name, forgiving))
        finally:
            if not written:
                self.best_epoch, self.best_score = before["epoch"], before["score"]

    def _is_written(self, name: str, forgiving: bool) -> bool:
        try:
            self._writer.wait()
        except DiskFull as error:
            if not forgiving or self._forgiven:
                raise
            logger.warning(f"{error} The run goes on; it ends where the next checkpoint does not fit either.")
            self._forgiven = True
            return self.rows[-1:] != [] and self.rows[-1].file == name  # the ledger may have it: then it is whole
        self._forgiven = False
        return True

    def _write(self, name: str, score: float, state: Mapping[str, Any]) -> None:
        """The file, the ledger, the links, retention, in this order: so the ledger always lists what is on disk."""
        self.logdir.mkdir(parents=True, exist_ok=True)
        path, finite = self.logdir / name, score if math.isfinite(score) else None
        size, sha256 = save_checkpoint(path, state)
        row = Row(name, size, sha256, int(state["epoch"]), int(state["step"]), finite)
        try:
            self._write_ledger([*self.rows, row], state["best"])
            self._link(state["best"])
            self._retire(state["best"])
        except OSError as error:
            if row not in self.rows:
                path.unlink()
            if is_disk_full(error):
                raise DiskFull(path, size) from None
            raise

    def _link(self, best: Mapping[str, Any]) -> None:
        """Point last and best at what they name."""
        link_atomically(self.logdir / self.rows[-1].file, self.logdir / "last.pth")
        for row in self.rows:
            if row.score is not None and row.epoch == best["epoch"]:
                link_atomically(self.logdir / row.file, self.logdir / "best.pth")

    def _mend(self) -> None:
        """Make links and ledger fit the rows: a kill may have come between them, or a damaged file was set aside."""
        self._link(self.best())
        self._write_ledger(self.rows, self.best())
        listed = {"last.pth", *(["best.pth"] if self.best_epoch else []), *(row.file for row in self.rows)}
        for path in self._files():
            if path.name not in listed:
                path.unlink()  # written just before a kill, or by steps that are done again

    def _files(self) -> list[Path]:
        ours = [path for path in self.logdir.glob("*.pth") if path.name != AVERAGE]
        return [*ours, *self.logdir.glob(".*.tmp")]

    def _retire(self, best: Mapping[str, Any]) -> None:
        """Drop what is neither among the n best nor the two newest."""
        finite = [row for row in self.rows if row.score is not None]
        ranked = sorted(finite, key=lambda row: (-self._signed(row.score), row.epoch))  # type: ignore[arg-type]
        kept = {row.file for row in ranked[: self.save_n_best]} | {row.file for row in self.rows[-2:]}
        retired = [row for row in self.rows if row.file not in kept]
        if retired:
            self._write_ledger([row for row in self.rows if row.file in kept], best)
        for row in retired:
            (self.logdir / row.file).unlink(missing_ok=True)

    def _write_ledger(self, rows: list[Row], best: Mapping[str, Any]) -> None:
        ledger = {
            "format": FORMAT,
            "metric": self.metric,
            "metric_minimization": self.metric_minimization,
            "best": best,
            "checkpoints": [asdict(row) for row in rows],
        }
        write_text(self.logdir / LEDGER, json.dumps(ledger, indent=2) + "\n")
        self.rows = rows


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
    ledger = read_json(path)
    return {"rows": [Row(**row) for row in ledger["checkpoints"]], "best": ledger["best"]}


def read_average(folder: Path) -> dict[str, Any]:
    """What average.py noted of swa.pth: its bytes and sha256, its score and what it was made of; nothing without it."""
    path = (folder / AVERAGE).with_suffix(".json")
    return read_json(path) if path.is_file() else {}


class _Digest:
    """Counts and hashes what is written through it, so that the file is not read again."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.bytes = 0
        self.error: OSError | None = None  # torch reports it as one of its own

    def over(self, file: BinaryIO) -> "_Digest":
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
        ledger, listed = path.parent / LEDGER, [row.sha256 for row in read_ledger(path.parent)["rows"]]
    if not ledger.is_file():
        return
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 not in listed:
        raise BadInput(
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
        raise BadInput(f"{name} is of another architecture than the model ({'; '.join(found)}).")
