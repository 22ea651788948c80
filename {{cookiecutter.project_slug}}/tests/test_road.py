"""The road from training to a submission, with the very commands of README, each in a process of its own."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_data import NEEDS_PATCH, make_data
from test_scripts import SMOKE, environment

from batteries.evaluation.predictions import Predictions, read_predictions
from batteries.evaluation.scoring import score
from batteries.submission.score_log import read_score_log

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts need bash"),
    pytest.mark.skipif(NEEDS_PATCH, reason="the small data can be read in this process alone"),
]


def commands(story: str, train_flags: str) -> str:
    """The commands of a part of README for this environment, with short training."""
    text = README.partition(f"## {story}\n")[2].partition("\n## ")[0]
    code = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    code = re.sub(r"(scripts/train_\w+\.sh)(.*?)(?=$|\|\||  #)", rf"\1\2 {train_flags} ", code, flags=re.MULTILINE)
    return "set -eu\n" + code.replace("uv run python", sys.executable)


def follow(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the commands as they stand in README."""
    path = os.pathsep.join([str(folder), str(folder / "tests")])
    done = subprocess.run(
        ["bash", "-c", code], cwd=folder, env=environment(PYTHONPATH=path), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def copy_repository(folder: Path) -> Path:
    """This repository without what was made in it, and with a small network: its checkpoints are small too."""
    ignored = shutil.ignore_patterns("logs", "data", ".*", "__pycache__", "uv.lock", "*.csv")
    shutil.copytree(ROOT, folder, ignore=ignored)
    (folder / "data").mkdir()
    with (folder / "experiment/model.py").open("a") as model:
        model.write("\n\nfrom models import tiny_network as build_model\n")
    return folder


def test_two_models_on_two_folds_become_one_submission_as_the_readme_tells_it(tmp_path):
    here = copy_repository(tmp_path / "here")
    flags = " ".join([*SMOKE, "--save-n-best", "1", "--data-dir", str(make_data(tmp_path / "made"))])
    done = follow(commands("The road to a submission", flags), here)

    a, b, blended = (read_predictions(here / f"logs/{name}/predictions/test.csv") for name in ("a", "b", "blend"))
    assert blended.probabilities == pytest.approx((a.probabilities + b.probabilities) / 2, abs=1e-15)
    sample, submission = (
        list(csv.reader((here / name).open())) for name in ("data/sample_submission.csv", "submission.csv")
    )
    assert [row[0] for row in submission] == [row[0] for row in sample] == ["id", *blended.ids]
    labels = [blended.classes[index] for index in blended.probabilities.argmax(1)]
    assert [row[1] for row in submission] == ["label", *labels]

    lines = {line.name: line for line in read_score_log(here / "scores.csv")}
    assert set(lines) == {"a", "b", "blend"}
    for name, line in lines.items():
        valid = read_predictions(here / f"logs/{name}/predictions/valid.csv")
        assert (line.valid, line.test) == (score(valid)["accuracy"], accuracy(read_test(here, name)))
        assert f"{line.valid:.4f}" in done.stdout


def test_the_recipes_of_the_readme_train_on_one_device_with_dp_with_ddp_after_a_cut_and_over_folds(tmp_path):
    here = copy_repository(tmp_path / "here")
    flags = ["--save-n-best", "1", "--tracker", "none", "--data-dir", str(make_data(tmp_path / "made"))]
    code = commands("Recipes", " ".join([*SMOKE, *flags]))
    data = f"tools/split.py --data-dir {flags[-1]}"
    follow(code.replace("tools/split.py", data).replace("-s USR1 60", "-s USR1 4"), here)
    runs = {
        path.parent.relative_to(here / "logs").as_posix(): json.loads(path.read_text())
        for path in here.rglob("run.json")
    }
    assert set(runs) == {"device", "dp", "ddp", "cut", "folds/fold_0", "folds/fold_1"}
    for name, record in runs.items():
        assert record["exit"] == "finished", name
        assert record["world_size"] == (2 if name == "ddp" else 1), name
        config = json.loads((here / "logs" / name / "config.json").read_text())
        assert config["data_parallel"] == (name == "dp"), name
        assert [stage["name"] for stage in config["stages"]] == ["stage0", "stage1"]
        assert len((here / "logs" / name / "metrics.jsonl").read_text().splitlines()) == 2, name
    assert (here / "logs/folds/predictions/valid.csv").exists()


def read_test(here: Path, name: str) -> Predictions:
    return read_predictions(here / f"logs/{name}/predictions/test.csv")


def accuracy(table: Predictions) -> float:
    return float(np.mean(table.probabilities.argmax(1) == table.targets))
