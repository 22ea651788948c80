"""The folder of one run: what was asked for, what it ran on, and what came out."""

import json
import logging
import math
import signal
import time
import traceback
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
from batteries.devices import return_freed_memory
from batteries.distributed import Agreement, gather_over_ranks, on_main
from batteries.errors import BadInput, RunFailed, is_bad_input, is_out_of_memory, shorten
from batteries.files import Lock, read_json, write_text
from batteries.interrupts import Interrupts, Stopped
from batteries.lines import Lines, read_lines
from batteries.logdirs import check_logdir, holds_run
from batteries.metrics import Averages
from batteries.ranks import is_main, world_size
from batteries.records import (
    Record,
    hash_code,
    hash_config,
    now,
    peak_memory,
    uncommitted,
    versions,
    what_changed,
    what_changes_rounding,
)
from batteries.reports import make_report
from batteries.resume import FIRST_WEIGHTS, Cursor, Found, check_lines, check_same_run, cut_lines, find_newest
from batteries.sheets import read_picture
from batteries.state import TrainState
from batteries.steps import HALVINGS, MOST_SKIPPED, GradientWatch
from batteries.summaries import (
    describe_code,
    describe_device,
    describe_end,
    describe_model,
    describe_stages,
    describe_weights,
    end_lines,
    epoch_line,
    improvement,
)
from batteries.timing import Stopwatch, profile_steps
from batteries.trackers import TrackedRun, Trackers, check_trackers
from batteries.weights import Pretrained, load_pretrained

SAVE = 1  # the wish for a checkpoint; that for an end by a signal is SAVE and its number
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
        self.trackers = Trackers()
        self.record, self.lines = Record(self.logdir), Lines(self.logdir)
        self.stopped_early = False
        self.timing: dict[str, float] = {}
        self.total_step = self.offset = 0  # optimizer steps of the run, and those before this stage
        self.agreement, self.interrupts = Agreement(), Interrupts()
        self.saved_at = time.monotonic()
        self.writer = Writer()
        self.gradients, self.profiled, self.lr = GradientWatch(), False, math.nan
        self.pretrained: Pretrained | None = None
        self.skipped: dict[str, list[str]] = {}  # the steps of the present row of skipped ones, and their samples
        self.lock = Lock(self.logdir / ".lock")
        check_trackers(self.config["tracker"])
        self.code = hash_code()
        self.difference = uncommitted() if is_main() else None  # before this run adds a split file
        self.found = on_main(lambda: self._find(may_change))
        if self.found.checkpoint is not None:  # a run that goes on has its first weights from where it began
            began = self.found.checkpoint["experiment_args"]
            self.config |= {name: began[name] for name in FIRST_WEIGHTS if name in began}
        self.cursor = self.found.cursor
        self.config_hash = hash_config(self.config, without=[*set(may_change) - {*FIRST_WEIGHTS}])

    def __enter__(self) -> "Run":
        on_main(self._start)
        self.console = Console(self.logdir / "train.log", self.config["quiet"])
        if is_main():
            self._start_trackers()
        for message in self.found.messages:
            logger.warning(message)
        self.interrupts.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        outcome = describe_end(error, self.stopped_early)
        if is_main():
            self._finish_writing()
            self.trackers.finish(failed=error is not None and not isinstance(error, Stopped))
            self.record.write(end=now(), exit=outcome, skipped_steps=self.gradients.skipped)
            self.lock.release()
        self._note_end(outcome, error)
        self.console.close()
        self.interrupts.__exit__()  # last: one more signal must not cut what is written here
        if error is not None and is_out_of_memory(error):
            raise BadInput(self._how_to_fit()) from error
        if kind not in (None, Stopped) and self.interrupts.received:
            signal.raise_signal(self.interrupts.received)  # torchrun's: another rank failed, and will say why

    def _note_end(self, outcome: str, error: BaseException | None) -> None:
        """The end in train.log, for a bug with its traceback: the terminal shows it when the log is closed."""
        if error is None or isinstance(error, Stopped):
            if is_main():
                self.console.note(outcome)
            return
        told = isinstance(error, RunFailed) or is_bad_input(error)
        text = outcome if told else "".join(traceback.format_exception(error)) + outcome
        self.console.note(text, logging.ERROR)

    def _start_trackers(self) -> None:
        """Begin, or go on in the same run of each tracker, and give it what it has not yet."""
        checkpoint, record = self.found.checkpoint, self.record.values
        resumed_at = 0 if "resumed" in record else None  # 0: killed before its first checkpoint
        if checkpoint is not None:
            resumed_at = checkpoint["resume"]["total_step"]
        self.trackers = Trackers(self.config["tracker"])
        self.trackers.start(
            TrackedRun(record["id"], self.logdir, self.config, record, self.config["main_metric"], resumed_at)
        )
        offset = last = 0
        for _, line in read_lines(self.logdir / "metrics.jsonl"):
            offset = offset + last if line["epoch"] == 1 else offset
            last = line["step"]
            self._log_point(line, offset + last)

    def _how_to_fit(self) -> str:
        """What to do where the device has not enough memory: steps in smaller pieces, of two samples or more."""
        batch_size, pieces = self.config["batch_size"], self.config["accumulation_steps"]
        legal = [
            more
            for more in range(2 * pieces, batch_size // world_size() // 2 + 1)
            if batch_size % (more * world_size()) == 0
        ]
        said = (
            f"{self.device} has not enough memory for micro-batches of {batch_size // pieces // world_size()} samples"
        )
        if not legal:
            return f"{said}; use a smaller model or images, or --precision bf16."
        return (
            f"{said}; give --accumulation-steps {legal[0]} beside --batch-size {batch_size}: micro-batches of "
            f"{batch_size // legal[0] // world_size()}, and still {batch_size} samples a step. "
            "--valid-batch-size can be less, too."
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
            self.pretrained = load_pretrained(self.model, self.config["pretrained"])

    def say_start(self, samples: Mapping[str, int]) -> None:
        """What will run, before the first step; `samples` counts each split."""
        if not is_main():
            return
        logger.info(f"logdir   {self.logdir}")
        logger.info(f"device   {describe_device(self.device, self.config)}")
        logger.info(f"data     {', '.join(f'{name} {count:,}' for name, count in samples.items())}")
        logger.info(f"model    {describe_model(self.model)}")
        logger.info(f"weights  {describe_weights(self.config, self.found, self.pretrained)}")
        logger.info(f"stages   {describe_stages(self.config)}")
        logger.info(f"code     {describe_code(self.record.values)}")
        parts = "train/valid/valid_ema" if self.config["ema_decay"] is not None else "train/valid"
        logger.info(f"epochs   each metric as {parts}")

    def log_image(self, name: str, make: Callable[[], Any]) -> None:
        """A picture for the trackers, a uint8 tensor (3, H, W) or None; made where there is a tracker for it."""
        self.trackers.image(name, make, self.total_step)

    def begin_stage(self, number: int, state: TrainState, checkpoints: CheckpointManager) -> Cursor:
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

    def track(self, batches: Epoch, metrics: Averages) -> Iterator[Batch]:
        """Give `batches` on, show how far they are, keep the time for `log_epoch`, and save within the epoch."""
        if batches.first_step:
            metrics.restore(self.found.checkpoint["resume"]["running"])  # type: ignore[index]
        self.batches, self.step = batches, batches.first_step
        self.watch = Stopwatch(batches, metrics)
        with profile_steps(self._profile_folder(), len(batches) - batches.first_step) as profiler:
            for batch in self.console.track(self.watch, self._label(), LOG_EVERY):
                yield batch
                if batch.ends_step:
                    self.step += 1
                    self._after_step(metrics)
                    profiler.step()
        self._look_at_gradients()
        return_freed_memory()
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
            "threads": torch.get_num_threads(),
            "code": self.code,
            "versions": versions(),
            "total_step": self.offset + step,
            "unwritten": self.lines.unwritten,
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
            if self.step < len(self.batches):  # the end of an epoch has a point of its own
                self._log_curves(metrics)
        received = self.interrupts.received
        agreed = self.agreement(SAVE + received if received else self._due_by_clock())
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
        if agreed > SAVE:
            self.checkpoints.wait()
            raise Stopped(agreed - SAVE)

    def stop_if_asked(self) -> None:
        """Raise Stopped where a signal came since the last step; call it when the epoch is saved. All ranks agree."""
        if received := max(gather_over_ranks(self.interrupts.received)):
            self.checkpoints.wait()
            raise Stopped(received)

    def _step_of_stage(self) -> int:
        return (self.batches.key[2] - 1) * len(self.batches) + self.step

    def _log_curves(self, metrics: Averages) -> None:
        """One point a curve within the epoch: means since its start, on this rank."""
        if not self.trackers:
            return
        values = {**metrics.compute_local(), "lr": self.lr, "samples_per_second": self.watch.samples_per_second()}
        values |= {"gradient_norm": self.gradients.last}
        name = self.config["stages"][self.stage]["name"]
        curves = {f"{name}/steps/{key}": value for key, value in values.items()}
        self.trackers.log(curves, self.offset + self._step_of_stage())

    def _due_by_clock(self) -> int:
        """Whether it is time for a checkpoint; rank 0 looks at its clock for all."""
        minutes = self.config["checkpoint_every_minutes"]
        if minutes is None or time.monotonic() - self.saved_at < 60 * minutes or not is_main():
            return 0
        self.saved_at = time.monotonic()
        return SAVE

    def log_epoch(
        self, epoch: int, step: int, metrics: Mapping[str, Mapping[str, float]], score: float, is_over: bool = False
    ) -> None:
        """One line on the terminal, in metrics.jsonl and in timings.jsonl, one point a curve in the trackers.

        `step` counts the optimizer steps of the stage; `metrics` holds those of train and valid, and of valid_ema where
        weights are averaged; `is_over` says that the stage ends early. Numbers that are not finite become null in the
        files: JSON has none.
        """
        is_best, before = self.checkpoints.is_better(score), self.checkpoints.best_score
        self.total_step, self.stopped_early = self.offset + step, is_over
        if not is_main():
            return
        stage = self.config["stages"][self.stage]
        line = {"stage": stage["name"], "epoch": epoch, "step": step, "lr": self.lr}
        line |= {name: _finite(values) for name, values in metrics.items()}
        self.lines.add("metrics.jsonl", line)
        self.lines.add("timings.jsonl", {"stage": stage["name"], "epoch": epoch, **self.timing})
        self._log_point(line, self.total_step)
        label = f"{stage['name']} {epoch}/{stage['epochs']}"
        logger.info(epoch_line(label, metrics, self.timing["seconds"], improvement(score, before, is_best)))
        if is_over:
            patience = self.config["patience"]
            logger.info(f"{stage['name']} ends early: no better score in {patience} epoch{'s' * (patience > 1)}.")

    def _log_point(self, line: Mapping[str, Any], total_step: int) -> None:
        """A line of metrics.jsonl as a point on each curve of the trackers."""
        stage = line["stage"]
        parts = [name for name in line if isinstance(line[name], Mapping)]
        curves = {f"{stage}/{part}/{name}": value for part in parts for name, value in line[part].items()}
        self.trackers.log({**curves, f"{stage}/lr": line["lr"]}, total_step)

    def finish(self, stages: Sequence[CheckpointManager]) -> float:
        """What came out, and where it is; gives the best score over all stages."""
        on_main(lambda: self.lines.write(forgiving=False))
        score, stage = best_of(stages)
        path = stage.best_path()
        if is_main():
            if self.record.earlier_exit == "stopped early" and not self.timing:
                self.stopped_early = True  # it had ended already, and nothing was trained
            finite = _finite({"score": score})
            best = {"metric": stage.metric, **finite, "stage": stage.logdir.name, "epoch": stage.best_epoch}
            look = self.trackers.look()
            outcome = describe_end(None, self.stopped_early)
            self.record.write(best=best, end=now(), exit=outcome, skipped_steps=self.gradients.skipped)
            for line in end_lines(best, path, self.logdir, look):
                logger.info(line)
            if self.config["report"]:
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()  # to make room: report.py predicts on the same GPU
                make_report(self.logdir, str(self.device))
                self.log_image("confusion", lambda: read_picture(self.logdir / "plots/confusion.png"))
            self.trackers.finish(finite["score"], path)
        return score

    def _find(self, may_change: Sequence[str]) -> Found:
        """What there is to go on from; nothing is written but the names of damaged files."""
        if not self.resume or not holds_run(self.logdir):
            check_logdir(self.logdir)
            return Found()
        self.lock.acquire()
        self._check_split()
        before = _read_json(self.logdir / "config.json").get("stages", self.config["stages"])
        names = [stage["name"] for stage in before]
        found = find_newest(self.logdir, names)
        if found.checkpoint is not None:
            check_same_run(found.checkpoint["experiment_args"], self.config, may_change, found.cursor)
            if found.checkpoint["resume"]["data"] != self.data:
                raise BadInput(f"--resume would change the run: the data or their split are not those of {found.name}.")
            check_architecture(found.name, found.checkpoint["model_state_dict"], self.model)
            check_lines(self.logdir / "metrics.jsonl", names, found)
            found.messages += what_changes_rounding(found.checkpoint["resume"])
            found.messages += what_changed(found.checkpoint["resume"]["code"], self.code)
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
            self.lines.restore(self.found.checkpoint["resume"]["unwritten"])
        about = {"config_hash": self.config_hash, "device": str(self.device), "split": self.split}
        self.record.begin({**about, "seed": self.config["seed"]}, self.difference, resumed=self.resume)


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
