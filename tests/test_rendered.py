"""The tests, linters, type checker and pre-commit hooks of a generated repository pass in it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import git
from options import COMBINATIONS

BIN = Path(sys.executable).parent
WALKTHROUGH = "tests/test_submission_walkthrough.py"
NEEDS_UV = pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not on the PATH; make test installs it")


def run_in(folder: Path, *command: str, **extra: str) -> subprocess.CompletedProcess[str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHON": sys.executable, "PYTHONDONTWRITEBYTECODE": "1"} | extra
    return subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def assert_tests_pass(rendered: Path, folder: Path, marker: str, *which: str) -> None:
    """Run tests of a copy: other tests compare the files of the rendered repository."""
    shutil.copytree(rendered, folder)
    done = run_in(folder, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker, *which)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-20_000:]


@pytest.mark.parametrize("half", [0, 1])  # in parallel
def test_the_default_repository_passes_its_own_fast_tests(render, tmp_path, half):
    files = sorted(path.name for path in (render() / "tests").glob("test_*.py"))
    assert_tests_pass(render(), tmp_path / "copy", "not slow", *(f"tests/{name}" for name in files[half::2]))


# The walkthrough is a separate test, so that it runs in parallel with the others.
@pytest.mark.slow
@pytest.mark.parametrize("which", [WALKTHROUGH, f"--ignore={WALKTHROUGH}"])
def test_the_default_repository_passes_its_own_slow_tests(render, tmp_path, which):
    assert_tests_pass(render(), tmp_path / "copy", "slow", which)


# These do not depend on the data set, and pass with the digits.
INDEPENDENT = (
    "test_blend",
    "test_checkpoints",
    "test_compare",
    "test_cropping",
    "test_folds",
    "test_report_tasks",
    "test_scores",
    "test_submit",
    "test_tables",
)
# These use other data, or no samples at all, but the train.py of the repository.
OWN_DATA = ("test_elastic", "test_packing", "test_sweep")
# These take most of the time; csv has the images of image_folder, and cifar10 and mnist have data in memory, as digits.
LONG = ("test_data", "test_parallel", "test_recipe", "test_resume", "test_trackers", "test_transport")


def ignoring(*names: str) -> list[str]:
    """Return the flags of pytest that leave out files of tests."""
    return [f"--ignore=tests/{name}.py" for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("data_set", ["image_folder", "csv", "cifar10", "mnist"])
def test_a_repository_for_other_data_without_a_tracker_passes_its_own_fast_tests(render, tmp_path, data_set):
    folder = render(data_set=data_set, tracker="none")
    for name in INDEPENDENT:
        assert not re.search(r"\bexperiment\b|\bimport train\b", (folder / f"tests/{name}.py").read_text()), name
    left_out = INDEPENDENT + OWN_DATA + (() if data_set == "image_folder" else LONG)
    assert_tests_pass(folder, tmp_path / "copy", "not slow", *ignoring(*left_out))


# What depends on the task, and with the digits also on what is trained; the rest is tested in the default repository.
OF_TASK = ("test_dataset", "test_full_task", "test_images", "test_model", "test_packs", "test_starter", "test_task")
OF_TRAINING = ("test_data", "test_documents", "test_rare_classes", "test_record", "test_resume", "test_train")
OTHER_TASKS = [combination for combination in COMBINATIONS if combination[0] != "classification"]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "data_set"), OTHER_TASKS)
def test_a_repository_for_another_task_passes_the_tests_of_its_task(render, tmp_path, task, data_set):
    folder = render(task=task, data_set=data_set, tracker="none")
    names = OF_TASK + OF_TRAINING if data_set == "digits" else OF_TASK
    files = [f"tests/{name}.py" for name in names if (folder / f"tests/{name}.py").exists()]
    assert_tests_pass(folder, tmp_path / "copy", "not slow", *files)


def run_hooks(folder: Path, skip: str = "") -> subprocess.CompletedProcess[str]:
    """Run all pre-commit hooks on a new git repository, with the tools of this environment."""
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    environment = {"UV_PROJECT_ENVIRONMENT": sys.prefix, "UV_NO_SYNC": "1", "SKIP": skip}
    return run_in(folder, sys.executable, "-m", "pre_commit", "run", "--all-files", **environment)


OTHER_LANGUAGE = {"author": "Nam", "project_name": "Ein Modell", "description": "Als `Adress`"}  # not English


@NEEDS_UV
@pytest.mark.slow
@pytest.mark.parametrize("answers", [OTHER_LANGUAGE, {"data_set": "csv", "tracker": "none"}])
def test_every_pre_commit_hook_passes_after_git_init(render, tmp_path, answers):
    folder = shutil.copytree(render(**answers), tmp_path / "project")
    done = run_hooks(folder)
    assert done.returncode == 0, done.stdout


PRINTED = {"name": "stdout", "output_type": "stream", "text": ["1"]}
CELL = {"cell_type": "code", "execution_count": 1, "id": "a", "metadata": {}, "outputs": [PRINTED], "source": []}
NOTEBOOK = {"cells": [CELL], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
BAD_FILES = {
    "ruff check": ("bad.py", b'"""Imports what it does not use."""\n\nimport os\n'),
    "ruff format": ("ugly.py", b'"""Single quotes."""\n\nx = \'1\'\n'),
    "shellcheck": ("scripts/bad.sh", b"#!/bin/sh\ncd $1\n"),
    "typos": ("notes.md", b"The wrong lenght.\n"),
    "no output in notebooks": ("notebook.ipynb", json.dumps(NOTEBOOK).encode()),
    "no file over 2 MB": ("large.bin", bytes(2_100_000)),
    "TOML": ("bad.toml", b"a =\n"),
    "YAML": ("bad.yaml", b"a: [\n"),
    "JSON": ("bad.json", b"{\n"),
}


@NEEDS_UV
@pytest.mark.slow
def test_every_pre_commit_hook_finds_its_kind_of_error(render, tmp_path):
    folder = shutil.copytree(render(), tmp_path / "project")
    for name, content in BAD_FILES.values():
        (folder / name).write_bytes(content)
    found = dict(re.findall(r"^(.+?)\.{3,}(?:\(.*\))?(\w+)$", run_hooks(folder, skip="types").stdout, re.MULTILINE))
    assert found == dict.fromkeys(BAD_FILES, "Failed") | {"types": "Skipped"}


@pytest.mark.slow
def test_make_check_passes_without_uv(render):
    done = run_in(render(data_set="image_folder", tracker="none"), "make", "check")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_type_checker_passes_for_the_other_data_sets_and_tasks(render, tmp_path):
    names = []
    for task, data_set in [*OTHER_TASKS, ("classification", "cifar10"), ("classification", "mnist")]:
        names.append(f"{task}-{data_set}")
        shutil.copytree(render(task=task, data_set=data_set, tracker="none"), tmp_path / names[-1])
    config = {  # one process for all, so that torch is read once; batteries/ is the same for every data set
        "typeCheckingMode": "standard",
        "include": [f"{name}/{part}" for name in names for part in ("*.py", "experiment", "tools")],
        "executionEnvironments": [{"root": name} for name in names],
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    done = run_in(tmp_path, "basedpyright", "--outputjson")
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["summary"]["filesAnalyzed"] >= 14 * len(names)
