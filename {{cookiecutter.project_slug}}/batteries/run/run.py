"""A training run: its directory, what it resumes from, and its stages."""

import logging
import math
import signal
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from batteries.checkpoint.async_writer import AsyncWriter
from batteries.checkpoint.io import load_weights
from batteries.checkpoint.manager import CheckpointManager, best_of
from batteries.checkpoint.plain_values import to_plain
from batteries.core.config_io import replace_from_json, to_json
from batteries.core.errors import RunError, UserError, explain_nondeterministic, is_out_of_memory
from batteries.core.ranks import is_rank_zero
from batteries.core.signals import Preempted
from batteries.data.image_grid import read_png
from batteries.distributed.collectives import run_on_rank_zero
from batteries.run.checkpoint_policy import CheckpointPolicy
from batteries.run.config import RunConfig
from batteries.run.directory import RunDirectory
from batteries.run.logger import RunLogger
from batteries.run.messages import advise_out_of_memory, describe_exit, end_lines, header_lines
from batteries.run.metadata import describe_architecture, hash_code, hash_config, now, uncommitted_diff
from batteries.run.report_hook import make_reports
from batteries.run.resume import INITIAL_WEIGHT_OPTIONS, RunIdentity, find_resume_point
from batteries.run.stage import RunParts, StageRun
from batteries.tracking.manager import check_trackers
from batteries.training.nonfinite import NonFiniteGuard
from batteries.training.pretrained import PretrainedReport, load_pretrained
from batteries.training.state import TrainState

logger = logging.getLogger("batteries")

ConfigT = TypeVar("ConfigT", bound=RunConfig)


class Run(Generic[ConfigT]):
    """A training run in `config.logdir`. Every rank makes the same calls; rank 0 writes the files.

    Use it as a context manager around the stages. With `config.resume` it continues the run in the directory.

    Attributes:
        config: The options; for a resumed run with the initial weights that it began with.
        device: The device of this process.
        logdir: The run directory.
        logger: Log lines, .jsonl files and trackers.
        writer: Writes the checkpoints in the background.
    """

    def __init__(
        self,
        config: ConfigT,
        device: torch.device,
        model: nn.Module,
        *,
        model_args: Mapping[str, Any],
        data: str,
        split: Mapping[str, Any],
        may_change: Sequence[str],
    ) -> None:
        """Check the directory and find where the run continues. Nothing is written yet.

        Args:
            config: The options.
            device: The device of this process.
            model: The model.
            model_args: The arguments of build_model, for the checkpoints.
            data: The fingerprint of the training data and their split.
            split: The output of `SplitFile.describe`.
            may_change: The options that may differ when a run is resumed, because they do not affect the results.

        Raises:
            UserError: If the directory holds a run that is not to be resumed or a different one, is in use, or cannot
                be written; or if a checkpoint cannot hold `model_args`.
        """
        check_trackers(config.tracker)
        directory = RunDirectory(Path(config.logdir))
        self._difference = uncommitted_diff() if is_rank_zero() else None  # before this run adds a split file
        identity = RunIdentity(
            config_class=type(config),
            config=_values(config),
            may_change=may_change,
            data=data,
            split=split,
            model=describe_architecture(model),
            code=hash_code(),
        )
        self._point = run_on_rank_zero(lambda: find_resume_point(directory, identity, model, resume=config.resume))
        before = self._point.config
        if before:
            config = replace_from_json(config, {name: before.get(name) for name in INITIAL_WEIGHT_OPTIONS})
        self.config: ConfigT = config
        self.device = device
        self.logdir = directory.path
        self.logger = RunLogger(directory, config)
        self.writer = AsyncWriter()
        self._model = model
        self._identity = identity
        self._directory = directory
        self._pretrained: PretrainedReport | None = None
        self._config_hash = hash_config(_values(config), without=[*set(may_change) - set(INITIAL_WEIGHT_OPTIONS)])
        self._parts = self._make_parts(to_plain(dict(model_args), "model_args"))

    def __enter__(self) -> "Run[ConfigT]":
        with ExitStack() as undo:
            undo.callback(self._directory.lock.release)
            run_on_rank_zero(self._write_start)
            undo.callback(self.logger.console.close)
            self.logger.console.open()
            undo.callback(self.logger.finish_trackers, failed=True)
            self.logger.start_trackers(self._parts.values, self._resumed_at())
            for message in self._point.messages:
                logger.warning(message)
            undo.callback(self._parts.policy.signals.__exit__)
            self._parts.policy.signals.__enter__()
            undo.pop_all()  # nothing failed: __exit__ ends the run
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signals = self._parts.policy.signals
        outcome = describe_exit(error, self._parts.stopped_early)
        if is_rank_zero():
            self._finish_writing()
            self.logger.finish_trackers(failed=error is not None and not isinstance(error, Preempted))
            self._write_metadata(exit=outcome)
            self._directory.lock.release()
        self._note_exit(outcome, error)
        self.logger.console.close()
        signals.__exit__()  # last, so that another signal does not interrupt what is written here
        if error is not None and is_out_of_memory(error):
            raise UserError(advise_out_of_memory(self.config, self.device)) from error
        if error is not None and (explanation := explain_nondeterministic(error)):
            raise UserError(explanation) from error
        if kind not in (None, Preempted) and signals.received:
            signal.raise_signal(signals.received)  # torchrun's: another rank failed and reports the cause

    def load_initial_weights(self) -> None:
        """Load the weights of --init-from or --pretrained into the model of a new run."""
        if self._point.checkpoint is not None:
            return
        if self.config.init_from is not None:
            load_weights(self.config.init_from, self._model)
        if self.config.pretrained is not None:
            self._pretrained = load_pretrained(self._model, self.config.pretrained)

    def log_header(self, samples: Mapping[str, int]) -> None:
        """Log what is going to run. `samples` has the number of samples of each split."""
        record = self._directory.metadata.values
        if is_rank_zero():
            lines = header_lines(self.config, self.device, self._model, self._point, self._pretrained, samples, record)
            self.logger.log_lines(lines)

    def log_image(self, name: str, make: Callable[[], Any]) -> None:
        """Log an image to the trackers: a uint8 tensor (3, H, W) or None, which `make` returns if one needs it."""
        self.logger.log_image(name, make, self._parts.total_step)

    def has_begun(self, stage: int) -> bool:
        """Return whether the interrupted run had begun stage `stage` (from 0): its weights are in the checkpoint."""
        return self._point.checkpoint is not None and stage <= self._point.position.stage

    def begin_stage(self, number: int, state: TrainState, checkpoints: CheckpointManager) -> StageRun:
        """Begin or continue stage `number` (from 0); the state of an interrupted stage is restored.

        Returns:
            The stage; its `position` is where to begin.

        Raises:
            UserError: If a checkpoint cannot hold a value of the state.
        """
        stage = StageRun(self._parts, number, state, checkpoints)
        checkpoint, position = self._point.checkpoint, self._point.position
        if checkpoint is not None and number < position.stage:
            checkpoints.restore()
            stage.position = position._replace(stage=number, epoch=self.config.stages[number].epochs + 1, step=0)
        elif checkpoint is not None and number == position.stage:
            stage.restore(checkpoint, self._point.name, position)
        else:
            checkpoints.discard()
        stage.check_state()
        return stage

    def finish(self, stage_checkpoints: Sequence[CheckpointManager]) -> float:
        """Record and log the result, and build the report.

        Args:
            stage_checkpoints: The checkpoints of all stages.

        Returns:
            The best score over all stages; NaN if none was finite.
        """
        run_on_rank_zero(lambda: self._directory.jsonl.write(tolerate_full_disk=False))
        score, best_stage = best_of(stage_checkpoints)
        if is_rank_zero():
            self._write_result(score, best_stage)
        return score

    def _write_result(self, score: float, best_stage: CheckpointManager) -> None:
        parts = self._parts
        path = best_stage.best_path()
        if self._directory.metadata.earlier_exit == "stopped early" and not parts.timing:
            parts.stopped_early = True  # it had already ended, and nothing was trained
        finite_score = score if math.isfinite(score) else None
        best = {
            "metric": best_stage.metric,
            "score": finite_score,
            "stage": best_stage.logdir.name,
            "epoch": best_stage.best_epoch,
        }
        self._write_metadata(best=best, exit=describe_exit(None, parts.stopped_early))
        self.logger.log_lines(end_lines(best, path, self.logdir, self.logger.trackers.dashboards()))
        if self.config.report:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # the report predicts on the same GPU
            make_reports(self.logdir, str(self.device))
            self.log_image("confusion", lambda: read_png(self.logdir / "plots/confusion.png"))
        self.logger.finish_trackers(finite_score, path)

    def _write_metadata(self, **values: Any) -> None:
        skipped = self._parts.guard.monitor.skipped
        self._directory.metadata.write(**values, end=now(), skipped_steps=skipped)

    def _make_parts(self, model_args: Mapping[str, Any]) -> RunParts:
        """Collect what the stages of the run share."""
        config = self.config
        return RunParts(
            config=config,
            values=_values(config),
            model_args=model_args,
            data=self._identity.data,
            code=self._identity.code,
            device=self.device,
            directory=self._directory,
            logger=self.logger,
            policy=CheckpointPolicy(config.checkpoint_every_minutes, config.checkpoint_every_steps),
            guard=NonFiniteGuard(self.logdir / "skipped.json", fp16=config.precision == "fp16"),
        )

    def _write_start(self) -> None:
        """Make the directory and write the files that describe the run."""
        names = [stage.name for stage in self.config.stages]
        self._directory.create(self._parts.values)
        self._directory.rewind(self._point.position, names, self._point.unwritten)
        about = {
            "config_hash": self._config_hash,
            "device": str(self.device),
            "split": dict(self._identity.split),
            "seed": self.config.seed,
            "data": self._identity.data,
            "model": dict(self._identity.model),
            "code": dict(self._identity.code),
        }
        self._directory.metadata.begin(about, self._difference, resumed=self.config.resume)

    def _resumed_at(self) -> int | None:
        """Return the optimizer steps of a resumed run so far; None for a new run."""
        if self._point.checkpoint is not None:
            return self._point.checkpoint["resume"]["total_step"]
        was_killed_before_first_checkpoint = "resumed" in self._directory.metadata.values
        return 0 if was_killed_before_first_checkpoint else None

    def _finish_writing(self) -> None:
        """Complete a save that was in progress when the run failed."""
        try:
            self.writer.wait()
        except Exception as error:  # noqa: BLE001 (the error that ended the run is the one that is raised)
            logger.warning(f"The last checkpoint was not saved: {error}")

    def _note_exit(self, outcome: str, error: BaseException | None) -> None:
        """Write how the run ended to train.log, with the traceback of a bug; the terminal shows it later."""
        console = self.logger.console
        if error is None or isinstance(error, Preempted):
            if is_rank_zero():
                console.note(outcome)
            return
        is_explained = isinstance(error, RunError | UserError)
        trace = "" if is_explained else "".join(traceback.format_exception(error))
        console.note(trace + outcome, logging.ERROR)


def _values(config: RunConfig) -> dict[str, Any]:
    """Return the options as JSON values, without `resume`: it is not part of what is repeated."""
    values = to_json(config)
    del values["resume"]
    return values
