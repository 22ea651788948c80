"""Whole runs on image files, a second each, and the expectations for a run that is rejected."""

from pathlib import Path
from unittest import mock

from flags import override
from models import tiny_network
from processes import End, run_train

import train


def train_on(data_dir: Path, tmp_path: Path, *flags: str) -> End:
    """Run `python train.py` with a tiny network, the logdir tmp_path/run and the split file tmp_path/x.csv."""
    fixed = ["--tracker", "none", "--device", "cpu", "--stages.0.epochs", "1", "--stages.1.epochs", "1"]
    fixed += ["--split-file", str(tmp_path / "x.csv"), "--logdir", str(tmp_path / "run"), "--batch-size", "8"]
    with mock.patch.object(train, "build_model", tiny_network):
        return run_train(train.main, train.Config, "--data-dir", str(data_dir), *override(fixed, flags))


def assert_rejected(end: End, message: str, tmp_path: Path) -> None:
    """Check that the error is one line with `message`, the exit code 2, and that nothing was written."""
    assert (end.code, end.err.count("\n")) == (2, 1), end.err
    assert message in end.err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "x.csv").exists()
