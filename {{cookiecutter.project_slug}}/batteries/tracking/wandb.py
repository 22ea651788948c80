"""Weights & Biases."""

import importlib
import logging
import os
import shlex
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from batteries.core.command_line import shell_command
from batteries.core.project import ROOT
from batteries.tracking.base import TrackedRun, describe_run

logger = logging.getLogger("batteries")


class Wandb:
    """Weights & Biases, in `logdir`/wandb; offline where there is no account or no network."""

    dashboard = ""

    def start(self, run: TrackedRun) -> int:
        """The run of the same id goes on."""
        wandb: Any = importlib.import_module("wandb")
        config = {**run.config, "run": describe_run(run)}
        arguments = {"project": ROOT.name, "name": run.logdir.name, "id": run.id, "config": config, "resume": "allow"}
        self._run = _start_wandb(wandb, run.logdir, arguments)
        self._run.define_metric("*", step_metric="step")
        offline = self._run.settings.mode == "offline"
        files = f"{shlex.quote(str(run.logdir))}/wandb/offline-run-*-{run.id}"  # the shell finds them
        self.dashboard = f"{shell_command('wandb', 'sync')} {files}" if offline else str(self._run.url)
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
