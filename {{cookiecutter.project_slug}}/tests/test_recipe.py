"""Tests of accumulation, schedules, EMA, early stopping, freezing, steps, precision, metrics and pretrained weights."""

import dataclasses
import json
import math
import os
import platform
import re
import shutil
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_data import RandomImages
from loops import CONFIG, CPU, LOGGER, make_loader, make_state
from marks import CLASSES_ONLY
from models import CHANNELS, batchnorm_model, plain_model, tiny_network
from processes import run_ranks, run_train
from small_data import make_data
from torch import nn

import train
from batteries.checkpoint.io import save_checkpoint
from batteries.core.config_io import to_json
from batteries.core.errors import UserError
from batteries.core.memory import keep_freed_memory, return_freed_memory
from batteries.data.batch_plan import plan_epoch
from batteries.data.loaders import Batch, EvalLoader
from batteries.distributed.unwrap import unwrap_model
from batteries.training.criterion import DEPENDS_ON_BATCHES, prepare_criterion
from batteries.training.early_stopping import EarlyStopping
from batteries.training.ema import EMA
from batteries.training.metrics import PredictionCollector
from batteries.training.nonfinite import GradientMonitor
from batteries.training.optimizer_step import optimizer_step, start_momentum
from batteries.training.parameters import freeze, parameter_groups, train_mode
from batteries.training.precision import make_scaler
from batteries.training.pretrained import load_pretrained
from batteries.training.schedules import ScheduleByScore, learning_rates
from batteries.training.state import SilentLogger
from experiment.task import SCORES
from train import Config, Stage, build_optimizer, train_fn, valid_fn


@pytest.mark.parametrize("accumulation_steps", range(1, 41))
def test_accumulated_gradients_equal_those_of_whole_steps(accumulation_steps):
    samples = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for micro_batches in range(1, 41):  # of one sample each
        weights = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        gradients = []
        for planned in plan_epoch(micro_batches, accumulation_steps, accumulation_steps, 0, 1, drop_last=False):
            batch = Batch(None, None, planned.loss_weight, planned.ends_step, seed=0, step_seed=0)
            loss = (samples[planned.start : planned.stop] @ weights - 1).square().mean()
            batch.scale_loss(loss).backward()
            if planned.ends_step:
                gradients.append(weights.grad.numpy().copy())
                weights.grad = None
        assert len(gradients) == math.ceil(micro_batches / accumulation_steps)
        for number, gradient in enumerate(gradients):
            start = number * accumulation_steps
            step_samples = samples[start : min(start + accumulation_steps, micro_batches)]
            reference = torch.zeros(3, dtype=torch.float64, requires_grad=True)
            (step_samples @ reference - 1).square().mean().backward()
            np.testing.assert_allclose(gradient, reference.grad, rtol=1e-12, atol=1e-14)


def torch_learning_rates(make_scheduler, steps: int, lr: float = 0.5) -> list[float]:
    """Return the learning rates of a scheduler of torch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=lr)
    scheduler = make_scheduler(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_one_cycle_cosine_and_multi_step_equal_the_schedulers_of_torch():
    from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR

    def one_cycle(optimizer):
        return OneCycleLR(optimizer, 0.5, total_steps=60, cycle_momentum=False)

    def cosine(optimizer):
        return CosineAnnealingLR(optimizer, 60)

    def multi_step(optimizer):
        return MultiStepLR(optimizer, [30, 45])

    def rates(schedule: str) -> list[float]:
        return learning_rates(Stage("a", 6, 0.5, schedule), steps_per_epoch=10)

    assert rates("one-cycle") == pytest.approx(torch_learning_rates(one_cycle, 60), rel=1e-9)
    assert rates("cosine") == pytest.approx(torch_learning_rates(cosine, 60), rel=1e-9)
    assert rates("multi-step") == pytest.approx(torch_learning_rates(multi_step, 60))
    assert rates("constant") == [0.5] * 60


def test_warmup_ends_before_the_last_step_of_the_stage():
    rates = learning_rates(Stage("a", 2, 1.0, "cosine", warmup_epochs=1.9), steps_per_epoch=3)
    assert rates == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])


def test_warmup_is_linear_and_the_schedule_follows():
    stage = Stage("a", 2, 1.0, "cosine", warmup_epochs=0.75)
    expected = [0.25, 0.5, 0.75, 1.0, 0.904508497, 0.654508497, 0.345491503, 0.095491503]
    assert learning_rates(stage, steps_per_epoch=4) == pytest.approx(expected, rel=1e-8)
    constant = Stage("a", 2, 1.0, "constant", warmup_epochs=0.5)
    assert learning_rates(constant, steps_per_epoch=4) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1])


@pytest.mark.parametrize(("minimize", "sign"), [(False, 1), (True, -1)])
def test_plateau_lowers_the_rate_without_improvement_and_can_be_resumed(minimize, sign):
    def build() -> ScheduleByScore:
        return ScheduleByScore(torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0), minimize, patience=2)

    schedule = build()
    rates: list[float] = []
    for score in [0.1, 0.5, 0.4, math.nan, 0.6, 0.6, 0.6]:
        state = schedule.state_dict()
        schedule = build()
        schedule.load_state_dict(state)
        for group in schedule._plateau.optimizer.param_groups:
            group["lr"] = rates[-1] if rates else 1.0  # in a run the state of the optimizer restores it
        schedule.end_epoch(sign * score)
        rates.append(schedule._plateau.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01])


def test_show_schedule_prints_the_schedule_and_writes_nothing(tmp_path):
    flags = [
        "--show-schedule",
        "--logdir",
        str(tmp_path / "run"),
        "--tracker",
        "none",
        "--data-dir",
        str(make_data(tmp_path / "data")),
        "--limit-batches",
        "5",
        "--batch-size",
        "16",
        "--device",
        "cpu",
    ]
    end = run_train(train.main, Config, *flags)
    assert end.code == 0, end.err
    lines = end.out.splitlines()
    assert lines[1].split() == ["stage0", "1", "1", "1.200e-04"]
    assert lines[7].split() == ["stage0", "6", "30", "1.200e-08"]
    assert not (tmp_path / "run").exists()


def test_ema_equals_a_slow_reference_and_copies_counters():
    model = batchnorm_model()
    ema = EMA(model, decay=0.9)
    reference = {name: value.double() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for decay in [0.1, 2 / 11, 3 / 12, 4 / 13, 5 / 14, *[0.9] * 3]:
        if decay == 0.9:
            ema.steps = 80  # (1 + 80) / (10 + 80)
        model(torch.randn(8, CHANNELS, 8, 8)).square().mean().backward()
        optimizer.step()
        ema.update(model)
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                reference[name] = decay * reference[name] + (1 - decay) * value
            else:
                reference[name] = value.double()
    for name, value in ema.state_dict().items():
        np.testing.assert_allclose(value.double(), reference[name], rtol=1e-5, atol=1e-7)


def test_ema_copies_buffers_that_are_not_statistics():
    model = batchnorm_model()
    model.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
    ema = EMA(model, decay=0.9)
    ema.update(model)
    model.mask.mul_(2)
    ema.update(model)
    assert torch.equal(ema.model.mask, model.mask)


@pytest.mark.parametrize("decay", [0.99, 0.999, 0.9999])
def test_ema_of_few_steps_forgets_the_initial_weights(decay):
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 1000.0)
    ema = EMA(model, decay)
    nn.init.constant_(model.weight, 1.0)
    for _ in range(50):
        ema.update(model)
    assert ema.model.weight.item() == pytest.approx(1.0, abs=0.01)


def test_ema_decay_that_exceeds_the_steps_of_a_stage_is_logged(config):
    stages = (Stage("stage0", 10, 1e-2), Stage("stage1", 2, 1e-2))  # 60 and 12 steps
    end = command(dataclasses.replace(config, stages=stages, ema_decay=0.98))  # 50 steps
    assert end.code == 0, end.err
    message = "--ema-decay 0.98 averages over about 50 steps, but stage1 has 12, in which the decay rises to 0.571; use"
    assert message in end.out
    assert message in (config.logdir / "train.log").read_text()
    assert "but stage0 has" not in end.out
    shutil.rmtree(config.logdir)
    assert "--ema-decay" not in command(dataclasses.replace(config, ema_decay=0.9)).out  # 10 of 18 steps


class KeepsTensors(nn.Module):
    """Keeps an output with its graph in a nested attribute, an expanded buffer, and buffers that it assigns."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"outputs": []}
        self.register_buffer("mask", torch.ones(1, 1).expand(3, 3))
        self.register_buffer("moving_mean", torch.zeros(()))
        self.register_buffer("table", None, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.kept["outputs"] = [images]
            self.moving_mean = 0.9 * self.moving_mean + 0.1 * images.detach().mean()
        if self.table is None:
            self.table = torch.ones(images.shape[1])  # also in validation
        return images * self.table


def network_that_keeps_tensors(num_classes: int) -> nn.Module:
    pool, flatten, linear = tiny_network(num_classes)
    norms = [torch.nn.utils.weight_norm(linear), torch.nn.utils.spectral_norm(nn.Linear(num_classes, num_classes))]
    return nn.Sequential(pool, flatten, norms[0], KeepsTensors(), norms[1])


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_model_that_keeps_tensors_is_averaged_trained_in_two_stages_and_resumed(config, monkeypatch, ema_decay):
    monkeypatch.setattr(train, "build_model", network_that_keeps_tensors)
    stages = (Stage("stage0", 2, 1e-2), Stage("stage1", 2, 1e-2))
    config = dataclasses.replace(config, stages=stages, ema_decay=ema_decay)
    end = command(config)
    assert end.code == 0, end.err
    metrics = (config.logdir / "metrics.jsonl").read_bytes()
    shutil.copytree(config.logdir, config.logdir.with_name("interrupted"))
    interrupted = dataclasses.replace(config, logdir=config.logdir.with_name("interrupted"))
    shutil.rmtree(interrupted.logdir / "stage1")
    end = command(interrupted, "--resume")
    assert end.code == 0, end.err
    assert (interrupted.logdir / "metrics.jsonl").read_bytes() == metrics
    shutil.rmtree(config.logdir)
    end = command(config, "--init-from", str(interrupted.logdir / "stage1/best.pth"))
    assert end.code == 0, end.err


def test_model_that_cannot_be_copied_for_the_average_is_rejected(config, monkeypatch):
    def build(num_classes: int) -> nn.Module:
        model = tiny_network(num_classes)
        model.lock = threading.Lock()
        return model

    monkeypatch.setattr(train, "build_model", build)
    end = command(dataclasses.replace(config, ema_decay=0.9))
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert end.err.startswith("error: --ema-decay needs a copy of the model, which cannot be copied (cannot pickle")
    assert not (config.logdir / "stage0").exists()


@pytest.mark.parametrize(
    ("scores", "minimize", "min_delta", "stops_after"),
    [
        ([0.1, 0.2, 0.2, 0.2, 0.9], False, 0.0, 4),  # a tie is not an improvement
        ([0.9, 0.8, 0.8, 0.8, 0.1], True, 0.0, 4),
        ([0.1, 0.2, 0.3, 0.4, 0.5], False, 0.0, None),
        ([0.5, 0.4, 0.3, 0.2, 0.1], True, 0.0, None),
        ([0.10, 0.15, 0.19, 0.5, 0.6], False, 0.1, 3),  # each improvement is less than 0.1
        ([0.60, 0.55, 0.51, 0.2, 0.1], True, 0.1, 3),
        ([0.10, 0.15, 0.25, 0.30, 0.36], False, 0.1, None),  # relative to the last improvement that counted
        ([math.nan, math.nan, 0.3, 0.4, 0.5], False, 0.0, 2),
        ([0.1, math.inf, 0.3, math.nan, 0.5], False, 0.0, None),
    ],
)
def test_early_stopping_ends_after_the_expected_epoch(scores, minimize, min_delta, stops_after):
    def last_epoch(restart: bool) -> int | None:
        stopping = EarlyStopping(2, min_delta, minimize=minimize)
        for epoch, score in enumerate(scores, start=1):
            if restart:
                state = stopping.state_dict()
                stopping = EarlyStopping(2, min_delta, minimize=minimize)
                stopping.load_state_dict(state)
            if stopping.update(score):
                return epoch
        return None

    assert last_epoch(restart=False) == stops_after
    assert last_epoch(restart=True) == stops_after


def test_only_kernels_and_matrices_have_weight_decay():
    model = batchnorm_model()
    decayed, others = parameter_groups(model, 0.5)
    assert [parameter.ndim for parameter in decayed["params"]] == [4, 2, 2]
    assert {parameter.ndim for parameter in others["params"]} == {1}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_norms_and_biases_of_any_dimension_have_no_weight_decay():
    norm = nn.LayerNorm([4, 6, 6])
    custom = nn.Linear(3, 3)
    custom.my_bias = nn.Parameter(torch.zeros(3, 3))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Embedding(5, 3), nn.GroupNorm(2, 4), custom)
    decayed, others = parameter_groups(model, 0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(parameter)] for parameter in decayed["params"]] == ["0.weight", "2.weight", "4.weight"]
    not_decayed = {"0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "4.bias", "4.my_bias"}
    assert {names[id(parameter)] for parameter in others["params"]} == not_decayed


def test_parameters_frozen_by_build_model_stay_frozen_in_all_stages(config, monkeypatch):
    def build(num_classes: int) -> nn.Module:
        model = nn.Sequential(*tiny_network(num_classes), nn.Linear(num_classes, num_classes), nn.PReLU())
        model[3].requires_grad_(False)
        return model

    monkeypatch.setattr(train, "build_model", build)
    stages = (Stage("stage0", 1, 1e-2, freeze=("2",)), Stage("stage1", 1, 1e-2))
    end = command(dataclasses.replace(config, stages=stages, ema_decay=0.9))
    assert end.code == 0, end.err
    states = [
        torch.load(config.logdir / f"stage{number}/last.pth", weights_only=True)["model_state_dict"]
        for number in (0, 1)
    ]
    for name in ("3.weight", "3.bias"):
        assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0]["2.weight"], states[1]["2.weight"])  # the second stage trains it


@CLASSES_ONLY
@pytest.mark.parametrize("world_size", [1, 2])
def test_only_modules_that_are_not_frozen_change(world_size):
    def changed_tensors() -> set[str]:
        model = batchnorm_model()
        freeze(model, ["1", "2"])  # the first convolution and its batch norm
        before = {name: value.clone() for name, value in model.state_dict().items()}
        state = make_state(model)
        state.frozen = ("1", "2")
        train_fn(state, make_loader().epoch(0, 1), LOGGER, CONFIG)
        after = unwrap_model(state.model).state_dict()
        return {name for name in before if not torch.equal(before[name], after[name])}

    names = set(batchnorm_model().state_dict())
    for changed in run_ranks(world_size, changed_tensors):
        assert changed == {name for name in names if name[0] not in "12"}


def test_frozen_modules_stay_in_evaluation_mode():
    model = batchnorm_model()
    train_mode(model.eval(), ["2"])
    assert {name for name, module in model.named_modules() if not module.training} == {"2"}


@CLASSES_ONLY
@pytest.mark.parametrize("how", ["freeze", "requires_grad"])
def test_both_ways_of_freezing_keep_batchnorm_statistics(how):
    model = batchnorm_model()
    state = make_state(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if how == "freeze":
        freeze(model, ["1", "2"])
        state.frozen = ("1", "2")
    else:
        for parameter in [*model[1].parameters(), *model[2].parameters()]:
            parameter.requires_grad = False
        freeze(model, [])
    train_fn(state, make_loader().epoch(0, 1), LOGGER, CONFIG)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name[0] not in "12"}


def test_only_modules_without_trainable_parameters_are_in_evaluation_mode():
    backbone = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=False), nn.Dropout())
    backbone.requires_grad_(False)
    half = nn.BatchNorm2d(2)
    half.bias.requires_grad = False
    model = nn.Sequential(backbone, half, nn.Dropout(), nn.Flatten())
    train_mode(model, [])
    assert {name for name, module in model.named_modules() if not module.training} == {"0", "0.0", "0.1", "0.2"}


@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
def test_clipping_equals_that_of_torch_on_one_vector(clip_norm):
    model = plain_model()
    model(torch.randn(8, CHANNELS, 8, 8)).square().sum().backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    before = torch.cat([parameter.detach().clone().flatten() for parameter in model.parameters()])
    vector = nn.Parameter(torch.zeros_like(gradient))
    vector.grad = gradient.clone()
    expected = torch.nn.utils.clip_grad_norm_([vector], clip_norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    norm = optimizer_step(optimizer, make_scaler(CPU, "fp32"), clip_norm)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    np.testing.assert_allclose(before - after, vector.grad, rtol=1e-4, atol=1e-5)


def test_sgd_has_nesterov_momentum_and_adamw_has_two_groups():
    model = plain_model()
    stage = Stage("a", 1, 0.1)
    sgd = build_optimizer(model, stage, dataclasses.replace(CONFIG, optimizer="sgd"))
    assert type(sgd) is torch.optim.SGD
    assert (sgd.defaults["nesterov"], sgd.defaults["momentum"], sgd.defaults["lr"]) == (True, 0.9, 0.1)
    adamw = build_optimizer(model, stage, CONFIG)
    assert type(adamw) is torch.optim.AdamW
    assert [group["weight_decay"] for group in adamw.param_groups] == [CONFIG.weight_decay, 0.0]


def one_weight(gradient: float) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.tensor([gradient])
    return weight, torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1, fused=True)


def test_momentum_initialised_with_zeros_gives_the_steps_of_torch():
    def weights(start: bool) -> list[float]:
        weight, optimizer = one_weight(0.3)
        if start:
            start_momentum(optimizer)
        for gradient in (0.3, -0.7, 0.1):
            weight.grad = torch.tensor([gradient])
            optimizer.step()
        return weight.tolist()

    assert weights(start=True) == weights(start=False)


@pytest.mark.parametrize("gradient", [math.nan, math.inf, -math.inf])
def test_nonfinite_gradient_changes_no_weight(gradient):
    weight, optimizer = one_weight(gradient)
    norm = optimizer_step(optimizer, make_scaler(CPU, "fp32"))
    assert not math.isfinite(norm)
    assert weight.item() == 1
    assert weight.grad is None


def test_fp16_overflow_skips_the_step_and_halves_the_loss_scale():
    scaler = make_scaler(CPU, "fp16")
    weight, optimizer = one_weight(0.0)
    start_momentum(optimizer)
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [0.0]  # otherwise it would not be initialised
    scaler.scale(weight.sum() * 1e38).backward()  # 2^16 times that exceeds float32
    optimizer_step(optimizer, scaler)
    assert weight.item() == 1
    assert scaler.get_scale() == 2**15
    scaler.scale(weight.sum()).backward()
    norm = optimizer_step(optimizer, scaler)
    assert norm.item() == pytest.approx(1.0)  # unscaled
    assert weight.item() == pytest.approx(1 - 0.1 * 1.1)


def test_nonfinite_loss_makes_all_gradients_nonfinite():
    weight = nn.Parameter(torch.ones(2))
    batch = Batch(None, None, 0.5, ends_step=True, seed=0, step_seed=0)
    loss = weight.sum() + torch.tensor(math.inf)
    assert torch.autograd.grad(loss, weight, retain_graph=True)[0].isfinite().all()
    batch.scale_loss(loss).backward()
    assert weight.grad.isnan().all()


def test_gradient_monitor_lists_and_counts_skipped_steps():
    monitor = GradientMonitor()
    for norm in (1.0, math.nan, math.inf):
        monitor.add(torch.tensor(norm))
    assert monitor.read(step=7) == [(5, False), (6, True), (7, True)]
    monitor.add(torch.tensor(2.0))
    assert monitor.read(step=1) == [(1, False)]
    assert monitor.skipped == 2
    assert monitor.last == 2.0
    assert monitor.read(step=1) == []


def test_nonfinite_input_does_not_change_batchnorm_statistics():
    model = batchnorm_model()
    state = make_state(model)
    model(torch.randn(8, CHANNELS, 8, 8))
    state.buffers.save()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.full((8, CHANNELS, 8, 8), math.nan)).sum().backward()
    assert model[2].running_mean.isnan().any()
    optimizer_step(state.optimizer, state.scaler, None, state.buffers)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(torch.randn(8, CHANNELS, 8, 8)).sum().backward()
    optimizer_step(state.optimizer, state.scaler, None, state.buffers)
    assert not torch.equal(model[2].running_mean, before["2.running_mean"])


class AssignsBuffers(nn.Module):
    """Computes statistics like batch norm, and assigns them: of changing shapes, and one that is created in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moving_mean", torch.zeros(CHANNELS))
        self.register_buffer("last", torch.zeros(1))
        self.register_buffer("late", None)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = images.detach()
        self.moving_mean = 0.9 * self.moving_mean + 0.1 * values.mean((0, 2, 3))
        self.last = values.flatten(1).mean(1)
        self.late = values.sum()
        return self.weight * images


def test_nonfinite_input_does_not_change_buffers_that_a_module_assigns():
    model = nn.Sequential(AssignsBuffers(), nn.Flatten(), nn.Linear(CHANNELS * 64, 4))
    state = make_state(model)

    def step(images: torch.Tensor) -> dict[str, torch.Tensor]:
        model(images).sum().backward()
        optimizer_step(state.optimizer, state.scaler, None, state.buffers)
        return {name: value.clone() for name, value in model.named_buffers()}

    invalid = torch.full((8, CHANNELS, 8, 8), math.nan)
    first = step(invalid)
    assert {name: value.tolist() for name, value in first.items()} == {
        "0.moving_mean": [0.0] * CHANNELS,
        "0.last": [0.0],
    }
    valid = step(torch.ones(5, CHANNELS, 8, 8))
    assert valid["0.moving_mean"].tolist() == pytest.approx([0.1] * CHANNELS)
    assert valid["0.last"].tolist() == [1.0] * 5
    restored = step(invalid)
    assert restored.keys() == valid.keys()
    assert all(torch.equal(restored[name], value) for name, value in valid.items())
    assert step(torch.ones(5, CHANNELS, 8, 8))["0.moving_mean"].tolist() == pytest.approx([0.19] * CHANNELS)


def test_tensors_cached_during_validation_can_be_used_in_training(config, monkeypatch):
    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = None
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if self.scale is None and not self.training:
                self.scale = torch.ones(images.shape[1:])
            return images * self.weight if self.scale is None else images * self.weight * self.scale

    monkeypatch.setattr(train, "build_model", lambda num_classes: nn.Sequential(Cache(), *tiny_network(num_classes)))
    end = command(config)
    assert end.code == 0, end.err


@CLASSES_ONLY
def test_streak_that_ended_before_the_check_ends_the_run(config, monkeypatch):
    monkeypatch.setattr(train.task, "build_criterion", lambda *_: FaultyLoss({2, 3, 4, 5, 6}, rank=0))
    end = command(dataclasses.replace(config, limit_batches=12, batch_size=8))
    assert end.code == 1
    reason = "5 skipped steps in a row, up to stage0 1/3 step 6: their gradients are not finite."
    assert end.err.startswith(f"error: the run ends after {reason}")


class FaultyLoss(nn.CrossEntropyLoss):
    """Returns NaN in some calls on one rank; calls count from 1."""

    def __init__(self, calls: set[int], rank: int) -> None:
        super().__init__()
        self.faulty_calls = calls
        self.faulty_rank = rank
        self.calls = 0

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        is_faulty_rank = not torch.distributed.is_initialized() or torch.distributed.get_rank() == self.faulty_rank
        loss = super().forward(logits, targets)
        return loss * math.nan if is_faulty_rank and self.calls in self.faulty_calls else loss


@CLASSES_ONLY
def test_nonfinite_loss_on_one_rank_skips_the_step_on_all_ranks(monkeypatch):
    def weights() -> np.ndarray:
        monkeypatch.setattr(train.task, "build_criterion", lambda *_: FaultyLoss({2}, rank=1))
        state = make_state(plain_model())
        train_fn(state, make_loader().epoch(0, 1), LOGGER, CONFIG)
        return np.concatenate([value.detach().numpy().ravel() for value in unwrap_model(state.model).parameters()])

    single_process = weights()  # skips step 2 too
    monkeypatch.undo()
    first, second = run_ranks(2, weights)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, single_process, rtol=1e-5, atol=1e-6)
    assert np.isfinite(first).all()


@pytest.fixture
def config(monkeypatch, tmp_path) -> Config:
    monkeypatch.setattr(train, "build_model", tiny_network)
    return Config(
        stages=(Stage("stage0", 3, 1e-2),),
        data_dir=make_data(tmp_path / "data"),
        device="cpu",
        tracker=("none",),
        num_workers=0,
        batch_size=16,  # with larger batches small data have few steps
        limit_batches=6,
        logdir=tmp_path / "run",
    )


def command(config: Config, *flags: str):
    """Run `python train.py` with this config."""
    path = config.data_dir.with_name("config.json")
    path.write_text(json.dumps(to_json(config)))
    return run_train(train.main, Config, "--config", str(path), *flags)


def read_metrics(config: Config) -> list[dict]:
    """Read metrics.jsonl."""
    return [json.loads(line) for line in (config.logdir / "metrics.jsonl").read_text().splitlines()]


@CLASSES_ONLY
def test_few_skipped_steps_are_logged_and_counted_and_training_continues(config, monkeypatch):
    monkeypatch.setattr(train.task, "build_criterion", lambda *_: FaultyLoss({2, 3}, rank=0))
    end = command(config)
    assert end.code == 0, end.err
    assert end.out.count("was skipped: its gradient is not finite.") == 6  # two in each of three epochs
    assert "stage0 1/3 step 2 was skipped" in end.out
    assert json.loads((config.logdir / "run.json").read_text())["skipped_steps"] == 6


@CLASSES_ONLY
def test_many_skipped_steps_in_a_row_end_the_run_and_list_samples(config, monkeypatch):
    monkeypatch.setattr(train.task, "build_criterion", lambda *_: FaultyLoss(set(range(1, 100)), rank=0))
    end = command(config)
    assert end.code == 1
    reason = "the run ends after 5 skipped steps in a row, up to stage0 1/3 step 5: their gradients are not finite."
    assert end.err.startswith(f"error: {reason}")
    assert end.err.count("\n") == 1
    steps = json.loads((config.logdir / "skipped.json").read_text())
    assert list(steps) == [f"stage0 1/3 step {step}" for step in range(1, 6)]
    assert {len(samples) for samples in steps.values()} == {config.batch_size}
    known = set(train.load_dataset(config.data_dir).ids)
    assert all(set(samples) <= known for samples in steps.values())
    assert f"failed: {reason}" in json.loads((config.logdir / "run.json").read_text())["exit"]


def test_samples_of_a_step_are_those_of_its_batch():
    dataset = RandomImages(57, CHANNELS)
    dataset.ids = [f"image_{index}" for index in range(57)]
    loader = train.TrainLoader(dataset, range(57), None, CPU, seed=3, batch_size=16, drop_last=False)
    epoch = loader.epoch(0, 2)
    for step, batch in enumerate(epoch, start=1):
        names = epoch.samples_of(step)
        expected = torch.stack([dataset.images[dataset.ids.index(name)] for name in names])
        assert torch.equal(batch.images, expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_saves_float32_weights(config, precision):
    end = command(dataclasses.replace(config, precision=precision))
    assert end.code == 0, end.err
    assert f"threads, {precision}\n" in end.out
    saved = torch.load(config.logdir / "stage0/last.pth", weights_only=True)
    assert {value.dtype for value in saved["model_state_dict"].values()} == {torch.float32}
    assert ("scale" in saved["scaler_state_dict"]) == (precision == "fp16")
    assert saved["metrics"]["train"]["loss"] < math.log(10) * 1.5


def test_fp16_overflow_is_logged(config, monkeypatch):
    monkeypatch.setattr(train, "make_scaler", lambda *_: torch.amp.GradScaler("cpu", init_scale=2.0**127))
    end = command(dataclasses.replace(config, precision="fp16"))
    assert "stage0 1/3 step 1 was skipped: its gradient overflowed fp16, so the loss scale is halved." in end.out


def test_unsupported_precision_is_rejected(config, monkeypatch):
    def fail(*_):
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(torch, "mm", fail)
    end = command(dataclasses.replace(config, precision="bf16"))
    assert end.code == 2
    assert end.err == "error: --precision bf16 is not supported on cpu; use fp32 or fp16.\n"


@CLASSES_ONLY
def test_log_loss_of_a_confident_wrong_prediction_equals_cross_entropy():
    class Confident(nn.Module):
        def forward(self, images):
            return torch.tensor([[30.0, 0.0, 0.0, 0.0]]).expand(len(images), 4)

    loader = EvalLoader(RandomImages(64, CHANNELS), range(64), None, CPU, batch_size=16)
    metrics = valid_fn(Confident(), loader, LOGGER, dataclasses.replace(CONFIG, scores=("log_loss",)))
    assert metrics["log_loss"] == pytest.approx(metrics["loss"], rel=1e-6)  # 22.5; in float32 at most 16


@CLASSES_ONLY
def test_custom_score_that_is_minimised_ranks_by_its_minimum(config, monkeypatch):
    def brier(_, targets: np.ndarray, probabilities: np.ndarray) -> float:
        return float(((probabilities - np.eye(probabilities.shape[1])[targets]) ** 2).sum(1).mean())

    monkeypatch.setitem(train.task.SCORES, "brier", brier)
    end = command(dataclasses.replace(config, main_metric="brier", minimize_metric=True))
    assert end.code == 0, end.err
    values = [line["valid"]["brier"] for line in read_metrics(config)]
    assert json.loads((config.logdir / "run.json").read_text())["best"]["score"] == min(values)


@CLASSES_ONLY
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_scores_equal_those_of_scikit_learn_for_any_world_size(world_size):
    from sklearn import metrics

    dataset = RandomImages(101, CHANNELS)
    names = tuple(SCORES)
    model = plain_model().eval()
    with torch.no_grad():
        probabilities = model(train.normalize(dataset.images)).softmax(1).numpy()
    targets = dataset.targets.numpy()
    expected = {
        "balanced_accuracy": metrics.balanced_accuracy_score(targets, probabilities.argmax(1)),
        "macro_f1": metrics.f1_score(targets, probabilities.argmax(1), average="macro"),
        "log_loss": -np.log(probabilities[range(101), targets]).mean(),
        "roc_auc": np.mean([metrics.roc_auc_score(targets == k, probabilities[:, k]) for k in range(4)]),
    }

    def validate() -> dict[str, float]:
        loader = EvalLoader(dataset, range(101), None, CPU, batch_size=16)
        return valid_fn(make_state(plain_model()).model, loader, LOGGER, dataclasses.replace(CONFIG, scores=names))

    scores_of_ranks = run_ranks(world_size, validate)
    for scores in scores_of_ranks:
        assert {name: scores[name] for name in names} == pytest.approx(expected, rel=1e-5)
        assert scores == scores_of_ranks[0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_collected_predictions_are_in_split_order_for_any_world_size(world_size):
    dataset = RandomImages(101, CHANNELS)
    dataset.targets = torch.arange(101)
    dataset.classes = [str(number) for number in range(101)]

    def gather() -> np.ndarray:
        collector = PredictionCollector({}, ())
        for images, targets in EvalLoader(dataset, range(101), None, CPU, batch_size=16):
            collector.add(images, targets)
        images, targets = collector.gather()
        np.testing.assert_array_equal(images, dataset.images[targets].float())
        return targets

    for targets in run_ranks(world_size, gather):
        np.testing.assert_array_equal(targets, np.arange(101))


@CLASSES_ONLY
def test_undefined_score_is_nan_and_logged(caplog):
    dataset = RandomImages(20, CHANNELS)
    dataset.targets[dataset.targets == 3] = 0
    loader = EvalLoader(dataset, range(20), None, CPU, batch_size=16)
    scores = valid_fn(plain_model(), loader, LOGGER, dataclasses.replace(CONFIG, scores=("roc_auc",)))
    assert math.isnan(scores["roc_auc"])
    assert "roc_auc is undefined: " in caplog.text


@CLASSES_ONLY
def test_ema_weights_are_validated_too_and_rank_checkpoints(config, monkeypatch):
    plain_scores = iter([0.9, 0.1, 0.2])
    ema_scores = iter([0.1, 0.5, 0.3])

    def validate(model, loader, run, config):
        is_ema = not next(model.parameters()).requires_grad
        return {"accuracy": next(ema_scores if is_ema else plain_scores), "loss": 1.0}

    monkeypatch.setattr(train, "valid_fn", validate)
    end = command(dataclasses.replace(config, ema_decay=0.9))
    assert end.code == 0, end.err
    lines = read_metrics(config)
    assert [line["valid_ema"]["accuracy"] for line in lines] == [0.1, 0.5, 0.3]
    assert torch.load(config.logdir / "stage0/best.pth", weights_only=True)["epoch"] == 2


@CLASSES_ONLY
def test_next_stage_follows_early_stopping_and_resume_trains_nothing(config, monkeypatch):
    scores = iter([0.5, 0.4, 0.9, 0.8])
    monkeypatch.setattr(train, "valid_fn", lambda *_: {"accuracy": next(scores), "loss": 1.0})
    stages = (Stage("stage0", 9, 1e-2), Stage("stage1", 9, 1e-2))
    config = dataclasses.replace(config, stages=stages, patience=1)
    end = command(config)
    assert end.code == 0, end.err
    assert end.out.count("stopped early: no better score in 1 epoch.") == 2
    lines = read_metrics(config)
    epochs = [(line["stage"], line["epoch"]) for line in lines]
    assert epochs == [("stage0", 1), ("stage0", 2), ("stage1", 1), ("stage1", 2)]
    assert "already finished" in command(config, "--resume").out


@CLASSES_ONLY
def test_stage_can_start_from_the_last_weights_of_the_previous_stage(config, monkeypatch):
    scores = iter([0.9, 0.1, 0.5])
    first_weights = []

    def randomize_weights(state, *_):
        first_weights.append(next(state.model.parameters()).detach().clone())
        torch.nn.init.normal_(next(state.model.parameters()))
        return {"loss": 1.0, "accuracy": 0.5}

    monkeypatch.setattr(train, "valid_fn", lambda *_: {"accuracy": next(scores), "loss": 1.0})
    monkeypatch.setattr(train, "train_fn", randomize_weights)
    monkeypatch.setattr("batteries.run.stage.StageRun.log_epoch", lambda *_, **__: None)
    stages = (Stage("stage0", 2, 1e-2), Stage("stage1", 1, 1e-2, start="last"))

    def run() -> bool:
        train.main(dataclasses.replace(config, stages=stages))
        last = torch.load(config.logdir / "stage0/last.pth", weights_only=True)
        return last["epoch"] == 2 and torch.equal(first_weights[2], next(iter(last["model_state_dict"].values())))

    assert run_ranks(1, run, join=False) == [True]


def test_each_stage_trains_and_validates_on_images_of_its_size(config, monkeypatch):
    class RecordsImageSizes(nn.Sequential):
        def forward(self, images):
            calls.append((self.training, *images.shape[-2:]))
            return super().forward(images)

    calls: list[tuple[bool, int, int]] = []
    monkeypatch.setattr(train, "build_model", lambda num_classes: RecordsImageSizes(tiny_network(num_classes)))
    stages = (Stage("stage0", 1, 1e-2, image_size=12), Stage("stage1", 1, 1e-2, image_size=20))

    def sizes() -> list:
        train.main(dataclasses.replace(config, stages=stages))
        return list(dict.fromkeys(calls))

    assert run_ranks(1, sizes, join=False) == [[(True, 12, 12), (False, 12, 12), (True, 20, 20), (False, 20, 20)]]


def test_out_of_memory_error_suggests_smaller_micro_batches(config, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train, "train_fn", fail)
    end = command(dataclasses.replace(config, batch_size=48, accumulation_steps=2))
    assert end.code == 2
    assert end.err.startswith(
        "error: cpu ran out of memory with micro-batches of 24 samples; use --accumulation-steps 4 with --batch-size "
        "48: micro-batches of 12, and still 48 samples per step."
    )
    shutil.rmtree(config.logdir)
    end = command(dataclasses.replace(config, batch_size=4, accumulation_steps=2))  # too small for more
    assert "with micro-batches of 2 samples; use a smaller model or smaller images, or --precision bf16." in end.err


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_reused_by_the_next_step():
    def count_page_faults() -> int:
        """Count the page faults of 40 batches."""
        import resource

        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(40):
            torch.ones(10 * 2**20)  # 40 MiB: 10,240 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def measure() -> int:
        keep_freed_memory()
        return count_page_faults()

    [faults] = run_ranks(1, measure)
    assert faults < 40 * 10_240 / 3  # some, until glibc reuses the same blocks


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_kept_memory_is_returned_after_an_epoch():
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def measure() -> tuple[int, int, int]:
        keep_freed_memory()
        return_freed_memory()  # that of earlier tests, which would hold the blocks
        before = resident_bytes()
        blocks = [torch.ones(10 * 2**20) for _ in range(5)]  # 40 MiB each
        pin = blocks.pop()  # its address is above the others, so they are not returned automatically
        blocks.clear()
        kept = resident_bytes() - before
        return_freed_memory()
        return kept, resident_bytes() - before, pin.nbytes

    [(kept, remaining, block)] = run_ranks(1, measure)
    assert kept > 4 * block
    assert remaining < 2 * block


def test_log_header_counts_trainable_parameters_of_the_first_stage(config, monkeypatch):
    monkeypatch.setattr(train, "build_model", lambda num_classes: nn.Sequential(*tiny_network(num_classes), nn.PReLU()))
    stages = (Stage("stage0", 1, 1e-2, freeze=("3",)), Stage("stage1", 1, 1e-2, freeze=("2",)))
    end = command(dataclasses.replace(config, stages=stages))
    assert end.code == 0, end.err
    pattern = r"model    .* ([\d,]+) parameters, ([\d,]+) of them trainable in the first stage"
    total, trainable = re.search(pattern, end.out).groups()
    assert int(total.replace(",", "")) == int(trainable.replace(",", "")) + 1  # PReLU has one parameter


@pytest.mark.parametrize("steps", [3, 5, 9])
def test_epoch_too_short_for_a_profile_is_logged(config, steps):
    end = command(dataclasses.replace(config, limit_batches=steps, batch_size=8), "--profile")
    assert end.code == 0, end.err
    assert f"--profile wrote no trace: it needs an epoch of 10 steps or more, and this one has {steps}." in end.out


def test_profile_writes_a_trace_of_five_steps(config):
    end = command(dataclasses.replace(config, limit_batches=20, batch_size=8), "--profile")
    assert end.code == 0, end.err
    trace = json.loads((config.logdir / "profile/trace_rank0.json").read_text())
    steps = {event["name"] for event in trace["traceEvents"] if str(event.get("name")).startswith("ProfilerStep")}
    assert len(steps) == 5


CLASS_WEIGHTS = torch.linspace(0.1, 3, 4)


def focal_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return a mean over samples with weights of the samples."""
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    return (CLASS_WEIGHTS[targets] * (1 - (-losses).exp()) * losses).mean()


@pytest.mark.parametrize(
    ("criterion", "is_mean"),
    [
        (nn.CrossEntropyLoss(), True),
        (nn.CrossEntropyLoss(label_smoothing=0.1), True),
        (focal_loss, True),
        (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), False),
        (partial(nn.functional.cross_entropy, weight=CLASS_WEIGHTS), False),
        (nn.CrossEntropyLoss(reduction="sum"), False),
        (nn.CrossEntropyLoss(ignore_index=3), False),
    ],
)
def test_loss_that_is_not_a_mean_over_samples_is_reported(monkeypatch, criterion, is_mean):
    warnings: list[str] = []
    monkeypatch.setattr(LOGGER, "warn_once", warnings.append)
    logits = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 0, 1, 1, 2, 3, 3, 3, 2, 2, 1, 3])
    prepared = prepare_criterion(criterion, LOGGER)
    for _ in range(2):
        assert torch.equal(prepared(logits, targets), criterion(logits, targets))
    assert warnings == ([] if is_mean else [DEPENDS_ON_BATCHES])


@CLASSES_ONLY
def test_weighted_loss_is_logged_at_the_start_of_a_run(config, monkeypatch):
    weights = torch.linspace(0.1, 3, len(train.load_dataset(config.data_dir).classes))
    monkeypatch.setattr(train.task, "build_criterion", lambda *_: nn.CrossEntropyLoss(weight=weights))
    end = command(dataclasses.replace(config, accumulation_steps=4))
    assert end.code == 0, end.err
    assert end.out.count("The loss of a batch is not the mean over its samples") == 1
    log = (config.logdir / "train.log").read_text()
    assert log.index("The loss of a batch is not the mean") < log.index("stage0 1/3")


@CLASSES_ONLY
def test_loss_that_is_not_one_number_is_rejected(config, monkeypatch):
    monkeypatch.setattr(train.task, "build_criterion", lambda *_: nn.CrossEntropyLoss(reduction="none"))
    end = command(config)
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert "error: the loss has shape (16,) and must be one number; in build_criterion, take the mean" in end.err


@CLASSES_ONLY
def test_criterion_is_moved_to_the_device(monkeypatch):
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.CrossEntropyLoss(weight=torch.ones(4))
            self.plain = torch.ones(4)
            self.devices = []

        def to(self, device: torch.device) -> nn.Module:
            self.devices.append(device)
            return super().to(device)

        def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return self.inner(logits, targets)

    meta = torch.device("meta")
    criterion = Weighted()
    prepare_criterion(criterion, SilentLogger(meta))
    assert {criterion.inner.weight.device, criterion.plain.device} == {meta}
    keyword = partial(nn.functional.cross_entropy, weight=torch.ones(4))
    assert prepare_criterion(keyword, SilentLogger(meta))._criterion.keywords["weight"].device == meta

    criterion = Weighted()
    monkeypatch.setattr(train.task, "build_criterion", lambda *_: criterion)
    train_fn(make_state(plain_model()), make_loader().epoch(0, 1), LOGGER, CONFIG)
    valid_fn(plain_model(), EvalLoader(RandomImages(8, CHANNELS), range(8), None, CPU, batch_size=4), LOGGER, CONFIG)
    assert criterion.devices == [CPU, CPU]


def test_operation_without_a_deterministic_kernel_names_the_option(config, monkeypatch):
    class Put(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images + torch.zeros(1).put_(torch.tensor([0]), torch.ones(1))

    monkeypatch.setattr(train, "build_model", lambda num_classes: nn.Sequential(*tiny_network(num_classes), Put()))
    end = command(config)
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert end.err.startswith("error: put_ has no deterministic implementation on this device; use --no-deterministic")
    shutil.rmtree(config.logdir)
    assert command(config, "--no-deterministic").code == 0


@pytest.mark.parametrize("lazy", [nn.LazyLinear(5), nn.LazyBatchNorm1d(affine=False)])
def test_lazy_modules_are_rejected_in_one_line(config, monkeypatch, lazy):
    monkeypatch.setattr(train, "build_model", lambda num_classes: nn.Sequential(*tiny_network(num_classes), lazy))
    end = command(config)
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert end.err.startswith("error: build_model returns lazy modules, whose weights have no shape yet (3.")
    assert not config.logdir.exists()


def test_lazy_modules_that_build_model_initialises_are_accepted(config, monkeypatch):
    def build(num_classes: int) -> nn.Module:
        model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.LazyLinear(num_classes))
        model.eval()(torch.zeros(1, CHANNELS, 8, 8))
        return model

    monkeypatch.setattr(train, "build_model", build)
    end = command(config)
    assert end.code == 0, end.err


def report_metrics(monkeypatch, **names: float) -> None:
    """Let valid_fn report other means than the loss and the accuracy."""
    original = train.valid_fn

    def validate(*arguments) -> dict[str, float]:
        metrics = original(*arguments)
        del metrics["accuracy"]
        return {**metrics, **names}

    monkeypatch.setattr(train, "valid_fn", validate)


@CLASSES_ONLY
@pytest.mark.parametrize("minimize", [False, True])
def test_any_metric_that_valid_fn_reports_can_rank_checkpoints(config, monkeypatch, minimize):
    report_metrics(monkeypatch, top2=np.float32(0.5))
    config = dataclasses.replace(config, main_metric="top2", minimize_metric=minimize)
    end = command(config)
    assert end.code == 0, end.err
    best = json.loads((config.logdir / "run.json").read_text())["best"]
    assert (best["metric"], best["score"], best["epoch"]) == ("top2", 0.5, 1)
    assert "accuracy" not in read_metrics(config)[0]["valid"]
    assert "already finished" in command(config, "--resume").out


@CLASSES_ONLY
def test_unknown_main_metric_is_rejected_before_training_with_the_reported_names(config, monkeypatch):
    report_metrics(monkeypatch, top2=0.5)
    end = command(dataclasses.replace(config, main_metric="top3"))
    assert (end.code, end.err.count("\n")) == (2, 1)
    known = "loss, top2, balanced_accuracy, macro_f1, log_loss, roc_auc."
    assert end.err == (f"error: --main-metric top3 is not a known metric; did you mean 'top2'? Use one of: {known}\n")
    assert not config.logdir.exists()


@CLASSES_ONLY
def test_default_main_metric_that_valid_fn_does_not_report_is_rejected_in_one_line(config, monkeypatch):
    report_metrics(monkeypatch, mae=0.5)
    end = command(config)
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert end.err == "error: --main-metric accuracy is not a known metric. Use one of: loss, mae.\n"


@CLASSES_ONLY
@pytest.mark.parametrize("world_size", [1, 2])
def test_custom_main_metric_is_found_for_any_world_size(config, monkeypatch, world_size):
    report_metrics(monkeypatch, top2=0.5)
    config = dataclasses.replace(config, main_metric="top2")
    assert run_ranks(world_size, lambda: train.main(config), join=False) == [0.5] * world_size


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace(".", "._orig_mod.", 1),
        lambda name: f"_fsdp_wrapped_module.{name.replace('.', '._checkpoint_wrapped_module.', 1)}",
    ],
)
def test_pretrained_names_of_wrappers_are_removed(tmp_path, rename):
    other = plain_model()
    nn.init.zeros_(other[1].weight)
    names = {rename(name): value for name, value in other.state_dict().items()}
    torch.save({**names, "n_averaged": torch.tensor(1)}, tmp_path / "weights.pth")
    model = plain_model()
    assert load_pretrained(model, str(tmp_path / "weights.pth")) == ([], ["n_averaged"])
    assert torch.equal(model[1].weight, other[1].weight)


def test_pretrained_weights_fit_a_model_with_a_module_named_like_a_wrapper(tmp_path):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    for source in (Model(), nn.DataParallel(Model()), torch.compile(Model())):
        torch.save(source.state_dict(), tmp_path / "weights.pth")
        assert load_pretrained(Model(), str(tmp_path / "weights.pth")) == ([], [])


def test_pretrained_weights_that_fit_are_loaded_and_others_reported(tmp_path):
    other = nn.Sequential(*plain_model()[:-1], nn.Linear(4 * 36, 7))
    torch.save(other.state_dict(), tmp_path / "weights.pth")
    save_checkpoint(tmp_path / "checkpoint.pth", {"model_state_dict": other.state_dict()})
    for file in ("weights.pth", "checkpoint.pth"):
        model = plain_model()
        nn.init.zeros_(model[1].weight)
        head = model[-1].weight.clone()
        assert load_pretrained(model, str(tmp_path / file)) == (["4.weight", "4.bias"], [])
        assert torch.equal(model[1].weight, other[1].weight)
        assert torch.equal(model[-1].weight, head)


def test_unused_pretrained_weights_are_reported_without_their_prefix(tmp_path, config):
    model = nn.Sequential(*tiny_network(10), nn.Linear(10, 10))
    torch.save(nn.DataParallel(model).state_dict(), tmp_path / "deeper.pth")
    report = load_pretrained(nn.Sequential(*tiny_network(10)), str(tmp_path / "deeper.pth"))
    assert report == ([], ["3.weight", "3.bias"])
    end = command(config, "--pretrained", str(tmp_path / "deeper.pth"))
    assert end.code == 0, end.err
    assert "; not in the model: 3.weight, 3.bias\n" in end.out


def test_invalid_pretrained_weights_are_rejected_on_all_ranks(tmp_path):
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "damaged.pth").write_text("damaged")

    def message(source: str) -> str:
        with pytest.raises(UserError) as error:
            load_pretrained(plain_model(), source)
        return str(error.value)

    assert "has a different architecture: only 0 of 4 tensors fit." in message(str(tmp_path / "other.pth"))
    assert "is not a dict of tensors" in message(str(tmp_path / "list.pth"))
    assert "cannot be read as weights" in message(str(tmp_path / "damaged.pth"))
    messages = run_ranks(2, lambda: message("ResNet18_Weights.NOTHING"))
    assert messages == [messages[0]] * 2
    assert "is neither a file, a URL nor a name in torchvision" in messages[0]


def test_named_pretrained_weights_are_downloaded_by_torchvision(tmp_path, monkeypatch):
    from torchvision import models

    file = tmp_path / "small.pth"
    torch.save(plain_model().state_dict(), file)
    weights = SimpleNamespace(get_state_dict=lambda **_: torch.hub.load_state_dict_from_url(file.as_uri()))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(models, "get_weight", {"Small_Weights.DEFAULT": weights}.__getitem__)
    model = plain_model()
    nn.init.zeros_(model[1].weight)
    assert load_pretrained(model, "Small_Weights.DEFAULT") == ([], [])
    assert torch.equal(model[1].weight, plain_model()[1].weight)
    assert (tmp_path / "home/hub/checkpoints/small.pth").exists()
