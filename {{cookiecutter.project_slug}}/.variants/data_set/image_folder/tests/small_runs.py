"""Whole runs over image files, for tests: a second each, and what is expected of one that is refused."""

from pathlib import Path
from unittest import mock

from models import tiny_network
from processes import End, run_train

import train


def train_on(data_dir: Path, tmp_path: Path, *flags: str) -> End:
    """`python train.py` with a tiny network, into tmp_path/run, by the split in tmp_path/x.csv."""
    quick = ["--tracker", "none", "--device", "cpu", "--stages.0.epochs", "1", "--stages.1.epochs", "1"]
    quick += ["--split-file", str(tmp_path / "x.csv"), "--logdir", str(tmp_path / "run"), "--batch-size", "8"]
    with mock.patch.object(train, "build_model", tiny_network):
        return run_train(train.main, train.Config, "--data-dir", str(data_dir), *quick, *flags)


def assert_refused(end: End, sentence: str, tmp_path: Path) -> None:
    """One sentence, exit code 2, and nothing written."""
    assert (end.code, end.err.count("\n")) == (2, 1), end.err
    assert sentence in end.err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "x.csv").exists()
