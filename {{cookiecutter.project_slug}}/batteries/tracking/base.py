"""The interface that every tracker implements."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from batteries.core.config_io import flatten

TrackerName = Literal["tensorboard", "tensorboardx", "wandb", "mlflow", "none"]


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of the run; `resumed_at` counts its optimizer steps so far where it goes on, else None."""

    id: str  # 8 characters, the same when the run goes on
    logdir: Path
    config: Mapping[str, Any]
    record: Mapping[str, Any]  # run.json
    metric: str  # the one that ranks checkpoints
    resumed_at: int | None = None

    def flat_config(self) -> dict[str, Any]:
        """The config without nesting: `stages.0.lr` is a name."""
        return dict(flatten(self.config))


class TrackerBackend(Protocol):
    """What a run asks of a tracker."""

    dashboard: str  # how the user sees it: a command or an address

    def start(self, run: TrackedRun) -> int:
        """Begin, or go on with a run that was cut; gives the last step that is there already, -1 for none."""
        ...

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add one point to each curve; `step` counts the optimizer steps of the run."""

    def image(self, name: str, array: Any, step: int) -> None:
        """Add a picture, a uint8 tensor (3, H, W)."""

    def finish(self, score: float | None, best: Path | None, failed: bool) -> None:
        """Write what is left; with the best score and its checkpoint where the run came to its end."""


def describe_run(run: TrackedRun) -> dict[str, str]:
    """What the trackers show of run.json."""
    return {name: str(run.record.get(name)) for name in ("command", "git_commit", "git_branch", "host", "device")}
