"""All trackers of a run."""

import importlib
import logging
import textwrap
import threading
import tomllib
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batteries.core.errors import UserError
from batteries.core.project import ROOT
from batteries.tracking.base import TrackedRun, TrackerBackend, TrackerName

logger = logging.getLogger("batteries")
# Module of this package, class and arguments.
BACKENDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "tensorboard": ("tensorboard", "TensorBoard", ("torch.utils.tensorboard", "tensorboard")),
    "tensorboardx": ("tensorboard", "TensorBoard", ("tensorboardX", "tensorboardx")),
    "wandb": ("wandb", "Wandb", ()),
    "mlflow": ("mlflow", "MLflow", ()),
}
PACKAGES = {"tensorboardx": "tensorboardX"}  # where a package is not called like its tracker
SECONDS_TO_FINISH = 120  # for what a tracker has still to send to a server


def default_trackers() -> tuple[TrackerName, ...]:
    """The tracker that this project was rendered with: the first in pyproject.toml's [tool.batteries] trackers."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        trackers = tomllib.load(file)["tool"]["batteries"]["trackers"]
    return tuple(trackers[:1]) or ("none",)


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raise BadInput where a tracker is named twice or beside none, or where its package is not installed."""
    if not names or len(set(names)) < len(names) or ("none" in names and len(names) > 1):
        raise UserError(f"--tracker {' '.join(names)} must be none, or one or more trackers, each once.")
    for name in names:
        package = PACKAGES.get(name, name)
        if name != "none" and find_spec(package) is None:
            raise UserError(f"--tracker {name} needs the package {package}: uv add {package}, or --tracker none.")


class Trackers:
    """All trackers of a run, each behind a guard that keeps its errors from the run."""

    def __init__(self, names: Sequence[TrackerName] = ()) -> None:
        self._guards = [_GuardedTracker(name) for name in names if name != "none"]

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._guards)

    def start(self, run: TrackedRun) -> None:
        """Begin, or go on: points that a tracker has already are not given to it again."""
        for guard in self._guards:
            guard.start(run)

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        """One point for each value that is there."""
        points = {name: value for name, value in values.items() if value is not None}
        for guard in self._guards:
            if step > guard.last_step:
                guard.call("log", points, step)

    def image(self, name: str, make: Callable[[], Any], step: int) -> None:
        """The picture that `make` gives, a uint8 tensor (3, H, W) or None; it is made where a tracker lacks it."""
        lacking = [guard for guard in self._guards if step > guard.last_step]
        if lacking and (array := make()) is not None:
            for guard in lacking:
                guard.call("image", name, array, step)

    def finish(self, score: float | None = None, best: Path | None = None, failed: bool = False) -> None:
        """Write what is left; a tracker that cannot in two minutes is left alone."""
        for guard in self._guards:
            thread = threading.Thread(target=guard.call, args=("finish", score, best, failed), daemon=True)
            thread.start()
            thread.join(SECONDS_TO_FINISH)
            if thread.is_alive():
                logger.warning(f"{guard.name} has not finished after {SECONDS_TO_FINISH} s and is left alone.")
        self._guards = []

    def dashboards(self) -> list[str]:
        """How the user sees those that work, each way once."""
        return list(dict.fromkeys(guard.backend.dashboard for guard in self._guards if guard.backend is not None))


class _GuardedTracker:
    """Passes calls on until one fails; warns then, once, and drops the rest."""

    def __init__(self, name: TrackerName) -> None:
        self.name: TrackerName = name
        self.backend: TrackerBackend | None = None
        self.last_step = -1

    def start(self, run: TrackedRun) -> None:
        """Import the library and begin."""
        try:
            self.backend = _make_backend(self.name)
            self.last_step = self.backend.start(run)
        except Exception as error:  # noqa: BLE001 (no tracker may end a run)
            self._give_up(error)

    def call(self, method: str, *arguments: Any) -> None:
        """Pass one call on."""
        if self.backend is None:
            return
        try:
            getattr(self.backend, method)(*arguments)
        except Exception as error:  # noqa: BLE001 (no tracker may end a run)
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        [first, *_] = str(error).strip().splitlines() or [type(error).__name__]
        reason = textwrap.shorten(first, 160, placeholder=" …")
        logger.warning(f"{self.name} failed ({reason}) and is left out from here on; metrics.jsonl has the rest.")
        self.backend = None


def _make_backend(name: TrackerName) -> TrackerBackend:
    """Import the module of one tracking library, which imports the library."""
    module, make, arguments = BACKENDS[name]
    return getattr(importlib.import_module(f"batteries.tracking.{module}"), make)(*arguments)
