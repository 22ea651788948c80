"""TensorBoard and tensorboardX."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batteries.core.command_line import shell_command
from batteries.core.project import ROOT
from batteries.tracking.base import TrackedRun, describe_run


class TensorBoard:
    """TensorBoard event files in a subdirectory of the logdir, written by torch or by tensorboardX.

    Attributes:
        dashboard: The command that starts TensorBoard.
    """

    def __init__(self, module: str, subdirectory: str) -> None:
        """Import the library.

        Args:
            module: The module with SummaryWriter: torch.utils.tensorboard or tensorboardX.
            subdirectory: The name of the directory in the logdir.
        """
        self.dashboard = "scripts/tensorboard.sh" if (ROOT / "scripts/tensorboard.sh").exists() else ""
        self._subdirectory = subdirectory
        self._module = importlib.import_module(module)
        self._summary = importlib.import_module(f"{module}.summary")

    def start(self, run: TrackedRun) -> int:
        """Start a run, or continue it: the points after `run.resumed_at` are purged and will be logged again."""
        directory = run.logdir / self._subdirectory
        self.dashboard = self.dashboard or shell_command("tensorboard", "--logdir", str(run.logdir))
        is_continued = run.resumed_at is not None and directory.exists()
        self._last_step = run.resumed_at or 0
        self._step_at_start = self._last_step if is_continued else -1
        purge_step = None if run.resumed_at is None else run.resumed_at + 1
        self._writer = self._module.SummaryWriter(str(directory), purge_step=purge_step)
        self._write_options(run)
        if not is_continued:
            self._writer.add_text("run", _markdown_list(describe_run(run)), 0)
        self._writer.flush()
        return self._step_at_start

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log one scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._last_step = max(self._last_step, step)

    def image(self, name: str, array: Any, step: int) -> None:
        """Log an image."""
        self._writer.add_image(name, array, step)
        self._writer.flush()

    def finish(self, score: float | None, best: Path | None, failed: bool) -> None:
        """Log the best score one step after the last one, so that it is purged if the run is resumed."""
        if score is not None:
            self._writer.add_scalar(self._metric, score, self._last_step + 1)
            if self._last_step > self._step_at_start:  # TensorBoard does not purge texts: write this one once
                self._writer.add_text("best_checkpoint", str(best), self._last_step + 1)
            self._writer.file_writer.add_summary(self._session_end)
        self._writer.close()

    def _write_options(self, run: TrackedRun) -> None:
        """Write the options, and the name of the score for the table of runs."""
        self._metric = f"best/{run.metric}"
        options = {name: value if _is_scalar(value) else str(value) for name, value in run.flat_config().items()}
        experiment, session_start, self._session_end = self._summary.hparams(options, {self._metric: 0.0})
        self._writer.file_writer.add_summary(experiment)
        self._writer.file_writer.add_summary(session_start)


def _markdown_list(values: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: `{value}`" for name, value in values.items())


def _is_scalar(value: Any) -> bool:
    """Return whether TensorBoard's hparams accept the value; they reject None and lists."""
    return isinstance(value, bool | int | float | str)
