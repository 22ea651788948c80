"""MLflow."""

import importlib
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batteries.core.command_line import shell_command
from batteries.core.project import ROOT
from batteries.tracking.base import TrackedRun, describe_run


class MLflow:
    """MLflow: the server of MLFLOW_TRACKING_URI, else an SQLite file beside the logdir."""

    dashboard = ""

    def start(self, run: TrackedRun) -> int:
        """The run whose tag has the same id goes on; its knobs stay those that it began with."""
        # A server that has gone must not hold the run up for minutes: mlflow tries seven times, for 120 s each.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self._entities: Any = importlib.import_module("mlflow.entities")
        library = importlib.import_module("mlflow.tracking")
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # it tells of each table that it makes
        folder = run.logdir.absolute().parent
        server = os.environ.get("MLFLOW_TRACKING_URI")
        store = server or f"sqlite:///{folder / 'mlflow.db'}"
        file = f"sqlite:///{run.logdir.parent / 'mlflow.db'}"
        self.dashboard = server or shell_command("mlflow", "ui", "--backend-store-uri", file)
        self._client = library.MlflowClient(store)
        experiment = self._experiment(None if server else folder)
        found = self._client.search_runs([experiment], f"tags.`batteries.id` = '{run.id}'")
        self._metric = f"best/{run.metric}"
        self._last, self._is_whole = -1, False
        if not found:
            self._id = self._begin(experiment, run)
            return -1
        self._id = found[0].info.run_id
        self._client.update_run(self._id, status="RUNNING")
        names = found[0].data.metrics
        self._is_whole = self._metric in names
        points = [point for name in names for point in self._client.get_metric_history(self._id, name)]
        self._last = max((point.step for point in points), default=-1)
        return self._last

    def _experiment(self, folder: Path | None) -> str:
        """The id of this project's experiment; without a server its files lie in `folder`."""
        if found := self._client.get_experiment_by_name(ROOT.name):
            return found.experiment_id
        location = None if folder is None else (folder / "mlartifacts").as_uri()
        return self._client.create_experiment(ROOT.name, artifact_location=location)

    def _begin(self, experiment: str, run: TrackedRun) -> str:
        about = describe_run(run)
        tags = {"batteries.id": run.id, "mlflow.source.git.commit": str(run.record.get("git_commit")), **about}
        id_ = self._client.create_run(experiment, run_name=run.logdir.name, tags=tags).info.run_id
        self._client.log_batch(
            id_, params=[self._entities.Param(name, str(value)) for name, value in run.flat_config().items()]
        )
        return id_

    def log(self, values: Mapping[str, float], step: int) -> None:
        """All values in one call, so that a step is there whole or not at all."""
        now = int(time.time() * 1000)
        points = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=points)
        self._last, self._is_whole = step, False

    def image(self, name: str, array: Any, step: int) -> None:
        """One file."""
        self._client.log_image(self._id, array.permute(1, 2, 0).numpy(), artifact_file=f"{name}_step_{step}.png")

    def finish(self, score: float | None, best: Path | None, failed: bool) -> None:
        """The final score, once, at the last step, and its checkpoint as a tag."""
        if score is not None:
            if not self._is_whole:
                self._client.log_metric(self._id, self._metric, score, step=max(self._last, 0))
            self._client.set_tag(self._id, "best_checkpoint", str(best))
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED" if score is not None else "KILLED")
