"""Weights & Biases."""

import importlib
import logging
import os
import shlex
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from batteries.core.command_line import shell_command
from batteries.core.project import ROOT
from batteries.tracking.base import TrackedRun, describe_run

logger = logging.getLogger("batteries")

# The format of a .wandb file: a header, then LevelDB's log format, which is blocks of records. Each record has a
# checksum (4 bytes), a length (2 bytes), a type (1 byte) and data.
# https://github.com/google/leveldb/blob/main/doc/log_format.md
FILE_HEADER_BYTES = 7
BLOCK_BYTES = 32768
RECORD_HEADER_BYTES = 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class Wandb:
    """Weights & Biases in `logdir`/wandb; offline without an account or a network connection.

    Attributes:
        dashboard: The URL of the run, or the command that uploads an offline run.
    """

    dashboard = ""

    def start(self, run: TrackedRun) -> int:
        """Start a run, or continue the one with the same id."""
        wandb: Any = importlib.import_module("wandb")
        self._run = _init(wandb, run)
        self._run.define_metric("*", step_metric="step")
        self._metric = f"best/{run.metric}"
        self._image = wandb.Image
        if self._run.settings.mode == "offline":
            files = f"{shlex.quote(str(run.logdir))}/wandb/offline-run-*-{run.id}"  # a pattern for the user's shell
            self.dashboard = f"{shell_command('wandb', 'sync')} {files}"
        else:
            self.dashboard = str(self._run.url)
        if run.resumed_at is None:
            return -1
        steps = [*_steps_in(run.logdir / "wandb", run.id), self._run.summary.get("step", -1)]
        return int(max(steps))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log all values in one row."""
        self._run.log({"step": step, **values})

    def image(self, name: str, array: Any, step: int) -> None:
        """Log an image in a separate row."""
        self._run.log({"step": step, name: self._image(array.permute(1, 2, 0).numpy())})

    def finish(self, score: float | None, best: Path | None, failed: bool) -> None:
        """Write the best score and its checkpoint to the summary."""
        if score is not None:
            self._run.summary[self._metric] = score
            self._run.summary["best_checkpoint"] = str(best)
        self._run.finish(exit_code=int(failed))


def _init(wandb: Any, run: TrackedRun) -> Any:
    """Start a run of wandb in the mode of WANDB_MODE; if that is not set, offline without an account or an answer."""
    settings = wandb.Settings(
        silent=True,
        console="off",  # train.log has the output
        init_timeout=30,
        **_flush_settings(wandb),
    )
    init = partial(
        wandb.init,
        project=ROOT.name,
        name=run.logdir.name,
        id=run.id,
        config={**run.config, "run": describe_run(run)},
        resume="allow",
        dir=run.logdir,
        settings=settings,
    )
    if "WANDB_MODE" in os.environ:
        return init()
    reason = "no account is configured on this machine (wandb login)"
    if wandb.login(prompt=False, verify=False):
        try:
            return init()
        except wandb.errors.CommError as error:
            reason = str(error).splitlines()[0]
    logger.warning(f"wandb runs offline: {reason}.")
    return init(mode="offline")


def _steps_in(directory: Path, run_id: str) -> Iterator[int]:
    """List the steps in the files of an offline run, because wandb does not read them when it continues the run."""
    records: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    for path in directory.glob(f"offline-run-*-{run_id}/*.wandb"):
        for data in _records_in(path.read_bytes()):
            record = records.Record()
            record.ParseFromString(data)
            for item in record.history.item:
                if "step" in (item.key, *item.nested_key):
                    yield int(float(item.value_json))


def _records_in(data: bytes) -> Iterator[bytes]:
    """List the data of the complete records of a .wandb file, which a killed process can leave truncated."""
    position = FILE_HEADER_BYTES
    record = b""
    while position + RECORD_HEADER_BYTES <= len(data):
        left_in_block = BLOCK_BYTES - position % BLOCK_BYTES
        if left_in_block < RECORD_HEADER_BYTES:
            position += left_in_block
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)  # after the checksum
        start = position + RECORD_HEADER_BYTES
        fragment = data[start : start + length]
        if len(fragment) < length or kind not in (FULL, FIRST, MIDDLE, LAST):
            return
        record = fragment if kind in (FULL, FIRST) else record + fragment
        if kind in (FULL, LAST):
            yield record
        position = start + length


def _flush_settings(wandb: Any) -> dict[str, float]:
    """Return the setting of wandb 0.31 and newer that writes each point to the disk within 0.1 s.

    Points that SIGKILL loses are logged again from metrics.jsonl.
    """
    name = "x_transaction_log_flush_interval"
    return {name: 0.1} if name in wandb.Settings.model_fields else {}
