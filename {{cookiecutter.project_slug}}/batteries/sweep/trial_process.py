"""The process of one trial: a launch script that trains in a separate directory."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from batteries.core.errors import UserError
from batteries.core.files import DirectoryLock, read_json, write_text
from batteries.core.jsonl import read_jsonl
from batteries.core.project import ROOT
from batteries.core.signals import terminate_with_parent
from batteries.evaluation.cross_validation import COMPLETE

Launch = Literal["device", "dp", "ddp"]
SECONDS_BETWEEN_POLLS = 0.2
SECONDS_FOR_LOCK = 120  # after a sweep was killed, its processes save and end in this time


class Outcome(NamedTuple):
    """How a trial ended.

    Attributes:
        score: The best score; None if the trial failed.
        cause: Why it failed, in one line.
    """

    score: float | None
    cause: str = ""


class TrialFiles(NamedTuple):
    """The files of a trial.

    Attributes:
        directory: The run directory.
        config: The options, which train.py gets with --config.
        output: The output of the process.
    """

    directory: Path
    config: Path
    output: Path

    @classmethod
    def of(cls, sweep: Path, number: int) -> "TrialFiles":
        """Return the files of the trial `number` of a sweep."""
        name = f"trial_{number:04d}"
        return cls(sweep / name, sweep / "options" / f"{name}.json", sweep / "options" / f"{name}.log")

    def scores(self, metric: str) -> list[float]:
        """Return the main metric of each epoch so far, over all stages; NaN if it is not finite."""
        path = self.directory / "metrics.jsonl"
        if not path.exists():
            return []
        found = []
        for _, line in read_jsonl(path):
            value = line.get("valid_ema", line.get("valid", {})).get(metric)
            found.append(math.nan if value is None else float(value))
        return found

    def outcome(self, code: int) -> Outcome:
        """Return how the process ended, from its exit code, run.json and its output."""
        record = self._record()
        score = record.get("best", {}).get("score")
        if code == 0 and record.get("exit") in COMPLETE and score is not None:
            return Outcome(float(score))
        if code == 0:
            return Outcome(None, f"no finite {record.get('best', {}).get('metric', 'score')}")
        return Outcome(None, self._cause(code))

    def _record(self) -> dict[str, Any]:
        path = self.directory / "run.json"
        return read_json(path) if path.is_file() else {}

    def _cause(self, code: int) -> str:
        lines = [line.strip() for line in self.output.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        if errors or (lines and code > 0):
            return (errors or lines)[-1].removeprefix("error: ")
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class TrialProcess:
    """A running trial.

    Attributes:
        number: The number of the trial.
        device: The device, or None for the default.
        files: The files of the trial.
        reported: How many epochs were reported to the study.
    """

    def __init__(
        self,
        number: int,
        files: TrialFiles,
        values: Mapping[str, Any],
        *,
        launch: Launch,
        device: str | None,
        threads: int | None,
    ) -> None:
        """Start or continue a trial.

        Args:
            number: The number of the trial.
            files: The files of the trial.
            values: All options of train.py, as JSON values.
            launch: The launch script.
            device: The device.
            threads: The CPU threads of each process; None for the default.
        """
        self.number = number
        self.device = device
        self.files = files
        self.reported = 0
        files.config.parent.mkdir(parents=True, exist_ok=True)
        write_text(files.config, json.dumps(values, indent=2) + "\n")
        _wait_for_lock(files.directory)
        script = str(ROOT / "scripts" / f"train_{launch}.sh")
        command = [script, "--config", str(files.config.resolve()), "--logdir", str(files.directory.resolve())]
        command += ["--resume", "--no-report", *([] if device is None else ["--device", device])]
        environment = {"PYTHON": sys.executable, **os.environ}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with files.output.open("w") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=terminate_with_parent,
                start_new_session=True,  # Ctrl-C in the terminal reaches the sweep only, which then ends its trials
            )

    def exit_code(self) -> int | None:
        """Return the exit code; None while the process runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Send SIGTERM, which saves the run, and wait for the process to end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        self._process.wait()


def _wait_for_lock(directory: Path) -> None:
    """Wait until no process of a sweep that was killed uses the run directory."""
    if not directory.is_dir():
        return
    end = time.monotonic() + SECONDS_FOR_LOCK
    lock = DirectoryLock(directory / ".lock")
    while True:
        try:
            lock.acquire()
        except UserError:
            if time.monotonic() > end:
                raise
            time.sleep(SECONDS_BETWEEN_POLLS)
        else:
            lock.release()
            return
