"""MLflow."""

import importlib
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batteries.core.command_line import shell_command
from batteries.core.errors import RunError
from batteries.core.project import ROOT
from batteries.tracking.base import TrackedRun, describe_run


class MLflow:
    """MLflow: the server in MLFLOW_TRACKING_URI, or else an SQLite file next to the logdir.

    Attributes:
        dashboard: The URL of the server, or the command that starts one.
    """

    dashboard = ""

    def start(self, run: TrackedRun) -> int:
        """Start a run, or continue the one that is tagged with the same id; its options stay unchanged."""
        # A lost server must not delay the run for minutes: by default mlflow tries seven times, for 120 s each.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self._entities: Any = importlib.import_module("mlflow.entities")
        self._metric = f"best/{run.metric}"
        self._last_step = -1
        self._has_score = False
        experiment = self._connect(run.logdir)
        found = self._client.search_runs([experiment], f"tags.`batteries.id` = '{run.id}'")
        if found:
            self._continue_run(found[0])
        else:
            self._id = self._create_run(experiment, run)
        return self._last_step

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log all values in one call, so that a step is stored completely or not at all."""
        now = int(time.time() * 1000)
        points = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=points)
        self._last_step = step
        self._has_score = False

    def image(self, name: str, array: Any, step: int) -> None:
        """Log an image as one file."""
        self._client.log_image(self._id, array.permute(1, 2, 0).numpy(), artifact_file=f"{name}_step_{step}.png")

    def finish(self, score: float | None, best: Path | None, failed: bool) -> None:
        """Log the best score once, at the last step, and its checkpoint as a tag."""
        if score is not None:
            if not self._has_score:
                self._client.log_metric(self._id, self._metric, score, step=max(self._last_step, 0))
            self._client.set_tag(self._id, "best_checkpoint", str(best))
        status = "KILLED" if score is None else "FINISHED"
        self._client.set_terminated(self._id, "FAILED" if failed else status)

    def _connect(self, logdir: Path) -> str:
        """Connect to the server or the file, and return the id of this project's experiment."""
        library = importlib.import_module("mlflow.tracking")
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they log each table that they create
        directory = logdir.absolute().parent
        server = os.environ.get("MLFLOW_TRACKING_URI")
        shown = [] if server else ["--backend-store-uri", _database_url(logdir.parent / "mlflow.db")]
        self.dashboard = server or shell_command("mlflow", "ui", *shown)
        self._client = library.MlflowClient(server or _database_url(directory / "mlflow.db"))
        experiment = self._client.get_experiment_by_name(ROOT.name)
        if experiment is not None:
            return experiment.experiment_id
        artifacts = None if server else (directory / "mlartifacts").as_uri()
        return self._client.create_experiment(ROOT.name, artifact_location=artifacts)

    def _create_run(self, experiment: str, run: TrackedRun) -> str:
        tags = {"batteries.id": run.id, "mlflow.source.git.commit": str(run.record.get("git_commit"))}
        tags |= describe_run(run)
        run_id = self._client.create_run(experiment, run_name=run.logdir.name, tags=tags).info.run_id
        options = [self._entities.Param(name, str(value)) for name, value in run.flat_config().items()]
        self._client.log_batch(run_id, params=options)
        return run_id

    def _continue_run(self, found: Any) -> None:
        """Continue a stored run, and find its last step."""
        self._id = found.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        names = found.data.metrics
        self._has_score = self._metric in names
        points = [point for name in names for point in self._client.get_metric_history(self._id, name)]
        self._last_step = max((point.step for point in points), default=-1)


def _database_url(file: Path) -> str:
    """Return the URL of an SQLite file, with a path that SQLAlchemy and mlflow read as it is.

    A path with ? or % must be quoted, which SQLAlchemy undoes from 2.1 on. For URLs that begin with sqlite:/// mlflow
    creates the directory without undoing it; with the name of the driver it does not.
    """
    from sqlalchemy.engine import URL, make_url

    plain = f"sqlite:///{file}"
    quoted = URL.create("sqlite+pysqlite", database=str(file)).render_as_string()
    for url in (plain, quoted):
        if make_url(url).database == str(file):
            return url
    raise RunError(f"{file} has a ? in its path; use another --logdir, or update sqlalchemy")
