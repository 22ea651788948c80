"""Scores over folds are those of whole runs on one split file."""

import json

import numpy as np
import pytest

from batteries.evaluation.cross_validation import main

SCORES = [0.9, 0.8, 0.95]


def write_records(folder, **changes) -> None:
    """A finished run for each fold; `changes` of the last."""
    for fold, score in enumerate(SCORES):
        best = {"metric": "accuracy", "score": score, "stage": "stage0", "epoch": 2}
        split = {"file": "splits/default.csv", "sha256": "a" * 64, "folds": 3}
        record = {"exit": "finished", "best": best, "split": split}
        if fold == 2:
            record |= changes
        (folder / f"fold_{fold}").mkdir()
        (folder / f"fold_{fold}/run.json").write_text(json.dumps(record))


@pytest.mark.parametrize("end", ["finished", "stopped early"])
def test_each_score_their_mean_and_deviation_are_printed(tmp_path, capsys, end):
    write_records(tmp_path, exit=end)
    assert main([str(tmp_path)]) == 0
    *folds, mean = capsys.readouterr().out.splitlines()
    assert folds[1] == "fold 1   accuracy 0.8000  stage0 epoch 2"
    assert mean == f"mean     accuracy {np.mean(SCORES):.4f}  deviation {np.std(SCORES, ddof=1):.4f}"


SPLIT = {"file": "splits/default.csv", "sha256": "b" * 64, "folds": 3}
BEST = {"metric": "accuracy", "score": None, "stage": "stage0", "epoch": None}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"exit": "stopped by SIGTERM"}, "fold_2 is not finished (stopped by SIGTERM); start scripts/train_folds.sh"),
        ({"split": SPLIT}, "fold_2 was split by another splits/default.csv than fold_0"),
        ({"best": BEST}, "fold 2 has no finite accuracy"),
        ({"best": {**BEST, "metric": "loss"}}, "fold_2 was ranked by loss"),
    ],
)
def test_folds_that_do_not_make_a_whole_are_refused(tmp_path, capsys, changes, sentence):
    write_records(tmp_path, **changes)
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_a_fold_that_is_missing_is_named(tmp_path, capsys):
    write_records(tmp_path)
    (tmp_path / "fold_1/run.json").unlink()
    assert main([str(tmp_path)]) == 2
    assert "fold_1 holds no run" in capsys.readouterr().err
