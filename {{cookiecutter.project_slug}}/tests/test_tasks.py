"""Tests of other tasks than classification: they need changes in experiment/ only."""

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from models import CHANNELS, tiny_network
from processes import End, run_train
from torch import nn
from torch.nn import functional

import train
from batteries.evaluation.predictions import read_predictions
from experiment.augmentations import normalize
from tools import predict

SIZE = 96
GENERATOR = np.random.default_rng(0)
IMAGES = torch.from_numpy(GENERATOR.integers(256, size=(SIZE, CHANNELS, 8, 8), dtype=np.uint8))


class Task(NamedTuple):
    """What the user changes in experiment/ for a task."""

    classes: tuple[str, ...]
    targets: torch.Tensor  # (N, ...)
    build_model: object
    loss: object
    sample_accuracy: object
    to_predictions: object


TASKS = {
    "several labels": Task(
        ("round", "red", "ripe"),
        torch.from_numpy(GENERATOR.integers(2, size=(SIZE, 3))).float(),
        tiny_network,
        functional.binary_cross_entropy_with_logits,
        lambda logits, targets: ((logits > 0) == (targets > 0.5)).float().mean(1),
        torch.sigmoid,
    ),
    "a number": Task(
        ("age",),
        torch.from_numpy(GENERATOR.normal(50, 10, size=SIZE)).float(),
        tiny_network,
        lambda outputs, targets: functional.mse_loss(outputs[:, 0], targets),
        lambda outputs, targets: (outputs[:, 0] - targets).abs() < 60,
        lambda outputs: outputs,
    ),
    "a mask": Task(
        ("sky", "land", "sea"),
        torch.from_numpy(GENERATOR.integers(3, size=(SIZE, 8, 8))),
        lambda num_classes: nn.Conv2d(CHANNELS, num_classes, 1),
        functional.cross_entropy,
        lambda logits, targets: (logits.argmax(1) == targets).float().mean((1, 2)),
        lambda logits: logits.softmax(1),
    ),
}


class Samples:
    """Random images with the targets of a task."""

    def __init__(self, task: Task) -> None:
        self.ids = [str(index) for index in range(SIZE)]
        self.classes, self.labels = task.classes, task.targets
        self.targets = task.targets.numpy() if task.targets.ndim < 3 else None

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return IMAGES[index], self.labels[index]

    def fingerprint(self) -> str:
        return "random"


@pytest.fixture(params=TASKS)
def task(request, monkeypatch) -> Task:
    task = TASKS[request.param]
    task_changes = {
        "build_criterion": lambda *_: task.loss,
        "sample_accuracy": task.sample_accuracy,
        "to_predictions": task.to_predictions,
    }
    for name, change in task_changes.items():
        monkeypatch.setattr(train.task, name, change)
    changes = {
        "load_dataset": lambda _: Samples(task),
        "build_model": task.build_model,
        "train_transform": lambda _: None,
        "valid_transform": lambda _: None,
    }
    for module in (train, predict):
        for name, change in changes.items():
            monkeypatch.setattr(module, name, change, raising=False)
    return task


def start(tmp_path) -> End:
    flags = ["--main-metric", "loss", "--minimize-metric", "--stages.0.epochs", "2", "--stages.1.epochs", "1"]
    flags += ["--logdir", str(tmp_path / "run"), "--split-file", str(tmp_path / "splits.csv"), "--num-workers", "0"]
    return run_train(train.main, train.Config, *flags, "--tracker", "none", "--device", "cpu")


def outputs_of_best(task: Task, tmp_path, stage: str, rows: np.ndarray) -> torch.Tensor:
    """Compute the outputs of the best checkpoint of a stage without the toolkit."""
    model = task.build_model(num_classes=len(task.classes))
    saved = torch.load(tmp_path / "run" / stage / "best.pth", weights_only=True)
    model.load_state_dict(saved["model_state_dict"])
    with torch.no_grad():
        return model(normalize(IMAGES[rows]))


def folds(tmp_path) -> np.ndarray:
    header, *lines = (tmp_path / "splits.csv").read_text().splitlines()
    place = header.split(",").index("fold")
    return np.array([int(line.split(",")[place]) for line in lines])


def test_validation_uses_the_loss_and_accuracy_of_experiment(task, tmp_path):
    end = start(tmp_path)
    assert end.code == 0, end.err
    rows = np.flatnonzero(folds(tmp_path) == 0)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    best = min((line["valid"] for line in lines if line["stage"] == "stage0"), key=lambda valid: valid["loss"])
    outputs, targets = outputs_of_best(task, tmp_path, "stage0", rows), task.targets[rows]
    assert best["loss"] == pytest.approx(task.loss(outputs, targets).item(), rel=1e-5)
    assert best["accuracy"] == pytest.approx(task.sample_accuracy(outputs, targets).double().mean().item(), rel=1e-6)


def test_predictions_use_to_predictions_or_the_task_is_rejected(task, tmp_path):
    assert start(tmp_path).code == 0
    stage = json.loads((tmp_path / "run/run.json").read_text())["best"]["stage"]
    end = run_train(
        predict.main, predict.Options, "--run", str(tmp_path / "run"), "--device", "cpu", name="tools/predict.py"
    )
    if task is TASKS["a mask"]:
        assert (end.code, end.err.startswith("error: the output of the model has shape (3, 8, 8) per sample")) == (
            2,
            True,
        )
    elif task is TASKS["a number"]:
        assert (end.code, "a probability is 0 to 1." in end.err) == (2, True)
    else:
        assert end.code == 0, end.err
        table = read_predictions(tmp_path / "run/predictions/test.csv")
        rows = np.flatnonzero(folds(tmp_path) == -1)
        assert (table.ids, table.targets) == (tuple(map(str, rows)), None)
        wanted = outputs_of_best(task, tmp_path, stage, rows).double().sigmoid().numpy()
        np.testing.assert_allclose(table.values, wanted, rtol=1e-5)
