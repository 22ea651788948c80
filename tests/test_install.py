"""A generated project installs with uv and with pip, and its tools run from any directory."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

NEEDS_UV = pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not on the PATH; make test installs it")
TABLE = "no scores yet: python tools/scores.py add"


def run(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command without the environment of this test run."""
    removed = ("PYTHONPATH", "UV_PROJECT_ENVIRONMENT", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in removed} | variables
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def project(render, tmp_path_factory) -> Path:
    """A generated project."""
    return shutil.copytree(render(), tmp_path_factory.mktemp("install") / "my-experiment")


@pytest.fixture(scope="module")
def python(project, tmp_path_factory) -> Path:
    """The Python of a virtual environment in which pip installed the project in editable mode.

    Its dependencies are those of the environment of this test run, so that torch is not downloaded again.
    """
    folder = tmp_path_factory.mktemp("pip") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    installed = run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", project, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    [site_packages] = [path for path in folder.rglob("site-packages") if path.is_dir()]
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@NEEDS_UV
def test_tools_run_by_path_and_as_modules_with_uv(project, tmp_path):
    by_path = run("uv", "run", "python", "tools/scores.py", cwd=project)
    assert TABLE in by_path.stdout, by_path.stderr
    as_module = run("uv", "run", "python", "-m", "tools.scores", cwd=project)
    assert TABLE in as_module.stdout, as_module.stderr
    elsewhere = run("uv", "run", "--project", project, "python", project / "tools/scores.py", cwd=tmp_path)
    assert TABLE in elsewhere.stdout, elsewhere.stderr


def test_tools_run_by_path_and_as_modules_with_pip(project, python, tmp_path):
    elsewhere = run(python, project / "tools/scores.py", cwd=tmp_path)
    assert TABLE in elsewhere.stdout, elsewhere.stderr
    as_module = run(python, "-m", "tools.scores", cwd=project)
    assert TABLE in as_module.stdout, as_module.stderr


def test_launch_scripts_use_the_python_that_is_named(project, python):
    done = run("scripts/train_device.sh", "--show-schedule", cwd=project, PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    assert f"+ {python} train.py --show-schedule" in done.stdout


def test_a_tool_of_another_project_in_one_environment_is_rejected(project, python, tmp_path):
    other = shutil.copytree(project, tmp_path / "other", ignore=shutil.ignore_patterns(".venv"))
    rejected = run(python, other / "tools/scores.py", cwd=other)
    assert (rejected.returncode, rejected.stderr.count("\n")) == (2, 1), rejected.stderr
    assert f"belongs to the project {other}, but the installed one is {project}" in rejected.stderr
    as_module = run(python, "-m", "tools.scores", cwd=other)
    assert TABLE in as_module.stdout, as_module.stderr


def test_a_project_installs_with_pip_without_editable_mode(project, tmp_path):
    done = run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = run(python, "-m", "pip", "install", "--quiet", "--no-deps", project, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
