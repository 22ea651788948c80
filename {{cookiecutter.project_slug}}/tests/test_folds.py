"""Tests of the scores of a cross-validation."""

import json

import numpy as np
import pytest

from batteries.evaluation.cross_validation import main

SCORES = [0.9, 0.8, 0.95]


def write_records(folder, **changes) -> None:
    """Write run.json of a finished run per fold; `changes` apply to the last one."""
    for fold, score in enumerate(SCORES):
        best = {"metric": "accuracy", "score": score, "stage": "stage0", "epoch": 2}
        split = {"file": "splits/default.csv", "sha256": "a" * 64, "folds": 3}
        record = {"exit": "finished", "best": best, "split": split}
        if fold == 2:
            record |= changes
        (folder / f"fold_{fold}").mkdir()
        (folder / f"fold_{fold}/run.json").write_text(json.dumps(record))


@pytest.mark.parametrize("end", ["finished", "stopped early"])
def test_scores_mean_and_standard_deviation_are_printed(tmp_path, capsys, end):
    write_records(tmp_path, exit=end)
    assert main([str(tmp_path)]) == 0
    *folds, mean = capsys.readouterr().out.splitlines()
    assert folds[1] == "fold 1   accuracy 0.8000  stage0 epoch 2"
    assert mean == f"mean     accuracy {np.mean(SCORES):.4f}  standard deviation {np.std(SCORES, ddof=1):.4f}"


SPLIT = {"file": "splits/default.csv", "sha256": "b" * 64, "folds": 3}
BEST = {"metric": "accuracy", "score": None, "stage": "stage0", "epoch": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exit": "stopped by SIGTERM"}, "fold_2 is not finished (stopped by SIGTERM); start scripts/train_folds.sh"),
        ({"split": SPLIT}, "fold_2 used a different splits/default.csv than fold_0"),
        ({"best": BEST}, "fold 2 has no finite accuracy"),
        ({"best": {**BEST, "metric": "loss"}}, "fold_2 has the main metric loss, but fold_0 has accuracy"),
    ],
)
def test_folds_that_do_not_belong_together_are_rejected(tmp_path, capsys, changes, message):
    write_records(tmp_path, **changes)
    assert main([str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_a_missing_fold_is_reported(tmp_path, capsys):
    write_records(tmp_path)
    (tmp_path / "fold_1/run.json").unlink()
    assert main([str(tmp_path)]) == 2
    assert "fold_1 does not hold a run" in capsys.readouterr().err
