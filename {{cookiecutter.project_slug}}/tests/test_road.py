"""The road from training to a submission, with the very commands of README, each in a process of its own."""

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_data import NEEDS_PATCH, make_data
from test_scripts import SMOKE, environment

from batteries.ledger import read_ledger
from batteries.predictions import Predictions, read_predictions
from batteries.scoring import score

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts need bash"),
    pytest.mark.skipif(NEEDS_PATCH, reason="the small data can be read in this process alone"),
]


def commands(train_flags: str) -> str:
    """README's commands for this environment, with short training."""
    story = README.partition("## The road to a submission")[2]
    [block] = re.findall(r"```bash\n(.*?)```", story, re.DOTALL)[:1]
    block = re.sub(r"(scripts/train_device.sh .*)", rf"\1 {train_flags}", block)
    return "set -eu\n" + block.replace("uv run python", sys.executable)


def copy_repository(folder: Path) -> Path:
    """This repository without what was made in it."""
    ignored = shutil.ignore_patterns("logs", "data", ".*", "__pycache__", "uv.lock", "*.csv")
    shutil.copytree(ROOT, folder, ignore=ignored)
    (folder / "data").mkdir()
    return folder


def test_two_models_on_two_folds_become_one_submission_as_the_readme_tells_it(tmp_path):
    here = copy_repository(tmp_path / "here")
    flags = " ".join([*SMOKE, "--save-n-best", "1", "--data-dir", str(make_data(tmp_path / "made"))])
    done = subprocess.run(
        ["bash", "-c", commands(flags)], cwd=here, env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    a, b, blended = (read_predictions(here / f"logs/{name}/predictions/test.csv") for name in ("a", "b", "blend"))
    assert blended.probabilities == pytest.approx((a.probabilities + b.probabilities) / 2, abs=1e-15)
    sample, submission = (
        list(csv.reader((here / name).open())) for name in ("data/sample_submission.csv", "submission.csv")
    )
    assert [row[0] for row in submission] == [row[0] for row in sample] == ["id", *blended.ids]
    labels = [blended.classes[index] for index in blended.probabilities.argmax(1)]
    assert [row[1] for row in submission] == ["label", *labels]

    lines = {line.name: line for line in read_ledger(here / "scores.csv")}
    assert set(lines) == {"a", "b", "blend"}
    for name, line in lines.items():
        valid = read_predictions(here / f"logs/{name}/predictions/valid.csv")
        assert (line.valid, line.test) == (score(valid)["accuracy"], accuracy(read_test(here, name)))
        assert f"{line.valid:.4f}" in done.stdout


def read_test(here: Path, name: str) -> Predictions:
    return read_predictions(here / f"logs/{name}/predictions/test.csv")


def accuracy(table: Predictions) -> float:
    return float(np.mean(table.probabilities.argmax(1) == table.targets))
