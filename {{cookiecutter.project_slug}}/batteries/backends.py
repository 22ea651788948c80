"""The trackers, each through its library's own writer; a library is imported when it is used."""

import importlib
import logging
import os
import shlex
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from batteries.cli import as_typed
from batteries.trackers import TrackedRun

logger = logging.getLogger("batteries")

ROOT = Path(__file__).parent.parent


class TensorBoard:
    """TensorBoard's own event files, by the writer of torch or of tensorboardX, in `logdir`/`folder`."""

    def __init__(self, module: str, folder: str) -> None:
        self.folder = folder
        self.look = "scripts/tensorboard.sh" if (ROOT / "scripts/tensorboard.sh").exists() else ""
        self._module = importlib.import_module(module)
        self._summary = importlib.import_module(f"{module}.summary")

    def start(self, run: TrackedRun) -> int:
        """Points after `resumed_at` are purged, since they come again; those before are there."""
        folder = run.logdir / self.folder
        self.look = self.look or as_typed("tensorboard", "--logdir", str(run.logdir))
        went_on = run.resumed_at is not None and folder.exists()
        purge_step = None if run.resumed_at is None else run.resumed_at + 1
        self._last = run.resumed_at or 0
        self._told = self._last if went_on else -1  # up to which step a run that had finished has told its end
        self._writer = self._module.SummaryWriter(str(folder), purge_step=purge_step)
        self._metric = f"best/{run.metric}"
        knobs = {name: value if _is_plain(value) else str(value) for name, value in run.knobs().items()}
        experiment, begin, self._end = self._summary.hparams(knobs, {self._metric: 0.0})
        for summary in (experiment, begin):
            self._writer.file_writer.add_summary(summary)
        if not went_on:
            self._writer.add_text("run", _markdown(_about(run)), 0)
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


class Wandb:
    """Weights & Biases, in `logdir`/wandb; offline where there is no account or no network."""

    look = ""

    def start(self, run: TrackedRun) -> int:
        """The run of the same id goes on."""
        wandb: Any = importlib.import_module("wandb")
        config = {**run.config, "run": _about(run)}
        arguments = {"project": ROOT.name, "name": run.logdir.name, "id": run.id, "config": config, "resume": "allow"}
        self._run = _start_wandb(wandb, run.logdir, arguments)
        self._run.define_metric("*", step_metric="step")
        offline = self._run.settings.mode == "offline"
        files = f"{shlex.quote(str(run.logdir))}/wandb/offline-run-*-{run.id}"  # the shell finds them
        self.look = f"{as_typed('wandb', 'sync')} {files}" if offline else str(self._run.url)
        self._metric = f"best/{run.metric}"
        self._image = wandb.Image
        if run.resumed_at is None:
            return -1
        known = [*_steps_in(run.logdir / "wandb", run.id), self._run.summary.get("step", -1)]
        return int(max(known))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One row."""
        self._run.log({"step": step, **values})

    def image(self, name: str, array: Any, step: int) -> None:
        """One image in a row of its own."""
        self._run.log({"step": step, name: self._image(array.permute(1, 2, 0).numpy())})

    def finish(self, score: float | None, best: Path | None, failed: bool) -> None:
        """The final score goes into the summary."""
        if score is not None:
            self._run.summary[self._metric] = score
            self._run.summary["best_checkpoint"] = str(best)
        self._run.finish(exit_code=int(failed))


class MLflow:
    """MLflow: the server of MLFLOW_TRACKING_URI, else an SQLite file beside the logdir."""

    look = ""

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
        self.look = server or as_typed("mlflow", "ui", "--backend-store-uri", file)
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
        about = _about(run)
        tags = {"batteries.id": run.id, "mlflow.source.git.commit": str(run.record.get("git_commit")), **about}
        id_ = self._client.create_run(experiment, run_name=run.logdir.name, tags=tags).info.run_id
        self._client.log_batch(
            id_, params=[self._entities.Param(name, str(value)) for name, value in run.knobs().items()]
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


def _about(run: TrackedRun) -> dict[str, str]:
    """What the trackers show of run.json."""
    return {name: str(run.record.get(name)) for name in ("command", "git_commit", "git_branch", "host", "device")}


def _markdown(values: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: `{value}`" for name, value in values.items())


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _start_wandb(wandb: Any, logdir: Path, arguments: Mapping[str, Any]) -> Any:
    """A run of wandb: as WANDB_MODE says; without it, offline where there is no account or no answer."""
    settings = wandb.Settings(
        silent=True,
        console="off",  # train.log has it
        init_timeout=30,
        # What SIGKILL may take is what was logged in this time (seconds). It comes back from metrics.jsonl.
        x_transaction_log_flush_interval=0.1,
    )
    arguments = {**arguments, "dir": logdir, "settings": settings}
    if "WANDB_MODE" in os.environ:
        return wandb.init(**arguments)
    why = "it has no account here (wandb login)"
    if wandb.login(prompt=False, verify=False):
        try:
            return wandb.init(**arguments)
        except wandb.errors.CommError as error:
            why = str(error).splitlines()[0]
    logger.warning(f"wandb works offline: {why}.")
    return wandb.init(**arguments, mode="offline")


def _steps_in(folder: Path, run_id: str) -> Iterator[int]:
    """The steps that wandb's own files hold of an offline run: it cannot tell them itself when the run goes on."""
    records: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    for path in folder.glob(f"offline-run-*-{run_id}/*.wandb"):
        for data in _records_in(path.read_bytes()):
            record = records.Record()
            record.ParseFromString(data)
            for item in record.history.item:
                if "step" in (item.key, *item.nested_key):
                    yield int(float(item.value_json))


def _records_in(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file, up to where a kill has torn it.

    7 bytes of header, then LevelDB's log format: blocks of 32 KiB of pieces, each a checksum of 4 bytes, a length of 2
    and a kind of 1 (whole, first, middle, last). https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    position, record = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        piece = data[position + 7 : position + 7 + length]
        if len(piece) < length or kind not in (1, 2, 3, 4):
            return
        record = piece if kind in (1, 2) else record + piece
        if kind in (1, 4):
            yield record
        position += 7 + length
