"""The way of this project's task from predictions to a submission, its report and its checks."""

import csv
from pathlib import Path
from typing import Any

import pytest
from models import tiny_network
from processes import End, run_train
from small_data import make_data
from task_runs import KIND, ids_of_fold, make_runs

from tools import blend, check, report, submit


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory) -> Path:
    """A directory with the runs of two folds, run0 and run1."""
    return make_runs(data_dir, tmp_path_factory.mktemp("runs"))


def call(tool: Any, *flags: object) -> End:
    name = tool.__name__.replace(".", "/")
    return run_train(tool.main, tool.Options, *map(str, flags), name=f"{name}.py", repeats=False)


def test_blends_and_submissions_have_the_ids_of_the_sample(runs, tmp_path):
    inputs = [runs / f"run{fold}/predictions/test.csv" for fold in (0, 1)]
    end = call(blend, *inputs, "--output", tmp_path / "blend.csv")
    assert end.code == 0, end.err
    ids = ids_of_fold(runs, -1)
    columns = "id,prediction"
    (tmp_path / "sample.csv").write_text("\n".join([columns, *(f"{name}," for name in reversed(ids)), ""]))
    flags = ["--sample", tmp_path / "sample.csv", "--output", tmp_path / "submission.csv"]
    end = call(submit, tmp_path / "blend.csv", *flags)
    assert end.code == 0, end.err
    with (tmp_path / "submission.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ids[::-1]
    if KIND in ("class", "numbers"):
        assert all(row["prediction"] for row in rows)


@pytest.mark.slow
def test_checks_and_the_report_have_no_failure(runs, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("experiment.model.build_model", tiny_network)
    end = call(report, runs / "run0", "--device", "cpu", "--output", tmp_path / "report.html")
    assert end.code == 0, end.err
    assert "note " not in end.out
    flags = ["--data-dir", str(data_dir), "--split-file", str(tmp_path / "x.csv"), "--logdir", str(tmp_path / "run")]
    flags += ["--tracker", "none", "--device", "cpu", "--batch-size", "16", "--limit-batches", "4"]
    end = run_train(check.main, check.Options, *flags, name="tools/check.py")
    assert "12 checks in " in end.out, end.err
