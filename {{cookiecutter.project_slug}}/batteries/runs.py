"""The folder of one run: what was asked for, what it ran on, and what came out."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from batteries.background import Writer
from batteries.checkpoints import CheckpointManager, best_of, check_architecture, load_weights, make_checkpoint
from batteries.cli import to_json
from batteries.console import Console, logger
from batteries.data import Batch, Epoch
from batteries.distributed import Agreement, is_main, on_main, world_size
from batteries.errors import BadInput, RunFailed, is_out_of_memory, shorten
from batteries.files import DiskFull, Lock, append_text, is_disk_full, read_json, write_atomically, write_text
from batteries.interrupts import SIGNALS, Interrupts, Stopped
from batteries.logdirs import check_logdir, holds_run
from batteries.metrics import Averages
from batteries.records import describe_run, now, peak_memory, uncommitted, versions, what_changes_rounding
from batteries.resume import Cursor, Found, check_same_run, cut_lines, find_newest
from batteries.state import TrainState
from batteries.steps import HALVINGS, MOST_SKIPPED, GradientWatch
from batteries.timing import Stopwatch, profile_steps
from batteries.trackers import Backend, NoTracker, check_tracker, make_tracker
from batteries.weights import load_pretrained

SAVE = 1  # a wish below any signal's number
LOG_EVERY = 20  # steps between two reads of the metrics for the progress bar: each waits for the device


class Run:
    """Owns `logdir`; rank 0 writes and speaks, the other ranks make the same calls.

    With `config.resume` it goes on with the run in `logdir`, at `cursor`; the knobs in `may_change` may differ then.
    `data` is a fingerprint of what is trained on, `split` what SplitFile.describe gives. Raises BadInput, before
    anything is written, where `logdir` holds a run that is not to be resumed or is another one, is in use, or cannot be
    written.
    """

    def __init__(
        self,
        logdir: Path,
        config: Any,
        device: torch.device,
        model: nn.Module,
        *,
        model_args: Mapping[str, Any],
        data: str,
        split: Mapping[str, Any],
        may_change: Sequence[str],
    ) -> None:
        self.logdir = Path(logdir)
        self.config = to_json(config)
        self.resume = self.config.pop("resume")  # a way to start, not part of what is repeated
        self.device, self.model = device, model
        self.model_args = dict(model_args)
        self.data = data
        self.split = dict(split)
        self.tracker: Backend = NoTracker()
        self.timing: dict[str, float] = {}
        self.total_step = self.offset = 0  # optimizer steps of the run, and those before this stage
        self.agreement, self.interrupts = Agreement(), Interrupts()
        self.saved_at = time.monotonic()
        self.writer = Writer()
        self.gradients, self.profiled, self.lr = GradientWatch(), False, math.nan
        self.not_pretrained: list[str] = []
        self.skipped: dict[str, list[str]] = {}  # the steps of the present row of skipped ones, and their samples
        self.unwritten: list[list[str]] = []  # file and line, where the disk was full
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
            self._finish_writing()
            self.tracker.finish()
            outcome = _describe_end(kind, error)
            self._write_record(end=now(), exit=outcome, skipped_steps=self.gradients.skipped)
            self.console.note(outcome)
            self.lock.release()
        self.console.close()
        if error is not None and is_out_of_memory(error):
            raise BadInput(self._how_to_fit()) from error
        if kind not in (None, Stopped) and self.interrupts.received:
            signal.raise_signal(self.interrupts.received)  # torchrun's: another rank failed, and will say why

    def _how_to_fit(self) -> str:
        """What to do where the device has not enough memory: the same steps in smaller pieces."""
        batch_size, pieces = self.config["batch_size"], self.config["accumulation_steps"]
        legal = [
            more
            for more in range(pieces + 1, batch_size // world_size() + 1)
            if batch_size % (more * world_size()) == 0 and more >= 2 * pieces
        ]
        said = (
            f"{self.device} has not enough memory for micro-batches of {batch_size // pieces // world_size()} samples"
        )
        if not legal:
            return f"{said}; use a smaller model or images, or --precision bf16."
        return (
            f"{said}; give --accumulation-steps {legal[0]} beside --batch-size {batch_size}: micro-batches of "
            f"{batch_size // legal[0] // world_size()}, and the same steps. --valid-batch-size can be less, too."
        )

    def _finish_writing(self) -> None:
        """A save that is under way when a run fails is brought to its end."""
        try:
            self.writer.wait()
        except Exception as error:  # noqa: BLE001 (what the run failed with goes on to whoever started it)
            logger.warning(f"The last checkpoint was not saved: {error}")

    def load_first_weights(self) -> None:
        """Give a new run the weights of --init-from or --pretrained; a resumed one has its own."""
        if self.found.checkpoint is not None:
            return
        if self.config["init_from"] is not None:
            load_weights(self.config["init_from"], self.model)
        if self.config["pretrained"] is not None:
            self.not_pretrained = load_pretrained(self.model, self.config["pretrained"])

    def say_start(self, samples: Mapping[str, int]) -> None:
        """What will run, before the first step; `samples` counts each split."""
        if not is_main():
            return
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        logger.info(f"logdir   {self.logdir}")
        logger.info(f"device   {self._describe_device()}")
        logger.info(f"data     {', '.join(f'{name} {count:,}' for name, count in samples.items())}")
        logger.info(f"model    {type(self.model).__name__}, {parameters:,} parameters")
        logger.info(f"weights  {self._describe_weights()}")
        logger.info(f"code     git {self.record['git_commit'] or 'without a commit'}, torch {torch.__version__}")

    def _describe_device(self) -> str:
        """What computes, how many of it, and in which precision."""
        wrapper = " with DistributedDataParallel" if world_size() > 1 else ""
        if self.config["data_parallel"]:
            alone = "" if self.device.type == "cuda" else ", which has no GPU to share the work with"
            wrapper = f" with DataParallel{alone}"
        compiled = ", compiled" if self.config["compile"] else ""
        threads = f"{world_size()} x {torch.get_num_threads()} threads"
        return f"{self.device}, {threads}{wrapper}, {self.config['precision']}{compiled}"

    def log_image(self, name: str, make: Callable[[], Any]) -> None:
        """A picture for the tracker at the start of a run, uint8 (3, H, W); made where there is a tracker for it."""
        wanted = is_main() and self.config["tracker"] != "none" and self.found.checkpoint is None
        if wanted and (array := make()) is not None:
            self.tracker.image(name, array, 0)

    def begin_stage(
        self,
        number: int,
        state: TrainState,
        checkpoints: CheckpointManager,
    ) -> Cursor:
        """Where to begin in stage `number`; what the run was cut in is put back into `state`."""
        self.state, self.checkpoints = state, checkpoints
        self.stage = number
        checkpoint = self.found.checkpoint
        if checkpoint is not None and number < self.cursor.stage:
            checkpoints.restore()
            return Cursor(number, epoch=self.config["stages"][number]["epochs"] + 1)
        if checkpoint is not None and number == self.cursor.stage:
            state.restore(checkpoint, self.found.name)
            checkpoints.restore(checkpoint)
            self.gradients.skipped = checkpoint["resume"]["skipped"]
            self.skipped, self.lr = checkpoint["resume"]["row"], checkpoint["resume"]["lr"]
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
            random = f"random, from seed {self.config['seed']}"
            other = self.config["init_from"] or self.config["pretrained"]
            return f"{other}; {random}: {shorten(self.not_pretrained)}" if self.not_pretrained else other or random
        stages, (stage, epoch, step) = self.config["stages"], self.cursor
        if epoch <= stages[stage]["epochs"]:
            return f"resumed from {self.found.name}, in {stages[stage]['name']} epoch {epoch} after {step} steps"
        if stage + 1 < len(stages):
            return f"resumed from {self.found.name}, the end of {stages[stage]['name']}"
        return f"resumed from {self.found.name}: finished already"

    def track(self, batches: Epoch, metrics: Averages) -> Iterator[Batch]:
        """Give `batches` on, show how far they are, keep the time for `log_epoch`, and save within the epoch."""
        if batches.first_step:
            metrics.restore(self.found.checkpoint["resume"]["running"])  # type: ignore[index]
        self.batches, self.step = batches, batches.first_step
        self.watch = Stopwatch(batches, metrics)
        with profile_steps(self._profile_folder()) as profiler:
            for batch in self.console.track(self.watch, self._label(), LOG_EVERY):
                yield batch
                if batch.ends_step:
                    self.step += 1
                    self._after_step(metrics)
                    profiler.step()
        self._look_at_gradients()
        self.timing = self.watch.timing(self.step - batches.first_step)
        self.timing["peak_memory_bytes"] = peak_memory(self.device)

    def log_step(self, lr: float, gradient_norm: torch.Tensor) -> None:
        """Note one optimizer step, for the curves and to see whether it was skipped; nothing waits for the device."""
        self.lr = lr
        self.gradients.note(gradient_norm)

    def _look_at_gradients(self) -> None:
        """Say which steps were skipped since the last look, on all ranks. Raises RunFailed after many in a row."""
        fp16 = self.config["precision"] == "fp16"
        for step, was_skipped in self.gradients.look(self.step):
            if not was_skipped:
                self.skipped = {}
                continue
            name = f"{self._label()} step {step}"
            self.skipped[name] = self.batches.samples_of(step)
            why = "its gradient overflowed fp16, whose scale is halved" if fp16 else "its gradient is not finite"
            logger.warning(f"{name} was skipped: {why}.")
            if len(self.skipped) >= MOST_SKIPPED + HALVINGS * fp16:
                self._give_up(name)

    def _give_up(self, last: str) -> NoReturn:
        """End a run whose steps are skipped one after the other, and name the samples."""
        file = self.logdir / "skipped.json"
        on_main(lambda: write_text(file, json.dumps(self.skipped, indent=2) + "\n"))
        raise RunFailed(
            f"{len(self.skipped)} steps in a row, up to {last}, had no finite gradient, so the run ends. Their samples "
            f"are in {file}; the last: {shorten(self.skipped[last])}. Look at them, or try a smaller "
            f"--stages.{self.stage}.lr."
        )

    def _label(self) -> str:
        stage = self.config["stages"][self.stage]
        return f"{stage['name']} {self.batches.key[2]}/{stage['epochs']}"

    def _profile_folder(self) -> Path | None:
        """Where the trace goes, once in a process."""
        wanted = self.config["profile"] and not self.profiled
        self.profiled = True
        return self.logdir / "profile" if wanted else None

    def make_checkpoint(
        self, epoch: int, step: int, metrics: Mapping[str, Any], ends_stage: bool = False
    ) -> dict[str, Any]:
        """The checkpoint at the end of `epoch`; `step` counts the optimizer steps of the stage."""
        last = self.config["stages"][self.stage]["epochs"] if ends_stage else epoch
        return self._make_checkpoint(epoch, step, metrics, Cursor(self.stage, last + 1), running=[])

    def _make_checkpoint(
        self, epoch: int, step: int, metrics: Mapping[str, Any], cursor: Cursor, running: list
    ) -> dict[str, Any]:
        state = self.state
        resume = {
            "cursor": list(cursor),
            "running": running,
            "data": self.data,
            "world_size": world_size(),
            "versions": versions(),
            "total_step": self.offset + step,
            "unwritten": self.unwritten,
            "skipped": self.gradients.skipped,
            "row": self.skipped,
            "lr": self.lr,
        }
        name = self.config["stages"][self.stage]["name"]
        return make_checkpoint(
            name,
            epoch,
            state.model,
            state.optimizer,
            state.scheduler,
            metrics,
            self.config,
            self.model_args,
            step=step,
            extra={**state.extra(), "resume": resume},
        )

    def _after_step(self, metrics: Averages) -> None:
        """A checkpoint within the epoch where one is due; where a signal came, one before the end. All ranks agree."""
        if self.step % LOG_EVERY == 0:
            self._look_at_gradients()
            self._log_curves(metrics)
        agreed = self.agreement(self.interrupts.received or self._due_by_clock())
        every = self.config["checkpoint_every_steps"]
        due_by_count = every is not None and self.step % every == 0 and self.step < len(self.batches)
        if agreed == SAVE and self.step == len(self.batches):
            agreed = 0  # the checkpoint at the end of the epoch is next
        if not agreed and not due_by_count:
            return
        self._look_at_gradients()
        cursor = Cursor(self.stage, self.batches.key[2], self.step)
        checkpoint = self._make_checkpoint(cursor.epoch, self._step_of_stage(), {}, cursor, metrics.state())
        self.checkpoints.save(checkpoint)
        self.saved_at = time.monotonic()
        if agreed in SIGNALS:
            self.checkpoints.wait()
            raise Stopped(agreed)

    def _step_of_stage(self) -> int:
        return (self.batches.key[2] - 1) * len(self.batches) + self.step

    def _log_curves(self, metrics: Averages) -> None:
        """One point a curve within the epoch: means since its start, on this rank."""
        if is_main():
            values = {**metrics.compute_local(), "lr": self.lr, "samples_per_second": self.watch.samples_per_second()}
            values |= {"gradient_norm": self.gradients.last}
            name = self.config["stages"][self.stage]["name"]
            curves = {f"{name}/steps/{key}": value for key, value in values.items()}
            self.tracker.log(curves, self.offset + self._step_of_stage())

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
        metrics: Mapping[str, Mapping[str, float]],
        is_best: bool,
        is_over: bool = False,
    ) -> None:
        """One line on the terminal, in metrics.jsonl and in timings.jsonl, one point a curve in the tracker.

        `step` counts the optimizer steps of the stage; `metrics` holds those of train and valid, and of valid_ema where
        weights are averaged; `is_over` says that the stage ends early. Numbers that are not finite become null in the
        files: JSON has none.
        """
        self.total_step = self.offset + step
        if not is_main():
            return
        record = {"stage": stage, "epoch": epoch, "step": step, "lr": lr}
        record |= {name: _finite(values) for name, values in metrics.items()}
        timing = {"stage": stage, "epoch": epoch, **self.timing}
        self.unwritten += [["metrics.jsonl", json.dumps(record)], ["timings.jsonl", json.dumps(timing)]]
        self._write_lines()
        curves = {f"{stage}/{part}/{name}": value for part in metrics for name, value in metrics[part].items()}
        self.tracker.log({**curves, f"{stage}/lr": lr}, self.total_step)
        parts = [f"{stage} epoch {epoch}", *(f"{part}  {_means(values)}" for part, values in metrics.items())]
        logger.info(f"{'  '.join(parts)}  {self.timing['seconds']:.1f} s{'  best' if is_best else ''}")
        if is_over:
            logger.info(f"{stage} ends early: no better score in {self.config['patience']} epochs.")

    def _write_lines(self, forgiving: bool = True) -> None:
        """Append what is not written yet. On a full disk it waits for the next epoch, and goes into checkpoints."""
        while self.unwritten:
            file, line = self.unwritten[0]
            try:
                append_text(self.logdir / file, line + "\n")
            except OSError as error:
                if not is_disk_full(error):
                    raise
                full = DiskFull(self.logdir / file, len(line))
                if not forgiving:
                    raise full from None
                logger.warning(f"{full} The line is kept until there is.")
                return
            self.unwritten = self.unwritten[1:]

    def finish(self, stages: Sequence[CheckpointManager]) -> float:
        """What came out, and where it is; gives the best score over all stages."""
        on_main(lambda: self._write_lines(forgiving=False))
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
        self._check_split()
        before = _read_json(self.logdir / "config.json").get("stages", self.config["stages"])
        found = find_newest(self.logdir, [stage["name"] for stage in before])
        if found.checkpoint is not None:
            check_same_run(found.checkpoint["experiment_args"], self.config, may_change, found.cursor)
            if found.checkpoint["resume"]["data"] != self.data:
                raise BadInput(f"--resume would change the run: the data or their split are not those of {found.name}.")
            check_architecture(found.name, found.checkpoint["model_state_dict"], self.model)
            found.messages += what_changes_rounding(found.checkpoint["resume"])
        return found

    def _check_split(self) -> None:
        """The split file has to be the one that the run began with, even where other folds were edited."""
        was = _read_json(self.logdir / "run.json").get("split", self.split)
        if was["sha256"] != self.split["sha256"]:
            raise BadInput(
                f"--resume would change the run: {self.split['file']} is not what the run began with, {was['file']} of "
                f"sha256 {was['sha256'][:12]}…; put that back, or use another --logdir."
            )

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
        if self.found.checkpoint is not None:
            kept = self.found.checkpoint["resume"]["unwritten"]
            self.unwritten = [[file, line] for file, line in kept if line not in _read_text(self.logdir / file)]
            self._write_lines()
        self.record = describe_run(self.device, self.config["seed"]) | {"split": self.split}
        if self.resume and (earlier := _read_json(self.logdir / "run.json")):
            resumed = [*earlier.get("resumed", []), self.record["start"]]
            self.record |= {"start": earlier["start"], "resumed": resumed}
        self._write_record()
        if difference := uncommitted():
            write_atomically(self.logdir / "git.diff", lambda file: file.write(difference))

    def _write_record(self, **values: str | int) -> None:
        self.record |= values
        try:
            write_text(self.logdir / "run.json", json.dumps(self.record, indent=2) + "\n")
        except OSError as error:  # why a run ended is not hidden by this
            logger.warning(f"{self.logdir / 'run.json'} cannot be written: {error.strerror}.")


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _describe_end(kind: type[BaseException] | None, error: BaseException | None) -> str:
    if kind is None:
        return "finished"
    return str(error) if issubclass(kind, Stopped) else f"failed: {kind.__name__}: {error}"


def _means(values: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.4f}" for name, value in sorted(values.items()))
