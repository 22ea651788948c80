"""Retention of the checkpoints of a stage."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from batteries.checkpoint.async_writer import AsyncWriter
from batteries.checkpoint.io import FORMAT, save_checkpoint
from batteries.checkpoint.manifest import AVERAGE, MANIFEST, BestEpoch, ManifestEntry, read_manifest
from batteries.core.files import DiskFullError, is_disk_full, link_atomically, write_text
from batteries.distributed.collectives import run_on_rank_zero

logger = logging.getLogger("batteries")

NEWEST_KEPT = 2  # checkpoints: the last one, and another one in case that its file is damaged


@dataclass(frozen=True)
class PendingSave:
    """A checkpoint that is being written.

    Attributes:
        file: The file name.
        best_before: The best epoch if this save fails.
    """

    file: str
    best_before: BestEpoch


class CheckpointManager:
    """Keeps the n best and the two newest checkpoints of one stage, and the links best.pth and last.pth.

    Guarantees:
        - Files are written atomically. The order is checkpoint, manifest, links, retention, so the manifest lists only
          complete files, and a file is deleted only after the manifest no longer lists it.
        - The best and the last checkpoint are never deleted.
        - A score that is not finite is never best. On a tie the earlier epoch stays best.

    Every rank must make the same calls; rank 0 writes the files.

    Attributes:
        logdir: The directory of the stage.
        metric: The name of the main metric.
        metric_minimization: Whether a lower score is better.
        save_n_best: The number of best checkpoints to keep.
        entries: The checkpoints in the manifest, oldest first. Only rank 0 keeps it up to date.
        best: The best epoch and its score.
    """

    def __init__(
        self,
        logdir: str | Path,
        metric: str = "accuracy",
        metric_minimization: bool = False,
        save_n_best: int = 5,
        writer: AsyncWriter | None = None,
    ) -> None:
        """Create a manager without checkpoints; `restore` reads those of an earlier run.

        Args:
            logdir: The directory of the stage; created with the first checkpoint.
            metric: The name of the main metric, for the manifest.
            metric_minimization: Whether a lower score is better.
            save_n_best: The number of best checkpoints to keep, 1 or more.
            writer: Writes the checkpoints in the background, until `wait`. One failed save because of a full disk is
                then tolerated; the next one must succeed. Without it each call returns when its file is written.
        """
        assert save_n_best > 0
        self.logdir = Path(logdir)
        self.metric = metric
        self.metric_minimization = metric_minimization
        self.save_n_best = save_n_best
        self.entries: list[ManifestEntry] = []
        self.best = BestEpoch()
        self._writer = writer or AsyncWriter()
        self._in_background = writer is not None
        self._pending: PendingSave | None = None
        self._last_save_found_disk_full = False

    @property
    def best_score(self) -> float | None:
        """The best score; None while no score was finite."""
        return self.best.score

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the best score; None while no score was finite."""
        return self.best.epoch

    def process(self, score: float, epoch: int, checkpoint: Mapping[str, Any]) -> bool:
        """Write the checkpoint at the end of an epoch, and update best.pth, last.pth and the manifest.

        Args:
            score: The main metric of the epoch.
            epoch: The epoch, from 1.
            checkpoint: The output of `make_checkpoint`.

        Returns:
            Whether the score is the new best one.
        """
        score = float(score)
        is_best = self.is_better(score)  # it can restore the best before a failed save, so call it first
        best_before = self.best
        if is_best:
            self.best = BestEpoch(epoch, score)
        self._start_save(f"epoch_{epoch}.pth", score, checkpoint, best_before)
        return is_best

    def save(self, checkpoint: Mapping[str, Any]) -> None:
        """Write a checkpoint within an epoch. It has no score, and is deleted when two newer checkpoints exist."""
        self._wait_for_pending_save(tolerate_full_disk=True)
        name = f"epoch_{checkpoint['epoch']}_step_{checkpoint['step']}.pth"
        self._start_save(name, math.nan, checkpoint, self.best)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk. Raises the error of its save on all ranks."""
        self._wait_for_pending_save(tolerate_full_disk=False)

    def restore(self, checkpoint: Mapping[str, Any] | None = None) -> None:
        """Continue with the checkpoints in the directory.

        Args:
            checkpoint: The checkpoint that the stage resumes from; later ones are dropped. None for a finished stage.
        """
        manifest = run_on_rank_zero(lambda: read_manifest(self.logdir))
        self.entries = manifest.entries
        self.best = manifest.best
        if checkpoint is None:
            return
        existing = run_on_rank_zero(lambda: {path.name for path in self.logdir.glob("*.pth")})
        step = checkpoint["step"]
        self.entries = [entry for entry in self.entries if entry.step <= step and entry.file in existing]
        self.best = BestEpoch(**checkpoint["best"])
        run_on_rank_zero(self._repair_directory)

    def discard(self) -> None:
        """Delete the files of a stage that starts again from its first step."""
        run_on_rank_zero(self._delete_files)

    def is_better(self, score: float) -> bool:
        """Return whether `score` is finite and better than the best so far. Waits for the pending save."""
        self._wait_for_pending_save(tolerate_full_disk=True)
        if not math.isfinite(score):
            return False
        return self.best.score is None or self._signed(score) > self._signed(self.best.score)

    def best_path(self) -> Path:
        """Return the path of the best checkpoint; of the last one if no score was finite."""
        return self.path_of("best")

    def path_of(self, which: Literal["best", "last"]) -> Path:
        """Return the path of the best or the last checkpoint; of the last one if no score was finite."""
        self.wait()
        if which == "last" or self.best.score is None:
            return self.logdir / "last.pth"
        return self.logdir / "best.pth"

    def _signed(self, score: float) -> float:
        """Return the score with a sign that makes higher better."""
        return -score if self.metric_minimization else score

    def _start_save(self, name: str, score: float, checkpoint: Mapping[str, Any], best_before: BestEpoch) -> None:
        """Start to write one checkpoint on rank 0; without a background writer also finish it."""
        state = {**checkpoint, "best": asdict(self.best)}
        self._pending = PendingSave(name, best_before)
        write = partial(self._write_files, name, score)
        run_on_rank_zero(lambda: self._writer.submit(state, write))
        if not self._in_background:
            self.wait()

    def _wait_for_pending_save(self, *, tolerate_full_disk: bool) -> None:
        """Wait for the pending save; if it failed, restore the best epoch before it."""
        pending = self._pending
        if pending is None:
            return
        self._pending = None
        is_saved = False
        try:
            is_saved = run_on_rank_zero(lambda: self._finish_save(pending.file, tolerate_full_disk))
        finally:
            if not is_saved:
                self.best = pending.best_before

    def _finish_save(self, file: str, tolerate_full_disk: bool) -> bool:
        """Wait for the writer; return whether the manifest lists the checkpoint."""
        try:
            self._writer.wait()
        except DiskFullError as error:
            if not tolerate_full_disk or self._last_save_found_disk_full:
                raise
            logger.warning(f"{error} Training continues without this checkpoint, and ends if the next one fails too.")
            self._last_save_found_disk_full = True
            return bool(self.entries) and self.entries[-1].file == file
        self._last_save_found_disk_full = False
        return True

    def _write_files(self, name: str, score: float, state: Mapping[str, Any]) -> None:
        """Write checkpoint, manifest and links and delete old checkpoints, in this order (see the class)."""
        self.logdir.mkdir(parents=True, exist_ok=True)
        path = self.logdir / name
        size, sha256 = save_checkpoint(path, state)
        finite_score = score if math.isfinite(score) else None
        entry = ManifestEntry(name, size, sha256, int(state["epoch"]), int(state["step"]), finite_score)
        best = BestEpoch(**state["best"])
        try:
            self._write_manifest([*self.entries, entry], best)
            self._update_links(best)
            self._remove_retired(best)
        except OSError as error:
            if entry not in self.entries:
                path.unlink()
            if is_disk_full(error):
                raise DiskFullError(path, size) from None
            raise

    def _write_manifest(self, entries: list[ManifestEntry], best: BestEpoch) -> None:
        manifest = {
            "format": FORMAT,
            "metric": self.metric,
            "metric_minimization": self.metric_minimization,
            "best": asdict(best),
            "checkpoints": [asdict(entry) for entry in entries],
        }
        write_text(self.logdir / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        self.entries = entries  # only now, so that a failed write changes nothing

    def _update_links(self, best: BestEpoch) -> None:
        """Point last.pth at the newest checkpoint and best.pth at the best one."""
        link_atomically(self.logdir / self.entries[-1].file, self.logdir / "last.pth")
        for entry in self.entries:
            if entry.score is not None and entry.epoch == best.epoch:
                link_atomically(self.logdir / entry.file, self.logdir / "best.pth")

    def _remove_retired(self, best: BestEpoch) -> None:
        """Delete the checkpoints that are neither among the n best nor among the newest."""
        kept_files = self._files_to_keep()
        kept = [entry for entry in self.entries if entry.file in kept_files]
        retired = [entry for entry in self.entries if entry.file not in kept_files]
        if not retired:
            return
        self._write_manifest(kept, best)
        for entry in retired:
            (self.logdir / entry.file).unlink(missing_ok=True)

    def _files_to_keep(self) -> set[str]:
        scored = [(-self._signed(entry.score), entry) for entry in self.entries if entry.score is not None]
        scored.sort(key=lambda pair: (pair[0], pair[1].epoch))
        best = {entry.file for _, entry in scored[: self.save_n_best]}
        newest = {entry.file for entry in self.entries[-NEWEST_KEPT:]}
        return best | newest

    def _repair_directory(self) -> None:
        """Make links, manifest and files agree with the entries, after a kill between two writes or a damaged file."""
        self._update_links(self.best)
        self._write_manifest(self.entries, self.best)
        expected = {"last.pth", *(entry.file for entry in self.entries)}
        if self.best.epoch is not None:
            expected.add("best.pth")
        for path in self._checkpoint_files():
            if path.name not in expected:
                path.unlink()  # written just before a kill, or by steps that will be repeated

    def _delete_files(self) -> None:
        """Delete checkpoints and manifest; the average and damaged files that were renamed are not touched."""
        for path in [*self._checkpoint_files(), *self.logdir.glob(MANIFEST)]:
            path.unlink()

    def _checkpoint_files(self) -> list[Path]:
        """List the checkpoints and links, without the average, and the temporary files of interrupted writes."""
        checkpoints = [path for path in self.logdir.glob("*.pth") if path.name != AVERAGE]
        return [*checkpoints, *self.logdir.glob(".*.tmp")]


def best_of(stages: Sequence[CheckpointManager]) -> tuple[float, CheckpointManager]:
    """Find the best score over all stages.

    Returns:
        The score and its stage, the earlier one on a tie; NaN and the first stage if no score was finite.
    """
    best = stages[0]
    for stage in stages[1:]:
        if stage.best_score is not None and best.is_better(stage.best_score):
            best = stage
    return (math.nan if best.best_score is None else best.best_score), best
