"""Runs of this project with a tiny network, in two folds, for tests of its task."""

import csv
from pathlib import Path
from typing import Any

import pytest
from models import tiny_network
from processes import End, run_train

import train
from batteries.evaluation.mask_table import read_mask_table
from batteries.evaluation.predictions import read_predictions
from experiment import task
from tools import predict

KIND = task.PREDICTIONS


def start(data_dir: Path, folder: Path, fold: int = 0) -> End:
    flags = [
        "--data-dir",
        str(data_dir),
        "--split-file",
        str(folder / "splits.csv"),
        "--logdir",
        str(folder / f"run{fold}"),
    ]
    flags += ["--fold", str(fold), "--stages.0.epochs", "1", "--stages.1.epochs", "1", "--num-workers", "0"]
    flags += ["--tracker", "none", "--device", "cpu"]
    return run_train(train.main, train.Config, *flags)


def make_runs(data_dir: Path, folder: Path) -> Path:
    """Train and predict two folds; return the directory with run0 and run1."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, predict):
            patch.setattr(module, "build_model", tiny_network)
        for fold in (0, 1):
            end = start(data_dir, folder, fold)
            assert end.code == 0, end.err
            flags = ["--run", str(folder / f"run{fold}"), "--device", "cpu"]
            flags += ["--probabilities"] if KIND == "mask" else []
            end = run_train(predict.main, predict.Options, *flags, name="tools/predict.py", repeats=False)
            assert end.code == 0, end.err
    return folder


def ids_of_fold(runs: Path, fold: int) -> list[str]:
    with (runs / "splits.csv").open(newline="") as file:
        return [row["id"] for row in csv.DictReader(file) if row["fold"] == str(fold)]


def read_table(path: Path) -> Any:
    return read_mask_table(path) if KIND == "mask" else read_predictions(path)
