"""What a run was started from: command, code, versions and machine."""

import os
import platform
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from batteries.ranks import world_size

ROOT = Path(__file__).parent.parent


def describe_run(device: torch.device, seed: int) -> dict[str, Any]:
    """Command, code, versions and machine, as run.json keeps them."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "command": shlex.join(sys.argv),
        "git_commit": (_git("rev-parse", "HEAD") or b"").decode().strip() or None,
        "versions": versions(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "device": str(device),
        "gpu": gpu,
        "world_size": world_size(),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "skipped_steps": None,
        "start": now(),
        "end": None,
        "exit": None,
    }


def versions() -> dict[str, str | None]:
    """What the numbers of a run may depend on."""
    import torchvision

    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return {**versions, "torchvision": torchvision.__version__, "cuda": torch.version.cuda}


def what_changes_rounding(before: Mapping[str, Any]) -> list[str]:
    """What a resumed run has otherwise than before, so that it goes on equal to rounding alone."""
    then = {"processes": before["world_size"], **before["versions"]}
    now = {"processes": world_size(), **versions()}
    changes = [f"{name} {then.get(name)} before and {now[name]} now" for name in now if then.get(name) != now[name]]
    return [f"The run had {', '.join(changes)}: it goes on equal to rounding, not bit for bit."] if changes else []


def uncommitted() -> bytes | None:
    """The difference between the last commit and the files here, new ones included; None without git or a commit."""
    with tempfile.TemporaryDirectory() as folder:
        index = os.path.join(folder, "index")  # an index of our own, so that the user's is left as it is
        if _git("read-tree", "HEAD", index=index) is None or _git("add", "-N", ".", index=index) is None:
            return None
        return _git("diff", "HEAD", "--", ".", index=index)


def _git(*arguments: str, index: str | None = None) -> bytes | None:
    """What git says of this repository; None without git, a repository or a commit."""
    environment = os.environ | ({} if index is None else {"GIT_INDEX_FILE": index})
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True, env=environment).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of the GPU's allocator, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
