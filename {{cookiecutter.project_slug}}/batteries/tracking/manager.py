"""The trackers of a run."""

import logging
import textwrap
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batteries.core.errors import UserError
from batteries.core.project import project_settings
from batteries.tracking.base import TrackedRun, TrackerBackend, TrackerName

logger = logging.getLogger("batteries")

PACKAGES = {"tensorboardx": "tensorboardX"}  # packages whose names differ from those of their trackers
SECONDS_TO_FINISH = 120  # time limit for a tracker that still sends points to a server


def default_trackers() -> tuple[TrackerName, ...]:
    """Return the default of --tracker: the first tracker in [tool.batteries] of pyproject.toml, or none."""
    trackers = project_settings()["trackers"]
    return tuple(trackers[:1]) or ("none",)


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raise UserError if a tracker is repeated or combined with none, or its package is not installed."""
    if not names or len(set(names)) < len(names) or ("none" in names and len(names) > 1):
        raise UserError(f"--tracker {' '.join(names)} must be none, or one or more different trackers.")
    for name in names:
        package = PACKAGES.get(name, name)
        if name != "none" and find_spec(package) is None:
            raise UserError(f"--tracker {name} needs the package {package}: uv add {package}, or --tracker none.")


class Trackers:
    """The trackers of a run. An error of a tracker never reaches the run."""

    def __init__(self, names: Sequence[TrackerName] = ()) -> None:
        self._guards = [_GuardedTracker(name) for name in names if name != "none"]

    def __bool__(self) -> bool:
        """Return whether there is any tracker."""
        return bool(self._guards)

    def start(self, run: TrackedRun) -> None:
        """Start or continue the run in each tracker."""
        for guard in self._guards:
            guard.start(run)

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        """Log one point for each value that is not None, to each tracker that does not have the step yet."""
        points = {name: value for name, value in values.items() if value is not None}
        for guard in self._guards:
            if step > guard.last_step:
                guard.run(lambda backend: backend.log(points, step))

    def image(self, name: str, make: Callable[[], Any], step: int) -> None:
        """Log an image to each tracker that does not have the step yet; warn of one of another shape or type.

        Args:
            name: The name of the image.
            make: Returns the image, a uint8 tensor (3, H, W), or None; called only if a tracker needs it.
            step: The optimizer steps of the run.
        """
        missing = [guard for guard in self._guards if step > guard.last_step]
        array = make() if missing else None
        if array is None:
            return
        image = _to_image(array)
        if image is None:
            logger.warning(f"image {name} is not logged: it is {_describe(array)}; give a uint8 tensor (3, H, W).")
            return
        for guard in missing:
            guard.run(lambda backend: backend.image(name, image, step))

    def finish(self, score: float | None = None, best: Path | None = None, failed: bool = False) -> None:
        """Finish each tracker, with the arguments of TrackerBackend.finish; wait SECONDS_TO_FINISH at most for each."""

        def finish_backend(backend: TrackerBackend) -> None:
            backend.finish(score, best, failed)

        for guard in self._guards:
            thread = threading.Thread(target=guard.run, args=(finish_backend,), daemon=True)
            thread.start()
            thread.join(SECONDS_TO_FINISH)
            if thread.is_alive():
                logger.warning(
                    f"{guard.name} did not finish within {SECONDS_TO_FINISH} s; its last points may be missing."
                )
        self._guards = []

    def dashboards(self) -> list[str]:
        """Return the distinct dashboards of the trackers that work."""
        return list(dict.fromkeys(guard.backend.dashboard for guard in self._guards if guard.backend is not None))


def _to_image(array: Any) -> Any:
    """Return a tensor or an array as an image that every tracker can log, (1, 3 or 4, H, W); None if it is not one."""
    import torch

    try:
        image = torch.as_tensor(array).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        return None
    if image.ndim != 3 or image.shape[0] not in (1, 3, 4) or not image.numel():
        return None
    if image.is_floating_point():
        return image.float()
    return image if image.min() >= 0 and image.max() <= 255 else None


def _describe(array: Any) -> str:
    """Describe a value that is not an image."""
    shape = getattr(array, "shape", None)
    kind = type(array).__name__
    return f"of type {kind}" if shape is None else f"a {kind} {tuple(shape)} of {array.dtype}"


class _GuardedTracker:
    """Runs the calls of one tracker until one fails; then logs one warning and drops the others.

    Attributes:
        name: The name of the tracker.
        backend: The tracking library; None before the start and after a failure.
        last_step: The last step that the tracker had when it was started; -1 for none.
    """

    def __init__(self, name: TrackerName) -> None:
        self.name: TrackerName = name
        self.backend: TrackerBackend | None = None
        self.last_step = -1

    def start(self, run: TrackedRun) -> None:
        """Import the library and start or continue the run."""
        try:
            self.backend = _make_backend(self.name)
            self.last_step = self.backend.start(run)
        except Exception as error:  # noqa: BLE001 (no tracker may end a run)
            self._disable(error)

    def run(self, call: Callable[[TrackerBackend], None]) -> None:
        """Call `call` with the tracking library, unless it has failed before."""
        if self.backend is None:
            return
        try:
            call(self.backend)
        except Exception as error:  # noqa: BLE001 (no tracker may end a run)
            self._disable(error)

    def _disable(self, error: Exception) -> None:
        lines = str(error).strip().splitlines()
        first = lines[0] if lines else type(error).__name__
        reason = textwrap.shorten(first, 160, placeholder=" …")
        logger.warning(f"{self.name} failed ({reason}) and is disabled from here on; metrics.jsonl has all metrics.")
        self.backend = None


def _make_backend(name: TrackerName) -> TrackerBackend:
    """Import the module of one tracking library, and the library."""
    if name == "wandb":
        from batteries.tracking.wandb import Wandb

        return Wandb()
    if name == "mlflow":
        from batteries.tracking.mlflow import MLflow

        return MLflow()
    from batteries.tracking.tensorboard import TensorBoard

    if name == "tensorboardx":
        return TensorBoard("tensorboardX", name)
    return TensorBoard("torch.utils.tensorboard", name)
