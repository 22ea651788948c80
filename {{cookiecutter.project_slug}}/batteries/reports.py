"""The page of a run, made at its end by report.py in a process of its own: whatever happens there, the run is whole."""

import logging
import os
import subprocess
import sys
from pathlib import Path

logger = logging.getLogger("batteries")

ROOT = Path(__file__).parent.parent
SECONDS = 600  # for a page; then it is given up
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def make_report(logdir: Path, device: str) -> None:
    """Have report.py make logdir/report.html with `device`, and say so; where it cannot, say why."""
    try:
        said = _run([sys.executable, str(ROOT / "report.py"), str(logdir), "--device", device])
    except (OSError, subprocess.TimeoutExpired, RuntimeError) as error:
        logger.warning(f"The run is whole, but its report was not made ({error}); try python report.py {logdir}.")
        return
    for line in said.splitlines():
        logger.info(line)


def _run(command: list[str]) -> str:
    """What a command says, started as one process alone. Raises RuntimeError with the last line where it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout
