"""The commands of docs/reports.md and docs/checks.md, and scripts/train_seeds.sh; reports of several processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT, SHORT, WITHOUT_REPORT, commands, copy_repository, copy_trained_repository, run_commands
from small_data import NEEDS_PATCH

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts need bash"),
    pytest.mark.skipif(NEEDS_PATCH, reason="the test data can be read in this process only"),
]


@pytest.fixture(scope="module")
def trained_copy(tmp_path_factory) -> Path:
    """A copy of this repository with a finished run in logs/baseline."""
    return copy_trained_repository(tmp_path_factory.mktemp("trained") / "copy")


@pytest.fixture
def trained(trained_copy, tmp_path) -> Path:
    """A copy of this repository with a finished run in logs/baseline."""
    return shutil.copytree(trained_copy, tmp_path / "copy")


def test_one_process_of_several_builds_the_report(tmp_path):
    copy = copy_repository(tmp_path / "copy")
    done = run_commands("NPROC=2 scripts/train_ddp.sh --logdir logs/ddp", copy, SHORT)
    report_lines = [line for line in done.stdout.splitlines() if line.startswith(("report", "note"))]
    assert report_lines == ["report   logs/ddp/report.html"]
    assert (copy / "logs/ddp/plots/confusion.png").exists()
    assert json.loads((copy / "logs/ddp/run.json").read_text())["world_size"] == 2


def test_report_commands_run(trained):
    run_commands(commands("docs/reports.md"), trained, WITHOUT_REPORT)
    assert (trained / "logs/baseline/report.html").exists()
    assert "larger" in (trained / "logs/report.html").read_text()


def test_check_commands_run(trained):
    # The small network is linear: it learns a batch slowly.
    code = commands("docs/checks.md").replace("tools/check.py", "tools/check.py --stages.0.lr 0.1 --overfit-steps 500")
    assert "12 checks" in run_commands(code, trained).stdout


def test_repeats_are_trained_once_and_two_recipes_are_compared(tmp_path):
    copy = copy_repository(tmp_path / "copy")
    first = run_commands("scripts/train_seeds.sh --seeds 2 --logdir logs/a", copy, WITHOUT_REPORT)
    assert "seed 1 fold 0  " in first.stdout
    assert "mean of 2 runs  " in first.stdout
    before = {path: path.stat().st_mtime_ns for path in (copy / "logs/a").glob("*/stage1/last.pth")}
    more = run_commands("scripts/train_seeds.sh --logdir=logs/a --seeds=3", copy, WITHOUT_REPORT)
    assert "mean of 3 runs  " in more.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    run_commands("scripts/train_seeds.sh --seeds 2 --logdir logs/b --weight-decay 0", copy, WITHOUT_REPORT)
    compared = run_commands("uv run python tools/compare.py logs/a logs/b", copy)
    assert "logs/b minus logs/a: " in compared.stdout
    assert ", 2 pairs\n" in compared.stdout


def test_every_fold_of_every_seed_is_trained(tmp_path):
    copy = copy_repository(tmp_path / "copy")
    run_commands("uv run python tools/split.py --num-folds 2 --split-file splits/two.csv", copy)
    code = "scripts/train_seeds.sh --seeds 1 --all-folds --split-file splits/two.csv --logdir logs/all"
    done = run_commands(code, copy, WITHOUT_REPORT)
    assert {path.name for path in (copy / "logs/all").iterdir()} == {"seed_0_fold_0", "seed_0_fold_1"}
    assert "seed 0 fold 1  " in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seeds 0", "error: --seeds 0 must be an integer, 1 or more.\n"),
        ("--seeds five", "error: --seeds five must be an integer, 1 or more.\n"),
        ("--logdir a --logdir=b", "error: --logdir is given twice; give it once.\n"),
        ("--seed 3", "error: --seed is set by scripts/train_seeds.sh; leave it out, and give --seeds.\n"),
    ],
)
def test_invalid_repeats_are_rejected(flags, message):
    command = [ROOT / "scripts/train_seeds.sh", *flags.split()]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, message)
