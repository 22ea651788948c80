"""Fixtures that generate repositories from the template as it is in the working tree, once per set of answers."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cookiecutter.main import cookiecutter
from options import CHOICES, pairwise

ROOT = Path(__file__).parent.parent
SLUG = "{{cookiecutter.project_slug}}"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that take minutes first, in parts of equal size for each process of pytest-xdist.

    Each process begins with its part of the list, so that no long test is left for the end.
    """
    long = [item for item in items if item.get_closest_marker("slow") or "own_fast_tests" in item.name]
    long.sort(key=lambda item: "test_rendered" not in item.nodeid)  # the longest ones
    short = [item for item in items if item not in set(long)]
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    begin = [len(short) * number // processes for number in range(processes + 1)]
    parts = [long[number::processes] + short[begin[number] : begin[number + 1]] for number in range(processes)]
    items[:] = [item for part in parts for item in part]


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """A copy of the files that git tracks or would add, without caches, which make cookiecutter fail."""
    copy = tmp_path_factory.mktemp("template") / "batteries"
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="session")
def run_cookiecutter(tmp_path_factory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `cookiecutter SOURCE --no-input` as a user does, with an empty home directory."""
    home = tmp_path_factory.mktemp("home")

    def run(source: Path | str, output: Path, *flags: str, **answers: str) -> subprocess.CompletedProcess[str]:
        # cookiecutter takes ANSWER=TEXT; a config file would evaluate the text as Jinja.
        extra = [f"{name}={text}" for name, text in answers.items()]
        command = [sys.executable, "-m", "cookiecutter", str(source), "--no-input", "-o", str(output), *flags, *extra]
        environment = os.environ | {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


@pytest.fixture(scope="session")
def render(template, tmp_path_factory) -> Callable[..., Path]:
    """Generate a repository with the given answers; equal answers return the same directory."""
    rendered: dict[str, Path] = {}
    home = tmp_path_factory.mktemp("render-home")
    config = home / "config.json"
    config.write_text(json.dumps({"replay_dir": str(home), "cookiecutters_dir": str(home)}))

    def run(**answers: str) -> Path:
        key = json.dumps(answers, sort_keys=True)
        if key not in rendered:
            output = str(tmp_path_factory.mktemp("rendered"))
            path = cookiecutter(
                str(template), no_input=True, extra_context=answers, output_dir=output, config_file=str(config)
            )
            rendered[key] = Path(path)
        return rendered[key]

    return run


@pytest.fixture(scope="session", params=pairwise(CHOICES), ids=lambda answers: "-".join(answers.values()))
def combination(request) -> dict[str, str]:
    """One of the sets of answers that contain every pair of answers."""
    return request.param


@pytest.fixture(scope="session")
def released(template, tmp_path_factory) -> Path:
    """The template as a git repository with one commit, tagged v0.1.0."""
    folder = tmp_path_factory.mktemp("released") / "batteries"
    shutil.copytree(template, folder)
    git(folder, "init", "-q", "-b", "main")
    commit_all(folder, "template")
    git(folder, "tag", "v0.1.0")
    return folder


def run_cruft(*command: str, home: Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `cruft COMMAND` in `folder` as a user does."""
    environment = os.environ | {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "cruft", *command], cwd=folder, env=environment, capture_output=True, text=True
    )


def git(folder: Path, *command: str) -> str:
    """Run git in `folder` with a test identity and return its output."""
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    return subprocess.run(["git", "-C", folder, *identity, *command], check=True, capture_output=True, text=True).stdout


def commit_all(folder: Path, message: str) -> str:
    """Commit the working tree and return the hash of the commit."""
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", message)
    return git(folder, "rev-parse", "HEAD").strip()


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the contents of every file by its path in `folder`, without .git."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".git" not in path.parts
    }
