"""The folder of one run: what was asked for, what it ran on, and what came out."""

import json
import math
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batteries.checkpoints import CheckpointManager, apply_checkpoint, best_of, make_checkpoint
from batteries.cli import to_json
from batteries.console import Console, logger
from batteries.data import Batch, Epoch
from batteries.distributed import Agreement, is_main, on_main, world_size
from batteries.errors import BadInput
from batteries.files import Lock, write_atomically, write_text
from batteries.interrupts import SIGNALS, Interrupts, Stopped
from batteries.metrics import Averages
from batteries.parallel import bare
from batteries.resume import Cursor, Found, check_same_run, cut_lines, find_newest
from batteries.trackers import Backend, NoTracker, check_tracker, make_tracker

ROOT = Path(__file__).parent.parent
SAVE = 1  # a wish below any signal's number
LOG_EVERY = 20  # steps between two reads of the metrics for the progress bar: each waits for the device


class Run:
    """Owns `logdir`; rank 0 writes and speaks, the other ranks make the same calls.

    With `config.resume` it goes on with the run in `logdir`, at `cursor`; the knobs in `may_change` may differ then.
    `data` is a fingerprint of what is trained on. Raises BadInput, before anything is written, where `logdir` holds a
    run that is not to be resumed or is another one, is in use, or cannot be written.
    """

    def __init__(
        self,
        logdir: Path,
        config: Any,
        device: torch.device,
        *,
        model_args: Mapping[str, Any],
        data: str,
        may_change: Sequence[str],
    ) -> None:
        self.logdir = Path(logdir)
        self.config = to_json(config)
        self.resume = self.config.pop("resume")  # a way to start, not part of what is repeated
        self.device = device
        self.model_args = dict(model_args)
        self.data = data
        self.tracker: Backend = NoTracker()
        self.timing: dict[str, float] = {}
        self.total_step = self.offset = 0  # optimizer steps of the run, and those before this stage
        self.agreement, self.interrupts = Agreement(), Interrupts()
        self.saved_at = time.monotonic()
        self.lock = Lock(self.logdir / ".lock")
        check_tracker(self.config["tracker"])
        self.found = on_main(lambda: self._find(may_change))
        self.cursor = self.found.cursor

    def __enter__(self) -> "Run":
        on_main(self._start)
        self.console = Console(self.logdir / "train.log")
        if is_main():
            checkpoint = self.found.checkpoint
            purge_step = None if checkpoint is None else checkpoint["resume"]["total_step"] + 1
            self.tracker = make_tracker(self.config["tracker"], self.logdir, purge_step)
        for message in self.found.messages:
            logger.warning(message)
        self.interrupts.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.interrupts.__exit__()
        if is_main():
            self.tracker.finish()
            outcome = _describe_end(kind, error)
            self._write_record(end=_now(), exit=outcome)
            self.console.note(outcome)
            self.lock.release()
        self.console.close()
        if kind not in (None, Stopped) and self.interrupts.received:
            signal.raise_signal(self.interrupts.received)  # torchrun's: another rank failed, and will say why

    def say_start(self, model: nn.Module, samples: Mapping[str, int]) -> None:
        """What will run, before the first step; `samples` counts each split."""
        if not is_main():
            return
        parameters = sum(parameter.numel() for parameter in model.parameters())
        wrapper = "" if bare(model) is model else f" with {type(model).__name__}"
        if isinstance(model, nn.DataParallel) and not model.device_ids:
            wrapper += ", which has no GPU to share the work with"
        logger.info(f"logdir   {self.logdir}")
        logger.info(f"device   {self.device}, {world_size()} x {torch.get_num_threads()} threads{wrapper}")
        logger.info(f"data     {', '.join(f'{name} {count:,}' for name, count in samples.items())}")
        logger.info(f"model    {type(bare(model)).__name__}, {parameters:,} parameters")
        logger.info(f"weights  {self._describe_weights()}")
        logger.info(f"code     git {self.record['git_commit'] or 'without a commit'}, torch {torch.__version__}")

    def begin_stage(
        self,
        number: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        checkpoints: CheckpointManager,
    ) -> Cursor:
        """Where to begin in stage `number`; what the run was cut in is put back into model, optimizer and the rest."""
        self.training = model, optimizer, scheduler, checkpoints
        self.stage = number
        checkpoint = self.found.checkpoint
        if checkpoint is not None and number < self.cursor.stage:
            checkpoints.restore()
            return Cursor(number, epoch=self.config["stages"][number]["epochs"] + 1)
        if checkpoint is not None and number == self.cursor.stage:
            apply_checkpoint(checkpoint, self.found.name, model, optimizer, scheduler)
            checkpoints.restore(checkpoint)
            self.total_step = checkpoint["resume"]["total_step"]
            self.offset = self.total_step - checkpoint["step"]
            return self.cursor
        checkpoints.discard()
        self.offset = self.total_step
        return Cursor(number)

    def has_begun(self, stage: int) -> bool:
        """Whether stage `stage` (from 0) was begun when the run was cut: then its weights are in the checkpoint."""
        return self.found.checkpoint is not None and stage <= self.cursor.stage

    def _describe_weights(self) -> str:
        """Where the first weights come from, and where a resumed run goes on."""
        if self.found.checkpoint is None:
            return self.config["init_from"] or f"random, from seed {self.config['seed']}"
        stages, (stage, epoch, step) = self.config["stages"], self.cursor
        if epoch <= stages[stage]["epochs"]:
            return f"resumed from {self.found.name}, in {stages[stage]['name']} epoch {epoch} after {step} steps"
        if stage + 1 < len(stages):
            return f"resumed from {self.found.name}, the end of {stages[stage]['name']}"
        return f"resumed from {self.found.name}: finished already"

    def track(self, batches: Epoch, metrics: Averages, label: str) -> Iterator[Batch]:
        """Give `batches` on, show how far they are, keep the time for `log_epoch`, and save within the epoch."""
        if batches.first_step:
            metrics.restore(self.found.checkpoint["resume"]["running"])  # type: ignore[index]
        begin, before = time.monotonic(), metrics.count
        done = batches.first_step
        for batch in self.console.track(batches, metrics, label, LOG_EVERY):
            yield batch
            if batch.ends_step:
                done += 1
                self._after_step(batches, done, metrics)
        seconds = time.monotonic() - begin
        self.timing = {
            "seconds": round(seconds, 3),
            "samples_per_second": round((metrics.count - before) * world_size() / seconds, 1),
            "peak_memory_bytes": _peak_memory(self.device),
        }

    def make_checkpoint(self, epoch: int, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The checkpoint at the end of `epoch`; `step` counts the optimizer steps of the stage."""
        return self._make_checkpoint(epoch, step, metrics, Cursor(self.stage, epoch + 1), running=[])

    def _make_checkpoint(
        self, epoch: int, step: int, metrics: Mapping[str, Any], cursor: Cursor, running: list
    ) -> dict[str, Any]:
        model, optimizer, scheduler, _ = self.training
        resume = {
            "cursor": list(cursor),
            "running": running,
            "data": self.data,
            "world_size": world_size(),
            "total_step": self.offset + step,
        }
        name = self.config["stages"][self.stage]["name"]
        return make_checkpoint(
            name, epoch, model, optimizer, scheduler, metrics, self.config, self.model_args, step=step, resume=resume
        )

    def _after_step(self, batches: Epoch, done: int, metrics: Averages) -> None:
        """A checkpoint within the epoch where one is due; where a signal came, one before the end. All ranks agree."""
        agreed = self.agreement(self.interrupts.received or self._due_by_clock())
        every = self.config["checkpoint_every_steps"]
        due_by_count = every is not None and done % every == 0 and done < len(batches)
        if not agreed and not due_by_count:
            return
        epoch = batches.key[2]
        step = (epoch - 1) * len(batches) + done
        checkpoint = self._make_checkpoint(epoch, step, {}, Cursor(self.stage, epoch, done), metrics.state())
        self.training[3].save(checkpoint)
        self.saved_at = time.monotonic()
        if agreed in SIGNALS:
            raise Stopped(agreed)

    def _due_by_clock(self) -> int:
        """Whether it is time for a checkpoint; rank 0 looks at its clock for all."""
        minutes = self.config["checkpoint_every_minutes"]
        if minutes is None or not is_main() or time.monotonic() - self.saved_at < 60 * minutes:
            return 0
        self.saved_at = time.monotonic()
        return SAVE

    def log_epoch(
        self,
        stage: str,
        epoch: int,
        step: int,
        lr: float,
        train: Mapping[str, float],
        valid: Mapping[str, float],
        is_best: bool,
    ) -> None:
        """One line on the terminal, in metrics.jsonl and in timings.jsonl, one point a curve in the tracker.

        `step` counts the optimizer steps of the stage. Numbers that are not finite become null in the files: JSON has
        none.
        """
        self.total_step = self.offset + step
        if not is_main():
            return
        record = {
            "stage": stage,
            "epoch": epoch,
            "step": step,
            "lr": lr,
            "train": _finite(train),
            "valid": _finite(valid),
        }
        _append(self.logdir / "metrics.jsonl", record)
        _append(self.logdir / "timings.jsonl", {"stage": stage, "epoch": epoch, **self.timing})
        curves = {f"{stage}/train/{name}": value for name, value in train.items()}
        curves |= {f"{stage}/valid/{name}": value for name, value in valid.items()}
        self.tracker.log({**curves, f"{stage}/lr": lr}, self.total_step)
        parts = [f"{stage} epoch {epoch}", "train", _means(train), "valid", _means(valid)]
        logger.info(f"{'  '.join(parts)}  {self.timing['seconds']:.1f} s{'  best' if is_best else ''}")

    def finish(self, stages: Sequence[CheckpointManager]) -> float:
        """What came out, and where it is; gives the best score over all stages."""
        score, best = best_of(stages)
        if is_main():
            finite = _finite({"score": score})
            self.record["best"] = {"metric": best.metric, **finite, "stage": best.logdir.name, "epoch": best.best_epoch}
        logger.info(f"best     {best.metric} {score:.4f} in {best.best_path()}")
        if self.config["tracker"] == "tensorboard":
            logger.info("look     scripts/tensorboard.sh")
        return score

    def _find(self, may_change: Sequence[str]) -> Found:
        """What there is to go on from; nothing is written but the names of damaged files."""
        if not self.resume or not holds_run(self.logdir):
            check_logdir(self.logdir)
            return Found()
        self.lock.acquire()
        found = find_newest(self.logdir, [stage["name"] for stage in self.config["stages"]])
        if found.checkpoint is not None:
            check_same_run(found.checkpoint["experiment_args"], self.config, may_change, found.cursor)
            if found.checkpoint["resume"]["data"] != self.data:
                raise BadInput(f"--resume would change the run: the data or their split are not those of {found.name}.")
            if (ranks := found.checkpoint["resume"]["world_size"]) != world_size():
                found.messages.append(
                    f"The run had {ranks} processes and has {world_size()} now: it goes on equal to rounding, "
                    "not bit for bit."
                )
        return found

    def _start(self) -> None:
        try:
            self.logdir.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
            write_text(self.logdir / "config.json", json.dumps(self.config, indent=2) + "\n")
        except OSError as error:
            raise BadInput(f"--logdir {self.logdir} cannot be written ({error.strerror}); use another.") from None
        names = [stage["name"] for stage in self.config["stages"]]
        for file in ("metrics.jsonl", "timings.jsonl"):
            cut_lines(self.logdir / file, names, self.cursor)
        self.record = describe_run(self.device, self.config["seed"])
        if self.resume and (earlier := _read_json(self.logdir / "run.json")):
            resumed = [*earlier.get("resumed", []), self.record["start"]]
            self.record |= {"start": earlier["start"], "resumed": resumed}
        self._write_record()
        if difference := uncommitted():
            write_atomically(self.logdir / "git.diff", lambda file: file.write(difference))

    def _write_record(self, **values: str) -> None:
        self.record |= values
        write_text(self.logdir / "run.json", json.dumps(self.record, indent=2) + "\n")


def holds_run(logdir: Path) -> bool:
    """Whether a run was started in `logdir`, or its checkpoints were put there."""
    files = ("config.json", "run.json", "metrics.jsonl", "train.log", "tensorboard")
    return any((logdir / name).exists() for name in files) or any(logdir.glob("*/*.pth"))


def check_logdir(logdir: Path) -> None:
    """Raise BadInput where `logdir` holds a run already or is no folder: nothing of the user's is overwritten."""
    if logdir.resolve() == ROOT.resolve():
        raise BadInput(f"--logdir {logdir} is this repository itself; give a folder of its own, such as logs/baseline.")
    if holds_run(logdir):
        raise BadInput(
            f"--logdir {logdir} holds a run already; go on with it by --resume, or choose another, such as "
            f"--logdir {_free_name(logdir)}."
        )
    parent = next(folder for folder in (logdir, *logdir.absolute().parents) if folder.exists())
    if not parent.is_dir():
        raise BadInput(f"--logdir {logdir} cannot be a folder: {parent} is a file; choose another.")
    if not os.access(parent, os.W_OK):
        raise BadInput(f"--logdir {logdir} cannot be written: {parent} is read-only; choose another.")


def describe_run(device: torch.device, seed: int) -> dict[str, Any]:
    """Command, code, versions and machine, as run.json keeps them."""
    import torchvision

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    return {
        "command": shlex.join(sys.argv),
        "git_commit": (_git("rev-parse", "HEAD") or b"").decode().strip() or None,
        "versions": {**versions, "cuda": torch.version.cuda},
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "device": str(device),
        "gpu": gpu,
        "world_size": world_size(),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "start": _now(),
        "end": None,
        "exit": None,
    }


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def uncommitted() -> bytes | None:
    """The difference between the last commit and the files here, new ones included; None without git or a commit."""
    with tempfile.TemporaryDirectory() as folder:
        index = os.path.join(folder, "index")  # an index of our own, so that the user's is left as it is
        if _git("read-tree", "HEAD", index=index) is None or _git("add", "-N", ".", index=index) is None:
            return None
        return _git("diff", "HEAD", "--", ".", index=index)


def _git(*arguments: str, index: str | None = None) -> bytes | None:
    """What git says of this repository; None without git, a repository or a commit."""
    environment = os.environ | ({} if index is None else {"GIT_INDEX_FILE": index})
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True, env=environment).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def _append(path: Path, record: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _free_name(logdir: Path) -> Path:
    return next(path for number in range(2, 1_000_000) if not (path := Path(f"{logdir}_{number}")).exists())


def _peak_memory(device: torch.device) -> int:
    """Peak bytes: of the GPU's allocator, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _describe_end(kind: type[BaseException] | None, error: BaseException | None) -> str:
    if kind is None:
        return "finished"
    return str(error) if issubclass(kind, Stopped) else f"failed: {kind.__name__}: {error}"


def _means(values: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.4f}" for name, value in sorted(values.items()))
