"""Run metadata: the command, the code, the versions and the machine of a run (run.json, git.diff, packages.txt)."""

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
from torch import nn
from torch.nn.parameter import is_lazy

from batteries.core.files import read_json, write_atomically, write_text
from batteries.core.project import ROOT
from batteries.core.ranks import world_size

logger = logging.getLogger("batteries")

# Variables with which git, when it runs a hook, names its own repository.
OTHER_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR")
KEPT_ON_RESUME = ("id", "start", "best")  # entries of run.json that a resumed run takes over


class RunMetadata:
    """The files that describe a run: run.json, git.diff and packages.txt. Only rank 0 writes them.

    Attributes:
        logdir: The run directory.
        values: The contents of run.json.
        earlier_exit: How the run ended before it was resumed; None for a new run.
    """

    def __init__(self, logdir: Path) -> None:
        self.logdir = logdir
        self.values: dict[str, Any] = {}
        self.earlier_exit: str | None = None

    def begin(self, about: Mapping[str, Any], diff: bytes | None, resumed: bool) -> None:
        """Write the files at the start of a run. A resumed run keeps its id, first start and best score.

        Args:
            about: More entries for run.json.
            diff: The output of `uncommitted_diff`.
            resumed: Whether the run is resumed.
        """
        path = self.logdir / "run.json"
        earlier = read_json(path) if resumed and path.is_file() else {}
        self.values = {"id": secrets.token_hex(4), **describe_process(), "git_dirty": None, **about}
        if self.values["git_commit"] is not None:
            self.values["git_dirty"] = bool(diff)
        if earlier:
            self._take_over(earlier)
        self.write()
        if diff:
            write_atomically(self.logdir / "git.diff", lambda file: file.write(diff))
        if not earlier:
            write_text(self.logdir / "packages.txt", list_packages())

    def write(self, **values: Any) -> None:
        """Add entries to run.json."""
        self.values |= values
        try:
            write_text(self.logdir / "run.json", json.dumps(self.values, indent=2) + "\n")
        except OSError as error:  # only a warning: it must not hide the error that ended the run
            logger.warning(f"{self.logdir / 'run.json'} cannot be written: {error.strerror}.")

    def _take_over(self, earlier: Mapping[str, Any]) -> None:
        """Take over entries of the run.json of a run that is resumed, and add the time of the resume."""
        self.earlier_exit = earlier.get("exit")
        resumed_at = self.values["start"]
        self.values |= {name: earlier[name] for name in KEPT_ON_RESUME if name in earlier}
        self.values["resumed"] = [*earlier.get("resumed", []), resumed_at]
        if "split" in self.values:  # of the same file, which the first start may have made
            made_with = earlier.get("split", {}).get("made_with")
            self.values["split"] = {**self.values["split"], "made_with": made_with}


def describe_process() -> dict[str, Any]:
    """Return the command, code, versions and machine of this process, as written to run.json."""
    is_repository = _is_repository()
    return {
        "command": shlex.join(sys.argv),
        "git_commit": _git_line("rev-parse", "HEAD") if is_repository else None,
        "git_branch": _git_line("symbolic-ref", "--short", "HEAD") if is_repository else None,
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


def versions() -> dict[str, str | None]:
    """Return the versions that the numbers of a run may depend on."""
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "torchcodec": metadata.version("torchcodec"),  # not imported: most runs of digits decode no file
        "cuda": torch.version.cuda,
        "cudnn": _cudnn_version(),
    }


def _cudnn_version() -> str | None:
    version = torch.backends.cudnn.version() if torch.version.cuda else None
    return None if version is None else str(version)


def gpu_name(device: torch.device) -> str | None:
    """Return the name of a GPU; None for another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def gpu_driver() -> str | None:
    """Return the version of the NVIDIA driver; None if there is none."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return output.split("\n")[0]


def list_packages() -> str:
    """List all installed packages in the format of `pip freeze`, for `pip install -r`."""
    lines = {f"{package.name}=={package.version}" for package in metadata.distributions() if package.name}
    return "".join(f"{line}\n" for line in sorted(lines, key=str.lower))


def hash_config(config: Mapping[str, Any], without: Sequence[str]) -> str:
    """Return 12 characters that are equal for runs with equal options.

    Args:
        config: The options, as JSON values.
        without: The names of options that do not count.
    """
    recipe = {name: _as_float(value) for name, value in config.items() if name not in without}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def _as_float(value: Any) -> Any:
    """Convert integers to floats: a value of 0 in train.py is 0.0 after it was read from a config file."""
    if isinstance(value, Mapping):
        return {name: _as_float(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_float(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def hash_code() -> dict[str, str]:
    """Return the sha256 of train.py and of each file in experiment/: the code that affects the results, by path."""
    files = [ROOT / "train.py", *sorted((ROOT / "experiment").glob("*.py"))]
    return {
        file.relative_to(ROOT).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file()
    }


def describe_architecture(model: nn.Module) -> dict[str, Any]:
    """Return the class, the number of parameters, and the sha256 of the names and shapes of all tensors of a model."""
    shapes = {name: None if is_lazy(value) else list(value.shape) for name, value in model.state_dict().items()}
    return {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter)),
        "sha256": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
    }


def describe_code_changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Describe which files changed since a run was saved.

    Args:
        before: The output of `hash_code` when the run was saved.
        after: The output of `hash_code` now.

    Returns:
        One message, or none if nothing changed.
    """
    changed = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    if not changed:
        return []
    return [f"{', '.join(changed)} changed since the run was saved; the resumed run uses the new code."]


def describe_environment_changes(before: Mapping[str, Any], device: torch.device) -> list[str]:
    """Describe which properties of the environment that affect the rounding changed since a run was saved.

    Args:
        before: The `resume` entry of the checkpoint. A property that it does not have is not compared.
        device: The device of this process.

    Returns:
        One message, or none if nothing changed.
    """
    old = {"processes": before["world_size"], "threads": before["threads"], **before["versions"]}
    new = {"processes": world_size(), "threads": torch.get_num_threads(), **versions()}
    if "gpu" in before:  # not in checkpoints of earlier versions
        old["GPU"], new["GPU"] = before["gpu"], gpu_name(device)
    if before["world_size"] is None:  # --shards, with which it changes nothing
        del new["processes"]
    changes = [f"{name} {old[name]} -> {new[name]}" for name in new if name in old and old[name] != new[name]]
    if not changes:
        return []
    note = "The results are equal up to rounding, not bit-identical."
    return [f"Changed since the run was saved: {', '.join(changes)}. {note}"]


def _is_repository() -> bool:
    """Return whether this project is a git repository, and not a subdirectory of another one."""
    top = _git("rev-parse", "--show-toplevel")
    return top is not None and Path(os.fsdecode(top.removesuffix(b"\n"))).resolve() == ROOT.resolve()


def uncommitted_diff() -> bytes | None:
    """Return the diff between the last commit and the files now, with new files; None without git or a commit."""
    if not _is_repository():
        return None
    with tempfile.TemporaryDirectory() as directory:
        index = os.path.join(directory, "index")  # a separate index: the user's is not changed
        if _git("read-tree", "HEAD", index=index) is None:
            return None
        if _git("add", "-N", ".", index=index) is None:
            return None
        return _git("diff", "HEAD", "--", ".", index=index)


def _git(*arguments: str, index: str | None = None) -> bytes | None:
    """Return the output of git in this repository; None without git, a repository or a commit.

    Args:
        arguments: The arguments of git.
        index: The path of the index file; None for that of the repository.
    """
    environment = {name: value for name, value in os.environ.items() if name not in OTHER_REPOSITORY}
    if index is not None:
        environment["GIT_INDEX_FILE"] = index
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True, env=environment).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def _git_line(*arguments: str) -> str | None:
    """Return the output of git as text; None if there is none."""
    output = _git(*arguments)
    return None if output is None else output.decode().strip() or None


def now() -> str:
    """Return the time in UTC, in ISO format with seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")
