"""What is rendered is not only listed: its own tests, linters and type checker run in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def run_in(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHON": sys.executable, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def assert_tests_pass(folder: Path, marker: str) -> None:
    done = run_in(folder, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-20_000:]


def test_the_default_repository_passes_its_own_fast_tests(render):
    assert_tests_pass(render(), "not slow")


@pytest.mark.slow
def test_the_default_repository_passes_its_own_slow_tests_with_each_launch_script(render):
    assert_tests_pass(render(), "slow")


@pytest.mark.slow
@pytest.mark.parametrize("data_set", ["image_folder", "csv", "cifar10", "mnist"])
def test_a_repository_for_other_data_without_a_tracker_passes_its_own_fast_tests(render, data_set):
    assert_tests_pass(render(data_set=data_set, tracker="none"), "not slow")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data_set", "tracker"), [("digits", "tensorboard"), ("image_folder", "none"), ("csv", "none")]
)
def test_style_types_and_shell_scripts_are_clean(render, data_set, tracker):
    done = run_in(render(data_set=data_set, tracker=tracker), "make", "check")
    assert done.returncode == 0, done.stdout
