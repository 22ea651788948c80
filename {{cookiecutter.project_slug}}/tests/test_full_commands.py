"""The commands of docs/reports.md and docs/checks.md run, and a run with several processes builds one report."""

import json
import shutil
from pathlib import Path

import pytest
from documents import SHORT, WITHOUT_REPORT, commands, copy_repository, copy_trained_repository, run_commands
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
