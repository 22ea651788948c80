"""Order and state of the training loop: what happens before what in a step, and what a resumed stage continues with."""

import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from image_data import RandomImages
from loops import CONFIG, CPU, LOGGER, make_loader, make_optimizer, make_state
from marks import CLASSES_ONLY
from models import CHANNELS, plain_model
from torch import nn
from torch.amp import GradScaler

from batteries.checkpoint.io import make_checkpoint
from batteries.core.files import write_atomically
from batteries.data.loaders import EvalLoader, TrainLoader
from batteries.training.early_stopping import EarlyStopping
from batteries.training.ema import EMA
from batteries.training.schedules import make_schedule
from batteries.training.state import SilentLogger, TrainState
from experiment.augmentations import normalize
from train import Stage, train_fn, valid_fn

pytestmark = CLASSES_ONLY


def checkpoint_of(state: TrainState) -> dict:
    return make_checkpoint(
        stage="stage0",
        epoch=2,
        model=state.model,
        optimizer=state.optimizer,
        scheduler=state.scheduler,
        extra=state.extra(),
    )


def test_ema_follows_the_weights_after_each_step():
    state = make_state(plain_model())
    state.ema = EMA(state.model, 0.5)
    before = [value.detach().clone() for value in state.model.parameters()]
    loader = TrainLoader(RandomImages(16, CHANNELS), range(16), None, CPU, seed=0, batch_size=16)
    train_fn(state, loader.epoch(0, 1), LOGGER, CONFIG)
    pairs = zip(before, state.model.parameters(), state.ema.model.parameters(), strict=True)
    for first, last, average in pairs:
        assert not torch.equal(average, first)  # as it would be, had it been updated before the step
        low, high = torch.minimum(first, last), torch.maximum(first, last)
        assert ((average >= low - 1e-6) & (average <= high + 1e-6)).all()


def test_loss_scale_is_restored_from_a_checkpoint():
    def build(scale: float) -> TrainState:
        model = plain_model()
        return TrainState(model, *make_optimizer(model), scaler=GradScaler("cpu", init_scale=scale, growth_interval=7))

    state = build(8.0)
    train_fn(state, make_loader().epoch(0, 1), LOGGER, CONFIG)
    restored = build(2.0**16)
    restored.restore(checkpoint_of(state), "x.pth")
    assert state.scaler.state_dict()["_growth_tracker"] > 0
    assert restored.scaler.state_dict() == state.scaler.state_dict()


def test_validation_loss_has_no_label_smoothing():
    model = plain_model()
    dataset = RandomImages(12, CHANNELS)
    loader = EvalLoader(dataset, range(12), None, CPU, batch_size=5)
    loss = valid_fn(model, loader, LOGGER, dataclasses.replace(CONFIG, label_smoothing=0.3))["loss"]
    logits, targets = [], []
    model.eval()
    with torch.no_grad():
        for images, batch_targets in loader:
            logits.append(model(normalize(images)).double().numpy())
            targets.append(batch_targets.numpy())
    rows, classes = np.concatenate(logits), np.concatenate(targets)
    log_sum = np.log(np.exp(rows).sum(1))
    expected = (log_sum - rows[np.arange(12), classes]).mean()
    assert loss == pytest.approx(expected, rel=1e-5)


class RecordsRates(SilentLogger):
    """Records the learning rate of each step."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.rates: list[float] = []

    def log_step(self, lr: float, gradient_norm: torch.Tensor) -> None:
        self.rates.append(lr)


def test_logged_learning_rate_is_that_of_the_step():
    model = plain_model()
    optimizer, _ = make_optimizer(model)
    applied: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: applied.append(optimizer.param_groups[0]["lr"]))
    loader = make_loader()
    schedule = make_schedule(optimizer, Stage("a", 1, 0.05, "cosine"), len(loader))
    logger = RecordsRates()
    train_fn(TrainState(model, optimizer, schedule), loader.epoch(0, 1), logger, CONFIG)
    assert logger.rates == applied
    expected = [0.05 * (1 + math.cos(math.pi * step / len(loader))) / 2 for step in range(len(loader))]
    assert logger.rates == pytest.approx(expected)


def test_early_stopping_count_is_restored_from_a_checkpoint():
    def build() -> TrainState:
        model = plain_model()
        return TrainState(model, *make_optimizer(model), stopping=EarlyStopping(3, minimize=False))

    state = build()
    assert [state.stopping.update(score) for score in (0.9, 0.5, 0.6)] == [False, False, False]
    restored = build()
    restored.restore(checkpoint_of(state), "x.pth")
    assert restored.stopping.update(0.7)  # the third epoch in a row that is not better than 0.9


@pytest.mark.parametrize("changed", ["seed", "stage", "epoch"])
def test_order_of_the_samples_depends_on_seed_stage_and_epoch(changed):
    def order(seed: int = 0, stage: int = 0, epoch: int = 1) -> list[int]:
        loader = TrainLoader(RandomImages(64, CHANNELS), range(64), None, CPU, seed=seed, batch_size=16)
        return loader.epoch(stage, epoch).order.tolist()

    assert order() == order()
    other = order(**{changed: 2})
    assert other != order()
    assert sorted(other) == list(range(64))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs the names of open files")
def test_file_and_directory_are_flushed_to_disk_around_the_rename(tmp_path, monkeypatch):
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        assert Path(source).read_bytes() == b"complete"
        calls.append(("replace", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_atomically(tmp_path / "x.pth", lambda file: file.write(b"complete"))
    assert [name for name, _ in calls] == ["fsync", "replace", "fsync"]
    assert calls[1:] == [("replace", "x.pth"), ("fsync", tmp_path.name)]
    assert calls[0][1] != tmp_path.name


def test_scaled_gradients_are_unscaled_before_clipping():
    def train_with(scale: float) -> list[torch.Tensor]:
        model = plain_model()
        state = TrainState(model, *make_optimizer(model), scaler=GradScaler("cpu", init_scale=scale))
        config = dataclasses.replace(CONFIG, clip_norm=0.01)
        train_fn(state, make_loader().epoch(0, 1), LOGGER, config)
        return [value.detach().clone() for value in model.parameters()]

    for first, second in zip(train_with(1.0), train_with(1024.0), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)


def test_gradients_of_one_step_do_not_reach_the_next():
    model = nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * 64, 4))
    state = TrainState(model, *make_optimizer(model))
    train_fn(state, make_loader().epoch(0, 1), LOGGER, CONFIG)
    assert all(value.grad is None for value in model.parameters())
