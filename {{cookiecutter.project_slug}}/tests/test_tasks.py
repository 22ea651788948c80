"""Another task than those of the template needs a new experiment/task.py and a data set, and nothing else."""

import csv
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from marks import CLASSES_ONLY
from models import CHANNELS, tiny_network
from processes import End, run_train
from torch.nn import functional

import train
from batteries.evaluation.predictions import read_predictions
from experiment.augmentations import normalize
from tools import predict

pytestmark = CLASSES_ONLY

SIZE = 96
GENERATOR = np.random.default_rng(0)
IMAGES = torch.from_numpy(GENERATOR.integers(256, size=(SIZE, CHANNELS, 8, 8), dtype=np.uint8))
GRADES = GENERATOR.integers(4, size=SIZE)
POINTS = GENERATOR.uniform(0, 8, size=(SIZE, 4)).astype(np.float32)


def probabilities_of_grades(logits: torch.Tensor) -> torch.Tensor:
    """Return the probabilities of 4 grades from the logits of "more than grade k", (N, 4), of which 3 are used."""
    above = functional.pad(logits[:, :3].sigmoid().cummin(1).values, (1, 1), value=0.0)
    above[:, 0] = 1
    return above[:, :-1] - above[:, 1:]


def grade_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    thresholds = torch.arange(3, device=targets.device)
    return functional.binary_cross_entropy_with_logits(logits[:, :3], (targets[:, None] > thresholds).to(logits.dtype))


def grade_error(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"grade_error": (probabilities_of_grades(logits).argmax(1) - targets).abs().double()}


ORDINAL = SimpleNamespace(  # as in Niu et al. 2016
    MAIN_METRIC="grade_error",
    MINIMIZE_METRIC=True,
    PREDICTIONS="class",
    SCORES={"kappa": lambda sk, targets, p: sk.cohen_kappa_score(targets, p.argmax(1), weights="quadratic")},
    LOGGED_SCORES=("kappa",),
    build_criterion=lambda *_: grade_loss,
    to_predictions=probabilities_of_grades,
    batch_metrics=grade_error,
    summarize=dict,
    batch_transform=lambda *_: None,
    stratify_by=lambda dataset: dataset.targets,
)


def point_distances(outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the distance of each of 2 points of each sample, shape (N, 2)."""
    return {"distance": (outputs - targets).double().view(-1, 2, 2).norm(dim=2)}


KEY_POINTS = SimpleNamespace(
    MAIN_METRIC="distance",
    MINIMIZE_METRIC=True,
    PREDICTIONS="numbers",
    SCORES={"worst": lambda sk, targets, p: np.abs(targets - p).max(), "worst/": lambda _, t, p: np.abs(t - p).max(0)},
    LOGGED_SCORES=("worst", "worst/"),
    build_criterion=lambda *_: functional.mse_loss,
    to_predictions=lambda outputs: outputs,
    batch_metrics=point_distances,
    summarize=lambda means: means | {"distance": means["distance"].mean()},
    batch_transform=lambda *_: None,
    stratify_by=lambda _: None,
)

TASKS = {
    "ordinal": (ORDINAL, ("none", "mild", "moderate", "severe"), GRADES),
    "key points": (KEY_POINTS, ("x0", "y0", "x1", "y1"), POINTS),
}


class Samples:
    """Random images with the targets of a task."""

    def __init__(self, classes: tuple[str, ...], targets: np.ndarray) -> None:
        self.ids = [str(index) for index in range(SIZE)]
        self.classes, self.targets = classes, targets

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        return IMAGES[index], torch.as_tensor(self.targets[index])

    def fingerprint(self) -> str:
        return "random"


@pytest.fixture(params=TASKS)
def name(request, monkeypatch) -> str:
    """The name of a task, which replaces experiment/task.py."""
    task, classes, targets = TASKS[request.param]
    for attribute, value in vars(task).items():
        monkeypatch.setattr(train.task, attribute, value)
    monkeypatch.setattr("experiment.splits.stratify_by", task.stratify_by)
    changes = {
        "load_dataset": lambda _: Samples(classes, targets),
        "build_model": tiny_network,
        "train_transform": lambda _: None,
        "valid_transform": lambda _: None,
    }
    for module in (train, predict):
        for attribute, value in changes.items():
            monkeypatch.setattr(module, attribute, value, raising=False)
    return request.param


def start(tmp_path, task: SimpleNamespace, *flags: str) -> End:
    fixed = ["--main-metric", task.MAIN_METRIC, "--minimize-metric", "--scores", *task.LOGGED_SCORES]
    fixed += ["--stages.0.epochs", "2", "--stages.1.epochs", "1", "--num-workers", "0", "--tracker", "none"]
    fixed += ["--logdir", str(tmp_path / "run"), "--split-file", str(tmp_path / "splits.csv"), "--device", "cpu"]
    return run_train(train.main, train.Config, *fixed, *flags)


def outputs_of_best(tmp_path, stage: str, rows: np.ndarray) -> torch.Tensor:
    """Compute the outputs of the best checkpoint of a stage without the toolkit."""
    model = tiny_network(4)
    saved = torch.load(tmp_path / "run" / stage / "best.pth", weights_only=True)
    model.load_state_dict(saved["model_state_dict"])
    with torch.no_grad():
        return model(normalize(IMAGES[rows])).double()


def folds(tmp_path) -> np.ndarray:
    with (tmp_path / "splits.csv").open(newline="") as file:
        return np.array([int(row["fold"]) for row in csv.DictReader(file)])


def test_another_task_trains_and_is_ranked_by_its_metric(name, tmp_path):
    task, _, targets = TASKS[name]
    end = start(tmp_path, task)
    assert end.code == 0, end.err
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    best = min(
        (line["valid"] for line in lines if line["stage"] == "stage0"), key=lambda valid: valid[task.MAIN_METRIC]
    )
    rows = np.flatnonzero(folds(tmp_path) == 0)
    outputs = outputs_of_best(tmp_path, "stage0", rows)
    if name == "ordinal":
        predicted = probabilities_of_grades(outputs).argmax(1).numpy()
        assert best["grade_error"] == pytest.approx(np.abs(predicted - targets[rows]).mean())
    else:
        errors = np.abs(outputs.numpy() - targets[rows])
        assert best["distance"] == pytest.approx(np.hypot(errors[:, ::2], errors[:, 1::2]).mean(), rel=1e-5)
        of_points = {f"worst/{key}": value for key, value in zip(TASKS[name][1], errors.max(0), strict=True)}
        assert {key: value for key, value in best.items() if "/" in key} == pytest.approx(of_points, rel=1e-5)


def test_predictions_of_another_task_are_written_with_their_targets(name, tmp_path):
    task, classes, targets = TASKS[name]
    assert start(tmp_path, task).code == 0
    end = run_train(
        predict.main, predict.Options, "--run", str(tmp_path / "run"), "--device", "cpu", name="tools/predict.py"
    )
    assert end.code == 0, end.err
    stage = json.loads((tmp_path / "run/run.json").read_text())["best"]["stage"]
    rows = np.flatnonzero(folds(tmp_path) == -1)
    table = read_predictions(tmp_path / "run/predictions/test.csv")
    assert (table.kind, table.classes, table.ids) == (task.PREDICTIONS, classes, tuple(map(str, rows)))
    np.testing.assert_array_equal(table.targets, targets[rows])
    expected = task.to_predictions(outputs_of_best(tmp_path, stage, rows))
    np.testing.assert_allclose(table.values, expected.numpy(), rtol=1e-5, atol=1e-6)
