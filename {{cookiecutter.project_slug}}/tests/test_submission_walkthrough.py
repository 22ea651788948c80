"""The commands of docs/submission.md lead from training to a submission."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from documents import code_blocks, copy_repository, read_page, run_commands
from small_data import NEEDS_PATCH

from batteries.evaluation.predictions import Predictions, read_predictions
from batteries.evaluation.scoring import score
from batteries.submission.score_log import read_score_log

PAGE = "docs/submission.md"
TRAIN_FLAGS = "--limit-batches 2 --stages.0.epochs 1 --stages.1.epochs 1 --save-n-best 1 --device cpu --no-report"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts need bash"),
    pytest.mark.skipif(NEEDS_PATCH, reason="the test data can be read in this process only"),
]


def test_two_models_on_two_folds_become_one_submission(tmp_path):
    copy = copy_repository(tmp_path / "copy")
    [code] = code_blocks(read_page(PAGE), "bash")
    done = run_commands(code, copy, TRAIN_FLAGS)

    a, b, blended = (read_test_predictions(copy, name) for name in ("a", "b", "blend"))
    assert blended.values == pytest.approx((a.values + b.values) / 2, abs=1e-15)
    sample = read_rows(copy / "data/sample_submission.csv")
    submission = read_rows(copy / "submission.csv")
    assert [row[0] for row in submission] == [row[0] for row in sample] == ["id", *blended.ids]
    labels = [blended.classes[index] for index in blended.values.argmax(1)]
    assert [row[1] for row in submission] == ["label", *labels]

    entries = {entry.name: entry for entry in read_score_log(copy / "scores.csv")}
    assert set(entries) == {"a", "b", "blend"}
    for name, entry in entries.items():
        valid = read_predictions(copy / f"logs/{name}/predictions/valid.csv")
        assert entry.valid == score(valid)["accuracy"]
        assert entry.test == accuracy(read_test_predictions(copy, name))
        assert f"{entry.valid:.4f}" in done.stdout


def read_test_predictions(copy: Path, name: str) -> Predictions:
    return read_predictions(copy / f"logs/{name}/predictions/test.csv")


def read_rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def accuracy(table: Predictions) -> float:
    return float(np.mean(table.values.argmax(1) == table.targets))
