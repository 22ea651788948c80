"""Where the curves go. A tracker that fails says so once, and the run goes on: its numbers are in metrics.jsonl too."""

import logging
import tomllib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from batteries.errors import BadInput

logger = logging.getLogger("batteries")


Tracker = Literal["tensorboard", "none"]


class Backend(Protocol):
    """What a run asks of a tracker."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add one point to each curve; `step` counts the optimizer steps of the run."""

    def image(self, name: str, array: Any, step: int) -> None:
        """Add a picture, uint8 (3, H, W)."""

    def finish(self) -> None:
        """Write what is left."""


def default_tracker() -> Tracker:
    """The tracker that this project was rendered with: the first in pyproject.toml's [tool.batteries] trackers."""
    with (Path(__file__).parent.parent / "pyproject.toml").open("rb") as file:
        trackers = tomllib.load(file)["tool"]["batteries"]["trackers"]
    return trackers[0] if trackers else "none"


def check_tracker(name: Tracker) -> None:
    """Raise BadInput where the package of that tracker is not installed."""
    if name != "none" and find_spec(name) is None:
        raise BadInput(f"--tracker {name} needs the package {name}: uv add {name}, or --tracker none.")


def make_tracker(name: Tracker, logdir: Path, purge_step: int | None = None) -> Backend:
    """The tracker of that name, writing under `logdir`, behind a guard that keeps its errors from the run.

    A resumed run gives `purge_step`: points at this step and later are hidden, since they come again.
    """
    return NoTracker() if name == "none" else _Guarded(name, lambda: TensorBoard(logdir, purge_step))


class NoTracker:
    """Tracks nothing."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def image(self, name: str, array: Any, step: int) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class TensorBoard:
    """TensorBoard's own event files, by torch's writer, in `logdir`/tensorboard."""

    def __init__(self, logdir: Path, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(logdir / "tensorboard"), purge_step=purge_step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One scalar for each value."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def image(self, name: str, array: Any, step: int) -> None:
        """One image."""
        self.writer.add_image(name, array, step)
        self.writer.flush()

    def finish(self) -> None:
        """Close the event file."""
        self.writer.close()


class _Guarded:
    """Passes calls on until one fails; warns then, once, and drops the rest."""

    def __init__(self, name: str, make: Callable[[], Backend]) -> None:
        self.name = name
        self.tracker: Backend = NoTracker()
        try:
            self.tracker = make()
        except Exception as error:  # noqa: BLE001 (no tracker may end a run)
            self._give_up(error)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._call("log", values, step)

    def image(self, name: str, array: Any, step: int) -> None:
        self._call("image", name, array, step)

    def finish(self) -> None:
        self._call("finish")

    def _call(self, method: str, *arguments: Any) -> None:
        try:
            getattr(self.tracker, method)(*arguments)
        except Exception as error:  # noqa: BLE001 (no tracker may end a run)
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning(f"{self.name} failed ({error}) and is left out from here on; metrics.jsonl has the rest.")
        self.tracker = NoTracker()
