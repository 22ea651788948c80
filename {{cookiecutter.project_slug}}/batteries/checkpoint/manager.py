"""Which checkpoints of a stage are kept."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from batteries.checkpoint.async_writer import AsyncWriter
from batteries.checkpoint.io import FORMAT, save_checkpoint
from batteries.checkpoint.manifest import AVERAGE, MANIFEST, ManifestEntry, read_manifest
from batteries.core.files import DiskFullError, is_disk_full, link_atomically, write_text
from batteries.distributed.collectives import run_on_rank_zero

logger = logging.getLogger("batteries")


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
        writer: AsyncWriter | None = None,
    ) -> None:
        assert save_n_best > 0
        self.logdir = Path(logdir)
        self.metric = metric
        self.metric_minimization = metric_minimization
        self.save_n_best = save_n_best
        self._writer = writer or AsyncWriter()
        self._in_background = writer is not None
        self.rows: list[ManifestEntry] = []
        self.best_score: float | None = None
        self.best_epoch: int | None = None
        self._in_flight: tuple[str, dict[str, Any]] | None = None  # the file being written, and the best without it
        self._tolerated_full_disk = False  # whether the last save found the disk full

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
        self._wait_for_pending_save(tolerate_full_disk=True)
        self._submit(f"epoch_{checkpoint['epoch']}_step_{checkpoint['step']}.pth", math.nan, checkpoint, self.best())

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk. Raises what its writing failed with, on all ranks."""
        self._wait_for_pending_save(tolerate_full_disk=False)

    def restore(self, checkpoint: Mapping[str, Any] | None = None) -> None:
        """Go on with the ledger in `logdir`: up to `checkpoint`, or to its end where the stage is finished."""
        ledger = run_on_rank_zero(lambda: read_manifest(self.logdir))
        self.rows = ledger["rows"]
        if checkpoint is not None:  # later ones were set aside
            there = run_on_rank_zero(lambda: {path.name for path in self.logdir.glob("*.pth")})
            self.rows = [row for row in self.rows if row.step <= checkpoint["step"] and row.file in there]
        best = (checkpoint or ledger)["best"]
        self.best_epoch, self.best_score = best["epoch"], best["score"]
        if checkpoint is not None:
            run_on_rank_zero(self._repair)

    def discard(self) -> None:
        """Drop what a stage has left that is done again from its start."""
        run_on_rank_zero(lambda: [path.unlink() for path in [*self._files(), *self.logdir.glob(MANIFEST)]])

    def best(self) -> dict[str, Any]:
        """Epoch and score of the best checkpoint; None where there is none."""
        return {"epoch": self.best_epoch, "score": self.best_score}

    def is_better(self, score: float) -> bool:
        """Whether `score` is finite and better than the best so far."""
        self._wait_for_pending_save(tolerate_full_disk=True)
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
        run_on_rank_zero(lambda: self._writer.submit(state, lambda copy: self._write(name, score, copy)))
        if not self._in_background:
            self.wait()

    def _wait_for_pending_save(self, tolerate_full_disk: bool) -> None:
        """Wait for the save in flight. Where it failed, what was best before it is so again."""
        if self._in_flight is None:
            return
        (name, before), self._in_flight = self._in_flight, None
        written = False
        try:
            written = run_on_rank_zero(lambda: self._is_written(name, tolerate_full_disk))
        finally:
            if not written:
                self.best_epoch, self.best_score = before["epoch"], before["score"]

    def _is_written(self, name: str, tolerate_full_disk: bool) -> bool:
        try:
            self._writer.wait()
        except DiskFullError as error:
            if not tolerate_full_disk or self._tolerated_full_disk:
                raise
            logger.warning(f"{error} The run goes on; it ends where the next checkpoint does not fit either.")
            self._tolerated_full_disk = True
            return self.rows[-1:] != [] and self.rows[-1].file == name  # the ledger may have it: then it is whole
        self._tolerated_full_disk = False
        return True

    def _write(self, name: str, score: float, state: Mapping[str, Any]) -> None:
        """The file, the ledger, the links, retention, in this order: so the ledger always lists what is on disk."""
        self.logdir.mkdir(parents=True, exist_ok=True)
        path, finite = self.logdir / name, score if math.isfinite(score) else None
        size, sha256 = save_checkpoint(path, state)
        row = ManifestEntry(name, size, sha256, int(state["epoch"]), int(state["step"]), finite)
        try:
            self._write_manifest([*self.rows, row], state["best"])
            self._link(state["best"])
            self._retire(state["best"])
        except OSError as error:
            if row not in self.rows:
                path.unlink()
            if is_disk_full(error):
                raise DiskFullError(path, size) from None
            raise

    def _link(self, best: Mapping[str, Any]) -> None:
        """Point last and best at what they name."""
        link_atomically(self.logdir / self.rows[-1].file, self.logdir / "last.pth")
        for row in self.rows:
            if row.score is not None and row.epoch == best["epoch"]:
                link_atomically(self.logdir / row.file, self.logdir / "best.pth")

    def _repair(self) -> None:
        """Make links and ledger fit the rows: a kill may have come between them, or a damaged file was set aside."""
        self._link(self.best())
        self._write_manifest(self.rows, self.best())
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
            self._write_manifest([row for row in self.rows if row.file in kept], best)
        for row in retired:
            (self.logdir / row.file).unlink(missing_ok=True)

    def _write_manifest(self, rows: list[ManifestEntry], best: Mapping[str, Any]) -> None:
        ledger = {
            "format": FORMAT,
            "metric": self.metric,
            "metric_minimization": self.metric_minimization,
            "best": best,
            "checkpoints": [asdict(row) for row in rows],
        }
        write_text(self.logdir / MANIFEST, json.dumps(ledger, indent=2) + "\n")
        self.rows = rows


def best_of(stages: Sequence[CheckpointManager]) -> tuple[float, CheckpointManager]:
    """The best score over all stages and the stage that has it, the earlier on a tie; NaN where none was finite."""
    best = stages[0]
    for stage in stages[1:]:
        if stage.best_score is not None and best.is_better(stage.best_score):
            best = stage
    return (math.nan if best.best_score is None else best.best_score), best
