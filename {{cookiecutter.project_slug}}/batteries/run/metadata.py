"""Run metadata."""

import hashlib
import json
import logging
import os
import platform
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from batteries.core.files import read_json, write_atomically, write_text
from batteries.core.project import ROOT
from batteries.core.ranks import world_size

logger = logging.getLogger("batteries")


class RunMetadata:
    """What is known of a run: run.json, git.diff and packages.txt in `logdir`. Rank 0 alone has one."""

    def __init__(self, logdir: Path) -> None:
        self.logdir = logdir
        self.values: dict[str, Any] = {}
        self.earlier_exit: str | None = None  # of a run that goes on

    def begin(self, about: Mapping[str, Any], difference: bytes | None, resumed: bool) -> None:
        """Write what the run is started from; where it goes on, its id and its first start stay.

        `difference` is what `uncommitted` gave.
        """
        path = self.logdir / "run.json"
        earlier = read_json(path) if resumed and path.is_file() else {}
        self.values = {"id": secrets.token_hex(4), **describe_process(), "git_dirty": None, **about}
        if self.values["git_commit"] is not None:
            self.values["git_dirty"] = bool(difference)
        if earlier:
            self.earlier_exit = earlier.get("exit")
            kept = {name: earlier[name] for name in ("id", "start", "best") if name in earlier}
            self.values |= {**kept, "resumed": [*earlier.get("resumed", []), self.values["start"]]}
        self.write()
        if difference:
            write_atomically(self.logdir / "git.diff", lambda file: file.write(difference))
        if not earlier:
            write_text(self.logdir / "packages.txt", packages())

    def write(self, **values: Any) -> None:
        """Add `values`, and put all into run.json."""
        self.values |= values
        try:
            write_text(self.logdir / "run.json", json.dumps(self.values, indent=2) + "\n")
        except OSError as error:  # why a run ended is not hidden by this
            logger.warning(f"{self.logdir / 'run.json'} cannot be written: {error.strerror}.")


def describe_process() -> dict[str, Any]:
    """Command, code, versions and machine, as run.json keeps them."""
    return {
        "command": shlex.join(sys.argv),
        "git_commit": _git_line("rev-parse", "HEAD"),
        "git_branch": _git_line("symbolic-ref", "--short", "HEAD"),
        "versions": versions(),
        "driver": gpu_driver(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "world_size": world_size(),
        "threads": torch.get_num_threads(),
        "skipped_steps": None,
        "start": now(),
        "end": None,
        "exit": None,
    }


def gpu_driver() -> str | None:
    """The version of NVIDIA's driver; None without one."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, check=True, text=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def packages() -> str:
    """All installed packages, as `pip freeze` says them, for `pip install -r`."""
    found = {f"{one.name}=={one.version}" for one in metadata.distributions() if one.name}
    return "".join(f"{line}\n" for line in sorted(found, key=str.lower))


def hash_config(config: Mapping[str, Any], without: Sequence[str]) -> str:
    """Names a recipe: 12 characters that two runs share whose knobs, but for those in `without`, are equal."""
    recipe = {name: _as_float(value) for name, value in config.items() if name not in without}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def _as_float(value: Any) -> Any:
    """A knob with its whole numbers as floats: 0 in train.py is 0.0 when a config file has been read."""
    if isinstance(value, Mapping):
        return {name: _as_float(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_as_float(part) for part in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def hash_code() -> dict[str, str]:
    """The sha256 of train.py and of each file of experiment/: what a run computes, besides its knobs."""
    files = [ROOT / "train.py", *sorted((ROOT / "experiment").glob("*.py"))]
    there = [path for path in files if path.is_file()]
    return {path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in there}


def describe_code_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The files that are not what the run was saved with, in one sentence; none where all are."""
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return [f"{', '.join(changed)} changed since the run was saved: it goes on with the new code."] if changed else []


def versions() -> dict[str, str | None]:
    """What the numbers of a run may depend on."""
    import torchvision

    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return {**versions, "torchvision": torchvision.__version__, "cuda": torch.version.cuda}


def describe_environment_changes(before: Mapping[str, Any]) -> list[str]:
    """What a resumed run has otherwise than before, so that it goes on equal to rounding alone."""
    then = {"processes": before["world_size"], "threads": before["threads"], **before["versions"]}
    now = {"processes": world_size(), "threads": torch.get_num_threads(), **versions()}
    changes = [f"{name} {then.get(name)} before and {now[name]} now" for name in now if then.get(name) != now[name]]
    return [f"The run had {', '.join(changes)}: it goes on equal to rounding, not bit for bit."] if changes else []


def uncommitted_diff() -> bytes | None:
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


def _git_line(*arguments: str) -> str | None:
    return (_git(*arguments) or b"").decode().strip() or None


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
