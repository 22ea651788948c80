"""The task of this project: its metrics, its data and the way from training to predictions."""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_network
from processes import run_ranks, run_train
from sklearn import metrics
from small_data import make_data
from task_runs import KIND, ids_of_fold, make_runs, read_table

from batteries.data.loaders import EvalLoader, TrainLoader
from batteries.data.splits import SplitFile
from batteries.distributed.unwrap import unwrap_model
from batteries.metrics.masks import IGNORED
from batteries.training.state import SilentLogger, TrainState
from batteries.training.wrap import wrap_model
from experiment import task
from experiment.augmentations import normalize, train_transform, valid_transform
from experiment.dataset import load_dataset
from experiment.splits import make_folds
from tools import predict
from train import Config, train_fn, valid_fn

CPU = torch.device("cpu")
LOGGER = SilentLogger(CPU)
CONFIG = Config(tracker=("none",))
SIZE = 61  # samples of a small split; not a multiple of the batch size or of the ranks


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def dataset(data_dir) -> Any:
    return load_dataset(data_dir)


@pytest.fixture(scope="module")
def train_indices(dataset, tmp_path_factory) -> np.ndarray:
    path = tmp_path_factory.mktemp("splits") / "x.csv"
    return SplitFile(path, dataset, make_folds).select(0).train[:SIZE]


def make_model(dataset: Any) -> torch.nn.Module:
    torch.manual_seed(3)
    return tiny_network(len(dataset.classes))


def expected_metrics(outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Compute metrics of a split with scikit-learn, from the outputs of the model."""
    predicted = task.to_predictions(outputs.double()).numpy()
    truth = targets.numpy()
    if KIND == "class":
        return {"accuracy": metrics.accuracy_score(truth, predicted.argmax(1))}
    if KIND == "labels":
        pairs = list(zip(truth.T, predicted.T, strict=True))
        best = max(metrics.f1_score(truth, predicted >= t, average="macro") for t in np.arange(1, 100) / 100)
        return {
            "map": np.mean([metrics.average_precision_score(*pair) for pair in pairs if pair[0].any()]),
            "macro_f1": best,
            "label_accuracy": np.mean(truth == (predicted >= 0.5)),
            "roc_auc": np.mean([metrics.roc_auc_score(*pair) for pair in pairs if 0 < pair[0].mean() < 1]),
        }
    if KIND == "numbers":
        truth = truth.reshape(predicted.shape)
        return {
            "mae": metrics.mean_absolute_error(truth, predicted),
            "rmse": metrics.root_mean_squared_error(truth, predicted),
            "r2": metrics.r2_score(truth, predicted),
        }
    counted = truth != IGNORED
    pixels = truth[counted], predicted.argmax(1)[counted]
    return {
        "mean_iou": metrics.jaccard_score(*pixels, average="macro"),
        "mean_dice": metrics.f1_score(*pixels, average="macro"),
        "pixel_accuracy": metrics.accuracy_score(*pixels),
    }


def make_eval_loader(dataset: Any, indices: np.ndarray, batch_size: int) -> EvalLoader:
    return EvalLoader(dataset, indices, valid_transform(), CPU, batch_size=batch_size)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_metrics_equal_those_of_scikit_learn_for_any_world_size(dataset, train_indices, world_size):
    model = make_model(dataset).eval()
    [(images, targets)] = make_eval_loader(dataset, train_indices, SIZE)
    with torch.no_grad():
        expected = expected_metrics(model(normalize(images)), targets)
    scores = tuple(name for name in ("roc_auc", "r2", *task.LOGGED_SCORES) if name in task.SCORES and KIND != "class")

    def validate() -> dict[str, float]:
        config = Config(tracker=("none",), scores=scores)
        return valid_fn(make_model(dataset), make_eval_loader(dataset, train_indices, 16), LOGGER, config)

    for reported in run_ranks(world_size, validate):
        assert {name: reported[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def make_train_loader(dataset: Any, indices: np.ndarray, **options: Any) -> TrainLoader:
    fixed = {"seed": 3, "batch_size": 16, "drop_last": False} | options
    return TrainLoader(dataset, indices, train_transform(), CPU, **fixed)


def hash_samples(dataset: Any, indices: np.ndarray, num_workers: int) -> list[list[str]]:
    """Return a hash of each sample of each step on this rank: of its image and its target."""
    steps: list[list[str]] = [[]]
    for batch in make_train_loader(dataset, indices, num_workers=num_workers).epoch(0, 1):
        for image, target in zip(batch.images, batch.targets, strict=True):
            content = image.numpy().tobytes() + target.numpy().tobytes()
            steps[-1].append(hashlib.sha256(content).hexdigest())
        if batch.ends_step:
            steps.append([])
    return steps[:-1]


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (2, 0), (2, 1), (4, 0)])
def test_augmented_samples_and_targets_are_identical_for_any_workers_and_ranks(
    dataset, train_indices, world_size, num_workers
):
    reference = hash_samples(dataset, train_indices, 0)
    ranks = run_ranks(world_size, partial(hash_samples, dataset, train_indices, num_workers))
    steps = [[sample for part in parts for sample in part] for parts in zip(*ranks, strict=True)]
    assert steps == reference
    assert sum(map(len, steps)) == SIZE


class FixedRate(torch.optim.lr_scheduler.LRScheduler):
    """A constant learning rate, with the method that train_fn calls."""

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def learning_rate(self) -> float:
        return self.get_last_lr()[0]


def train_weights(dataset: Any, indices: np.ndarray, accumulation_steps: int) -> list[np.ndarray]:
    model = make_model(dataset)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    state = TrainState(wrap_model(model, CPU), optimizer, FixedRate(optimizer))
    loader = make_train_loader(dataset, indices, accumulation_steps=accumulation_steps)
    for epoch in (1, 2):
        train_fn(state, loader.epoch(0, epoch), LOGGER, CONFIG)
    return [value.detach().numpy() for value in unwrap_model(state.model).parameters()]


@pytest.mark.parametrize(("world_size", "accumulation_steps"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_ranks_and_accumulation_do_not_change_the_weights(dataset, train_indices, world_size, accumulation_steps):
    expected = train_weights(dataset, train_indices, 1)
    for weights in run_ranks(world_size, partial(train_weights, dataset, train_indices, accumulation_steps)):
        for value, reference in zip(weights, expected, strict=True):
            np.testing.assert_allclose(value, reference, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory) -> Path:
    """A directory with the runs of two folds, run0 and run1."""
    return make_runs(data_dir, tmp_path_factory.mktemp("runs"))


def test_predictions_have_the_samples_of_their_split_and_the_score_of_training(runs):
    table = read_table(runs / "run0/predictions/valid.csv")
    assert list(table.ids) == ids_of_fold(runs, 0)
    assert list(read_table(runs / "run0/predictions/test.csv").ids) == ids_of_fold(runs, -1)
    if KIND == "mask":
        return  # in the size of the image, and not in that of training
    best = json.loads((runs / "run0/run.json").read_text())["best"]
    truth, values = table.targets, table.values
    if KIND == "class":
        score = metrics.accuracy_score(truth, values.argmax(1))
    elif KIND == "labels":
        score = np.mean([metrics.average_precision_score(*pair) for pair in zip(truth.T, values.T, strict=True)])
    else:
        score = metrics.mean_absolute_error(truth, values)
    assert best["score"] == pytest.approx(score, rel=1e-5)


def test_predictions_of_folds_are_out_of_fold_and_means(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "build_model", tiny_network)
    flags = ["--run", str(runs / "run0"), str(runs / "run1"), "--output", str(tmp_path / "cv"), "--device", "cpu"]
    end = run_train(predict.main, predict.Options, *flags, name="tools/predict.py", repeats=False)
    assert end.code == 0, end.err
    valid = read_table(tmp_path / "cv/valid.csv")
    assert set(valid.ids) == {*ids_of_fold(runs, 0), *ids_of_fold(runs, 1)}
    if KIND == "mask":
        single = read_table(runs / "run0/predictions/valid.csv")
        row_of = {name: row for row, name in enumerate(valid.ids)}
        for name, mask in zip(single.ids, single.masks, strict=True):
            merged = tmp_path / "cv" / valid.masks[row_of[name]]
            assert merged.read_bytes() == (runs / "run0/predictions" / mask).read_bytes()
        return
    tests = [read_table(runs / f"run{fold}/predictions/test.csv").values for fold in (0, 1)]
    np.testing.assert_allclose(read_table(tmp_path / "cv/test.csv").values, (tests[0] + tests[1]) / 2)
