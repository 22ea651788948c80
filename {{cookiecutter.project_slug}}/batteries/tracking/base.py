"""The interface of a tracking library, and the description of a run that it gets."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from batteries.core.config_io import flatten

TrackerName = Literal["tensorboard", "tensorboardx", "wandb", "mlflow", "none"]


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker records.

    Attributes:
        id: 8 characters, the same when the run is resumed.
        logdir: The run directory.
        config: The options, as JSON values.
        record: The contents of run.json.
        metric: The metric that ranks checkpoints.
        resumed_at: The optimizer steps of the run so far if it is resumed, else None.
    """

    id: str
    logdir: Path
    config: Mapping[str, Any]
    record: Mapping[str, Any]
    metric: str
    resumed_at: int | None = None

    def flat_config(self) -> dict[str, Any]:
        """Return the options without nesting, under names such as `stages.0.lr`."""
        return dict(flatten(self.config))


class TrackerBackend(Protocol):
    """The interface of one tracking library. Its methods may raise anything; see manager.py.

    Attributes:
        dashboard: The command or URL where the user sees the curves.
    """

    dashboard: str

    def start(self, run: TrackedRun) -> int:
        """Start a run, or continue it.

        Returns:
            The last step that the tracker already has; -1 if it has none.
        """
        ...

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log one point for each value; `step` counts the optimizer steps of the run."""

    def image(self, name: str, array: Any, step: int) -> None:
        """Log an image: a tensor (1, 3 or 4, H, W) on the CPU, of bytes or of floats from 0 to 1."""

    def finish(self, score: float | None, best: Path | None, failed: bool) -> None:
        """Write what is pending.

        Args:
            score: The best score, if the run has finished.
            best: The checkpoint with the best score, if the run has finished.
            failed: Whether an error ended the run.
        """


def describe_run(run: TrackedRun) -> dict[str, str]:
    """Return the entries of run.json that trackers show."""
    return {name: str(run.record.get(name)) for name in ("command", "git_commit", "git_branch", "host", "device")}
