"""TensorBoard and tensorboardX."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batteries.core.command_line import shell_command
from batteries.core.project import ROOT
from batteries.tracking.base import TrackedRun, describe_run


class TensorBoard:
    """TensorBoard's own event files, by the writer of torch or of tensorboardX, in `logdir`/`folder`."""

    def __init__(self, module: str, folder: str) -> None:
        self.folder = folder
        self.dashboard = "scripts/tensorboard.sh" if (ROOT / "scripts/tensorboard.sh").exists() else ""
        self._module = importlib.import_module(module)
        self._summary = importlib.import_module(f"{module}.summary")

    def start(self, run: TrackedRun) -> int:
        """Points after `resumed_at` are purged, since they come again; those before are there."""
        folder = run.logdir / self.folder
        self.dashboard = self.dashboard or shell_command("tensorboard", "--logdir", str(run.logdir))
        went_on = run.resumed_at is not None and folder.exists()
        purge_step = None if run.resumed_at is None else run.resumed_at + 1
        self._last = run.resumed_at or 0
        self._told = self._last if went_on else -1  # up to which step a run that had finished has told its end
        self._writer = self._module.SummaryWriter(str(folder), purge_step=purge_step)
        self._metric = f"best/{run.metric}"
        flat_config = {name: value if _is_plain(value) else str(value) for name, value in run.flat_config().items()}
        experiment, begin, self._end = self._summary.hparams(flat_config, {self._metric: 0.0})
        for summary in (experiment, begin):
            self._writer.file_writer.add_summary(summary)
        if not went_on:
            self._writer.add_text("run", _markdown(describe_run(run)), 0)
        self._writer.flush()
        return self._last if went_on else -1

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._last = max(self._last, step)

    def image(self, name: str, array: Any, step: int) -> None:
        """One image."""
        self._writer.add_image(name, array, step)
        self._writer.flush()

    def finish(self, score: float | None, best: Path | None, failed: bool) -> None:
        """The final score is one step after the last, so that it is purged where the run goes on."""
        if score is not None:
            self._writer.add_scalar(self._metric, score, self._last + 1)
            if self._last > self._told:  # TensorBoard purges no texts
                self._writer.add_text("best_checkpoint", str(best), self._last + 1)
            self._writer.file_writer.add_summary(self._end)
        self._writer.close()


def _markdown(values: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: `{value}`" for name, value in values.items())


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)
