"""The reports at the end of a run, each built in a separate process so that a failure does not affect the run."""

import logging
import os
import subprocess
import sys
from pathlib import Path

from batteries.core.project import ROOT, project_settings

logger = logging.getLogger("batteries")

TIMEOUT = 600  # seconds for one report
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def make_reports(logdir: Path, device: str) -> None:
    """Run each script listed under [tool.batteries] reports in pyproject.toml; log what it prints, or why it failed.

    Args:
        logdir: The run directory.
        device: The device for the scripts, such as cpu or cuda:0.
    """
    for script in project_settings()["reports"]:
        try:
            output = _run([sys.executable, str(ROOT / script), str(logdir), "--device", device])
        except (OSError, subprocess.TimeoutExpired, RuntimeError) as error:
            logger.warning(
                f"Training finished, but the report could not be built ({error}); try python {script} {logdir}."
            )
            continue
        for line in output.splitlines():
            logger.info(line)


def _run(command: list[str]) -> str:
    """Run a command as a single process and return its output. Raises RuntimeError with its last line if it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    search_path = [str(ROOT)]
    if environment.get("PYTHONPATH"):
        search_path.append(environment["PYTHONPATH"])
    environment["PYTHONPATH"] = os.pathsep.join(search_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
    return done.stdout
