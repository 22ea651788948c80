"""The recipe: accumulation, schedules, averages, stopping, freezing, clipping, precision, metrics, pretraining."""

import dataclasses
import json
import math
import os
import platform
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loops import CONFIG, CPU, LOGGER, make_loader, make_state
from models import CHANNELS, batchnorm_model, plain_model, tiny_network
from pictures import Pictures
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
from batteries.training.early_stopping import EarlyStopping
from batteries.training.ema import EMA
from batteries.training.metrics import PredictionCollector
from batteries.training.nonfinite import GradientMonitor
from batteries.training.optimizer_step import optimizer_step, start_momentum
from batteries.training.parameters import freeze, parameter_groups, train_mode
from batteries.training.precision import make_scaler
from batteries.training.pretrained import load_pretrained
from batteries.training.schedules import ScheduleByScore, learning_rates
from batteries.training.state import SilentLogger, TrainState
from train import SCORES, Config, Stage, build_optimizer, train_fn, valid_fn


@pytest.mark.parametrize("accumulation_steps", range(1, 41))
def test_any_number_of_micro_batches_gives_the_steps_and_gradients_of_large_batches(accumulation_steps):
    samples = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for micro_batches in range(1, 41):  # of one sample each
        weights = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        gradients = []
        for cut in plan_epoch(micro_batches, accumulation_steps, accumulation_steps, 0, 1, drop_last=False):
            batch = Batch(None, None, cut.loss_weight, cut.ends_step, seed=0)
            loss = (samples[cut.start : cut.stop] @ weights - 1).square().mean()
            batch.scale_loss(loss).backward()
            if cut.ends_step:
                gradients.append(weights.grad.numpy().copy())
                weights.grad = None
        assert len(gradients) == math.ceil(micro_batches / accumulation_steps)
        for number, gradient in enumerate(gradients):
            part = samples[number * accumulation_steps : min((number + 1) * accumulation_steps, micro_batches)]
            whole = torch.zeros(3, dtype=torch.float64, requires_grad=True)
            (part @ whole - 1).square().mean().backward()
            np.testing.assert_allclose(gradient, whole.grad, rtol=1e-12, atol=1e-14)


def by_torch(make, steps: int, lr: float = 0.5) -> list[float]:
    """The learning rates of a scheduler of torch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=lr)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_one_cycle_and_cosine_and_multi_step_equal_torchs_own():
    from torch.optim import lr_scheduler as schedulers

    def one_cycle(optimizer):
        return schedulers.OneCycleLR(optimizer, 0.5, total_steps=60, cycle_momentum=False)

    def rates(schedule: str) -> list[float]:
        return learning_rates(Stage("a", 6, 0.5, schedule), steps_per_epoch=10)

    assert rates("one-cycle") == pytest.approx(by_torch(one_cycle, 60), rel=1e-9)
    assert rates("cosine") == pytest.approx(by_torch(lambda o: schedulers.CosineAnnealingLR(o, 60), 60), rel=1e-9)
    assert rates("multi-step") == pytest.approx(by_torch(lambda o: schedulers.MultiStepLR(o, [30, 45]), 60))
    assert rates("constant") == [0.5] * 60


def test_a_warm_up_that_rounds_to_the_whole_stage_leaves_its_last_step():
    rates = learning_rates(Stage("a", 2, 1.0, "cosine", warmup_epochs=1.9), steps_per_epoch=3)
    assert rates == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])


def test_a_warm_up_is_a_line_and_the_rest_follows_it():
    stage = Stage("a", 2, 1.0, "cosine", warmup_epochs=0.75)
    table = [0.25, 0.5, 0.75, 1.0, 0.904508497, 0.654508497, 0.345491503, 0.095491503]
    assert learning_rates(stage, steps_per_epoch=4) == pytest.approx(table, rel=1e-8)
    constant = Stage("a", 2, 1.0, "constant", warmup_epochs=0.5)
    assert learning_rates(constant, steps_per_epoch=4) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1])


@pytest.mark.parametrize(("minimize", "sign"), [(False, 1), (True, -1)])
def test_plateau_lowers_the_rate_after_epochs_without_a_better_score_and_survives_a_restart(minimize, sign):
    def new() -> ScheduleByScore:
        return ScheduleByScore(torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0), minimize, patience=2)

    schedule, rates = new(), []
    for score in [0.1, 0.5, 0.4, math.nan, 0.6, 0.6, 0.6]:
        state = schedule.state_dict()
        schedule = new()
        schedule.load_state_dict(state)
        for group in schedule._plateau.optimizer.param_groups:
            group["lr"] = rates[-1] if rates else 1.0  # the optimizer's own state brings it back
        schedule.end_epoch(sign * score)
        rates.append(schedule._plateau.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01])


def test_the_schedule_is_printed_and_nothing_is_written(tmp_path):
    end = run_train(
        *(train.main, Config, "--show-schedule", "--logdir", str(tmp_path / "run"), "--tracker", "none"),
        *(
            "--data-dir",
            str(make_data(tmp_path / "data")),
            "--limit-batches",
            "5",
            "--batch-size",
            "16",
            "--device",
            "cpu",
        ),
    )
    assert end.code == 0, end.err
    lines = end.out.splitlines()
    assert lines[1].split() == ["stage0", "1", "1", "1.200e-04"]
    assert lines[7].split() == ["stage0", "6", "30", "1.200e-08"]
    assert not (tmp_path / "run").exists()


def test_an_average_of_the_weights_equals_a_slow_one_and_counters_are_taken_over():
    model = batchnorm_model()
    ema = EMA(model, decay=0.9)
    slow = {name: value.double() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        model(torch.randn(8, CHANNELS, 8, 8)).square().sum().backward()
        optimizer.step()
        ema.update(model)
        for name, value in model.state_dict().items():
            slow[name] = 0.9 * slow[name] + 0.1 * value if value.is_floating_point() else value.double()
    for name, value in ema.state_dict().items():
        np.testing.assert_allclose(value.double(), slow[name], rtol=1e-5, atol=1e-7)


def test_an_average_leaves_buffers_that_are_no_statistics_as_they_are():
    model = batchnorm_model()
    model.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
    ema = EMA(model, decay=0.9)
    ema.update(model)
    model.mask.mul_(2)
    ema.update(model)
    assert torch.equal(ema.model.mask, model.mask)


@pytest.mark.parametrize(
    ("scores", "minimize", "min_delta", "stops_after"),
    [
        ([0.1, 0.2, 0.2, 0.2, 0.9], False, 0.0, 4),  # a tie is not better
        ([0.9, 0.8, 0.8, 0.8, 0.1], True, 0.0, 4),
        ([0.1, 0.2, 0.3, 0.4, 0.5], False, 0.0, None),
        ([0.5, 0.4, 0.3, 0.2, 0.1], True, 0.0, None),
        ([0.10, 0.15, 0.19, 0.5, 0.6], False, 0.1, 3),  # each better by less than 0.1
        ([0.60, 0.55, 0.51, 0.2, 0.1], True, 0.1, 3),
        ([0.10, 0.15, 0.25, 0.30, 0.36], False, 0.1, None),  # counted from the best that counted
        ([math.nan, math.nan, 0.3, 0.4, 0.5], False, 0.0, 2),
        ([0.1, math.inf, 0.3, math.nan, 0.5], False, 0.0, None),
    ],
)
def test_early_stopping_ends_after_the_epoch_that_a_hand_made_curve_says(scores, minimize, min_delta, stops_after):
    def epochs(restart: bool) -> int | None:
        stopping = EarlyStopping(2, min_delta, minimize=minimize)
        for epoch, score in enumerate(scores, start=1):
            if restart:
                state, stopping = stopping.state_dict(), EarlyStopping(2, min_delta, minimize=minimize)
                stopping.load_state_dict(state)
            if stopping.update(score):
                return epoch
        return None

    assert epochs(restart=False) == epochs(restart=True) == stops_after


def test_weight_decay_is_for_kernels_and_matrices_alone():
    model = batchnorm_model()
    decayed, others = parameter_groups(model, 0.5)
    assert [parameter.ndim for parameter in decayed["params"]] == [4, 2, 2]
    assert {parameter.ndim for parameter in others["params"]} == {1}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_norms_and_biases_of_any_dimension_have_no_weight_decay():
    norm, odd = nn.LayerNorm([4, 6, 6]), nn.Linear(3, 3)
    odd.my_bias = nn.Parameter(torch.zeros(3, 3))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Embedding(5, 3), nn.GroupNorm(2, 4), odd)
    decayed, others = parameter_groups(model, 0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(one)] for one in decayed["params"]] == ["0.weight", "2.weight", "4.weight"]
    spared = {"0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "4.bias", "4.my_bias"}
    assert {names[id(one)] for one in others["params"]} == spared


def test_what_the_model_itself_fixes_learns_in_no_stage(config, monkeypatch):
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
    assert not torch.equal(states[0]["2.weight"], states[1]["2.weight"])  # the next stage lets it learn


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_frozen_keeps_its_bytes_batch_norm_included_and_the_rest_learns(world_size):
    def changed() -> set[str]:
        model = batchnorm_model()
        freeze(model, ["1", "2"])  # the first convolution and its batch norm
        before = {name: value.clone() for name, value in model.state_dict().items()}
        state = make_state(model)
        state.frozen = ("1", "2")
        train_fn(state, make_loader().epoch(0, 1), LOGGER, CONFIG)
        after = unwrap_model(state.model).state_dict()
        return {name for name in before if not torch.equal(before[name], after[name])}

    names = set(batchnorm_model().state_dict())
    for found in run_ranks(world_size, changed):
        assert found == {name for name in names if name[0] not in "12"}


def test_train_mode_leaves_frozen_modules_in_evaluation_mode():
    model = batchnorm_model()
    train_mode(model.eval(), ["2"])
    assert {name for name, module in model.named_modules() if not module.training} == {"2"}


@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
def test_clipping_equals_torchs_own_on_the_gradient_as_one_vector(clip_norm):
    model = plain_model()
    model(torch.randn(8, CHANNELS, 8, 8)).square().sum().backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    before = torch.cat([parameter.detach().clone().flatten() for parameter in model.parameters()])
    one = nn.Parameter(torch.zeros_like(gradient))
    one.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_([one], clip_norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ours = optimizer_step(optimizer, make_scaler(CPU, "fp32"), clip_norm)
    assert ours.item() == pytest.approx(norm.item(), rel=1e-6)
    after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    np.testing.assert_allclose(before - after, one.grad, rtol=1e-4, atol=1e-5)


def test_sgd_and_adamw_are_torchs_with_nesterov_and_without_decay_on_norms():
    model, stage = plain_model(), Stage("a", 1, 0.1)
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


def test_momentum_that_starts_at_zero_gives_the_steps_of_torch():
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
def test_a_step_without_a_finite_gradient_changes_nothing(gradient):
    weight, optimizer = one_weight(gradient)
    norm = optimizer_step(optimizer, make_scaler(CPU, "fp32"))
    assert not math.isfinite(norm)
    assert weight.item() == 1
    assert weight.grad is None


def test_fp16_overflow_skips_the_step_and_halves_the_scale():
    scaler = make_scaler(CPU, "fp16")
    weight, optimizer = one_weight(0.0)
    start_momentum(optimizer)
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [0.0]  # else what lies there is luck
    scaler.scale(weight.sum() * 1e38).backward()  # 2^16 times that is no float32
    optimizer_step(optimizer, scaler)
    assert weight.item() == 1
    assert scaler.get_scale() == 2**15
    scaler.scale(weight.sum()).backward()
    norm = optimizer_step(optimizer, scaler)
    assert norm.item() == pytest.approx(1.0)  # unscaled
    assert weight.item() == pytest.approx(1 - 0.1 * 1.1)


def test_a_loss_that_is_not_finite_makes_all_gradients_so_where_its_own_would_be_finite():
    weight = nn.Parameter(torch.ones(2))
    batch = Batch(None, None, 0.5, ends_step=True, seed=0)
    loss = weight.sum() + torch.tensor(math.inf)
    assert torch.autograd.grad(loss, weight, retain_graph=True)[0].isfinite().all()
    batch.scale_loss(loss).backward()
    assert weight.grad.isnan().all()


def test_skipped_steps_are_counted_with_their_numbers_and_a_row_goes_on_over_looks():
    watch = GradientMonitor()
    for norm in (1.0, math.nan, math.inf):
        watch.note(torch.tensor(norm))
    assert watch.read(step=7) == [(5, False), (6, True), (7, True)]
    watch.note(torch.tensor(2.0))
    assert (watch.read(step=1), watch.skipped, watch.last) == ([(1, False)], 2, 2.0)
    assert watch.read(step=1) == []


def test_an_input_that_is_not_finite_leaves_the_statistics_of_batch_norm_as_they_were():
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


def test_a_row_of_skipped_steps_that_has_ended_before_the_look_ends_the_run_too(config, monkeypatch):
    monkeypatch.setattr(train, "build_criterion", lambda smoothing=0: Faulty({2, 3, 4, 5, 6}, rank=0))
    end = command(dataclasses.replace(config, limit_batches=12, batch_size=8))
    assert end.code == 1
    assert end.err.startswith("error: 5 steps in a row, up to stage0 1/3 step 6, had no finite gradient")


class Faulty(nn.CrossEntropyLoss):
    """Gives NaN in some of its calls on some rank."""

    def __init__(self, calls: set[int], rank: int) -> None:
        super().__init__()
        self.calls, self.rank, self.called = calls, rank, 0

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.called += 1
        here = not torch.distributed.is_initialized() or torch.distributed.get_rank() == self.rank
        loss = super().forward(logits, targets)
        return loss * math.nan if here and self.called in self.calls else loss


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(monkeypatch):
    def weights() -> np.ndarray:
        monkeypatch.setattr(train, "build_criterion", lambda smoothing: Faulty({2}, rank=1))
        state = make_state(plain_model())
        train_fn(state, make_loader().epoch(0, 1), LOGGER, CONFIG)
        return np.concatenate([value.detach().numpy().ravel() for value in unwrap_model(state.model).parameters()])

    alone = weights()  # step 2 of the same is left out
    monkeypatch.undo()
    first, second = run_ranks(2, weights)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, alone, rtol=1e-5, atol=1e-6)
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
        batch_size=16,  # small data have few steps else
        limit_batches=6,
        logdir=tmp_path / "run",
    )


def command(config: Config, *flags: str):
    """The end of `python train.py` with this config."""
    path = config.data_dir.with_name("config.json")
    path.write_text(json.dumps(to_json(config)))
    return run_train(train.main, Config, "--config", str(path), *flags)


def test_a_few_skipped_steps_are_said_and_counted_and_the_run_goes_on(config, monkeypatch):
    monkeypatch.setattr(train, "build_criterion", lambda smoothing=0: Faulty({2, 3}, rank=0))
    end = command(config)
    assert end.code == 0, end.err
    assert end.out.count("was skipped: its gradient is not finite.") == 6  # two in each of three epochs
    assert "stage0 1/3 step 2 was skipped" in end.out
    assert json.loads((config.logdir / "run.json").read_text())["skipped_steps"] == 6


def test_many_skipped_steps_in_a_row_end_the_run_and_name_their_samples(config, monkeypatch):
    monkeypatch.setattr(train, "build_criterion", lambda smoothing=0: Faulty(set(range(1, 100)), rank=0))
    end = command(config)
    assert end.code == 1
    assert end.err.startswith(
        "error: 5 steps in a row, up to stage0 1/3 step 5, had no finite gradient, so the run ends."
    )
    assert end.err.count("\n") == 1
    steps = json.loads((config.logdir / "skipped.json").read_text())
    assert list(steps) == [f"stage0 1/3 step {step}" for step in range(1, 6)]
    assert {len(samples) for samples in steps.values()} == {config.batch_size}
    known = set(train.load_dataset(config.data_dir).ids)
    assert all(set(samples) <= known for samples in steps.values())
    assert (
        "failed: 5 steps in a row, up to stage0 1/3 step 5, had no finite gradient"
        in json.loads((config.logdir / "run.json").read_text())["exit"]
    )


def test_the_samples_of_a_step_are_those_that_the_model_saw():
    pictures = Pictures(57, CHANNELS)
    pictures.ids = [f"picture_{index}" for index in range(57)]
    loader = train.TrainLoader(pictures, range(57), None, CPU, seed=3, batch_size=16, drop_last=False)
    epoch = loader.epoch(0, 2)
    for step, batch in enumerate(epoch, start=1):
        names = epoch.samples_of(step)
        wanted = torch.stack([pictures.images[pictures.ids.index(name)] for name in names])
        assert torch.equal(batch.images, wanted)


GPU = torch.device("cuda", 0)


class NoWait(SilentLogger):
    """Raises where a step waits for the GPU."""

    def track(self, batches, metrics):
        torch.cuda.set_sync_debug_mode("error")
        yield from batches
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_step_waits_for_the_gpu(precision):
    model = plain_model().cuda()
    config = dataclasses.replace(CONFIG, precision=precision, clip_norm=1.0)
    optimizer = build_optimizer(model, Stage("a", 1, 0.1), config)
    state = TrainState(model, optimizer, make_state(plain_model()).scheduler, make_scaler(GPU, precision))
    state.ema = EMA(model, 0.9)
    loader = train.TrainLoader(Pictures(64, CHANNELS), range(64), None, GPU, seed=0, batch_size=16)
    for epoch in (1, 2):  # the first allocates
        train_fn(state, loader.epoch(0, epoch), NoWait(GPU) if epoch == 2 else SilentLogger(GPU), config)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_its_checkpoint_holds_float32_weights(config, precision):
    end = command(dataclasses.replace(config, precision=precision))
    assert end.code == 0, end.err
    assert f"threads, {precision}\n" in end.out
    saved = torch.load(config.logdir / "stage0/last.pth", weights_only=True)
    assert {value.dtype for value in saved["model_state_dict"].values()} == {torch.float32}
    assert ("scale" in saved["scaler_state_dict"]) == (precision == "fp16")
    assert saved["metrics"]["train"]["loss"] < math.log(10) * 1.5


def test_fp16_overflow_is_said_in_the_run(config, monkeypatch):
    monkeypatch.setattr(train, "make_scaler", lambda *_: torch.amp.GradScaler("cpu", init_scale=2.0**127))
    end = command(dataclasses.replace(config, precision="fp16"))
    assert "stage0 1/3 step 1 was skipped: its gradient overflowed fp16, whose scale is halved." in end.out


def test_a_precision_that_the_device_lacks_is_refused(config, monkeypatch):
    def refuse(*_):
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(torch, "mm", refuse)
    end = command(dataclasses.replace(config, precision="bf16"))
    assert end.code == 2
    assert end.err == "error: --precision bf16 is not for cpu; use fp32 or fp16.\n"


def test_the_log_loss_of_a_wrong_and_certain_prediction_is_its_cross_entropy():
    class Certain(nn.Module):
        def forward(self, images):
            return torch.tensor([[30.0, 0.0, 0.0, 0.0]]).expand(len(images), 4)

    loader = EvalLoader(Pictures(64, CHANNELS), range(64), None, CPU, batch_size=16)
    found = valid_fn(Certain(), loader, LOGGER, dataclasses.replace(CONFIG, scores=("log_loss",)))
    assert found["log_loss"] == pytest.approx(found["loss"], rel=1e-6)  # 22.5: in float32 at most 16


def test_a_new_score_of_which_less_is_better_ranks_by_its_least(config, monkeypatch):
    def brier(_, targets: np.ndarray, probabilities: np.ndarray) -> float:
        return float(((probabilities - np.eye(probabilities.shape[1])[targets]) ** 2).sum(1).mean())

    monkeypatch.setitem(train.SCORES, "brier", brier)
    end = command(dataclasses.replace(config, main_metric="brier", minimize_metric=True))
    assert end.code == 0, end.err
    values = [
        line["valid"]["brier"] for line in map(json.loads, (config.logdir / "metrics.jsonl").read_text().splitlines())
    ]
    assert json.loads((config.logdir / "run.json").read_text())["best"]["score"] == min(values)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_scores_equal_scikit_learns_on_all_predictions_for_any_ranks(world_size):
    from sklearn import metrics

    pictures, names = Pictures(101, CHANNELS), tuple(SCORES)
    model = plain_model().eval()
    with torch.no_grad():
        probabilities = model(train.normalize(pictures.images)).softmax(1).numpy()
    targets = pictures.targets.numpy()
    wanted = {
        "balanced_accuracy": metrics.balanced_accuracy_score(targets, probabilities.argmax(1)),
        "macro_f1": metrics.f1_score(targets, probabilities.argmax(1), average="macro"),
        "log_loss": -np.log(probabilities[range(101), targets]).mean(),
        "roc_auc": np.mean([metrics.roc_auc_score(targets == k, probabilities[:, k]) for k in range(4)]),
    }

    def validate() -> dict[str, float]:
        loader = EvalLoader(pictures, range(101), None, CPU, batch_size=16)
        return valid_fn(make_state(plain_model()).model, loader, LOGGER, dataclasses.replace(CONFIG, scores=names))

    found = run_ranks(world_size, validate)
    for scores in found:
        assert {name: scores[name] for name in names} == pytest.approx(wanted, rel=1e-5)
        assert scores == found[0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_outputs_come_back_in_the_order_of_the_split_for_any_ranks(world_size):
    pictures = Pictures(101, CHANNELS)
    pictures.targets = torch.arange(101)

    def gather() -> np.ndarray:
        outputs = PredictionCollector()
        for images, targets in EvalLoader(pictures, range(101), None, CPU, batch_size=16):
            outputs.add(images, targets)
        images, targets = outputs.gather()
        np.testing.assert_array_equal(images, pictures.images[targets].float())
        return targets

    for targets in run_ranks(world_size, gather):
        np.testing.assert_array_equal(targets, np.arange(101))


def test_a_score_without_a_meaning_is_nan_and_said(caplog):
    pictures = Pictures(20, CHANNELS)
    pictures.targets[pictures.targets == 3] = 0
    loader = EvalLoader(pictures, range(20), None, CPU, batch_size=16)
    scores = valid_fn(plain_model(), loader, LOGGER, dataclasses.replace(CONFIG, scores=("roc_auc",)))
    assert math.isnan(scores["roc_auc"])


def test_validation_is_scored_beside_the_average_and_the_average_ranks(config, monkeypatch):
    scores = {False: iter([0.9, 0.1, 0.2]), True: iter([0.1, 0.5, 0.3])}

    def scripted(model, loader, run, config):
        return {"accuracy": next(scores[not next(model.parameters()).requires_grad]), "loss": 1.0}

    monkeypatch.setattr(train, "valid_fn", scripted)
    end = command(dataclasses.replace(config, ema_decay=0.9))
    assert end.code == 0, end.err
    lines = [json.loads(line) for line in (config.logdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["valid_ema"]["accuracy"] for line in lines] == [0.1, 0.5, 0.3]
    assert torch.load(config.logdir / "stage0/best.pth", weights_only=True)["epoch"] == 2


def test_a_stage_that_stops_early_says_so_and_the_run_goes_on_and_stays_finished(config, monkeypatch):
    scores = iter([0.5, 0.4, 0.9, 0.8])
    monkeypatch.setattr(train, "valid_fn", lambda *_: {"accuracy": next(scores), "loss": 1.0})
    stages = (Stage("stage0", 9, 1e-2), Stage("stage1", 9, 1e-2))
    config = dataclasses.replace(config, stages=stages, patience=1)
    end = command(config)
    assert end.code == 0, end.err
    assert end.out.count("ends early: no better score in 1 epoch.") == 2
    lines = [json.loads(line) for line in (config.logdir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["epoch"]) for line in lines] == [
        *(("stage0", 1), ("stage0", 2), ("stage1", 1), ("stage1", 2))
    ]
    assert "finished already" in command(config, "--resume").out


def test_a_stage_can_start_from_the_last_weights_of_the_one_before(config, monkeypatch):
    scores, started = iter([0.9, 0.1, 0.5]), []

    def note(state, *_):
        started.append(next(state.model.parameters()).detach().clone())
        torch.nn.init.normal_(next(state.model.parameters()))
        return {"loss": 1.0, "accuracy": 0.5}

    monkeypatch.setattr(train, "valid_fn", lambda *_: {"accuracy": next(scores), "loss": 1.0})
    monkeypatch.setattr(train, "train_fn", note)
    monkeypatch.setattr("batteries.run.stage.StageRun.log_epoch", lambda *_, **__: None)
    stages = (Stage("stage0", 2, 1e-2), Stage("stage1", 1, 1e-2, start="last"))

    def run() -> bool:
        train.main(dataclasses.replace(config, stages=stages))
        last = torch.load(config.logdir / "stage0/last.pth", weights_only=True)
        return last["epoch"] == 2 and torch.equal(started[2], next(iter(last["model_state_dict"].values())))

    assert run_ranks(1, run, join=False) == [True]


def test_each_stage_trains_and_validates_on_images_of_its_size(config, monkeypatch):
    class Noting(nn.Sequential):
        def forward(self, images):
            seen.append((self.training, *images.shape[-2:]))
            return super().forward(images)

    seen: list[tuple[bool, int, int]] = []
    monkeypatch.setattr(train, "build_model", lambda num_classes: Noting(tiny_network(num_classes)))
    stages = (Stage("stage0", 1, 1e-2, image_size=12), Stage("stage1", 1, 1e-2, image_size=20))

    def sizes() -> list:
        train.main(dataclasses.replace(config, stages=stages))
        return list(dict.fromkeys(seen))

    assert run_ranks(1, sizes, join=False) == [[(True, 12, 12), (False, 12, 12), (True, 20, 20), (False, 20, 20)]]


def test_out_of_memory_says_how_the_same_steps_fit(config, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train, "train_fn", fail)
    end = command(dataclasses.replace(config, batch_size=48, accumulation_steps=2))
    assert end.code == 2
    assert end.err.startswith(
        "error: cpu has not enough memory for micro-batches of 24 samples; give --accumulation-steps 4 beside "
        "--batch-size 48: micro-batches of 12, and still 48 samples a step."
    )
    shutil.rmtree(config.logdir)
    end = command(dataclasses.replace(config, batch_size=4, accumulation_steps=2))  # one sample is no micro-batch
    assert "for micro-batches of 2 samples; use a smaller model or images, or --precision bf16." in end.err


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_memory_that_a_step_frees_is_there_for_the_next():
    def page_faults_of_40_batches() -> int:
        import resource

        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(40):
            torch.ones(10 * 2**20)  # 40 MiB: 10,240 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def measure() -> int:
        keep_freed_memory()
        return page_faults_of_40_batches()

    [faults] = run_ranks(1, measure)
    assert faults < 40 * 10_240 / 3  # a few, until glibc has found places that it can use in turn


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_memory_that_was_kept_goes_back_after_an_epoch():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def measure() -> tuple[int, int, int]:
        keep_freed_memory()
        return_freed_memory()  # of the tests before: it would take the blocks
        before = resident()
        blocks = [torch.ones(10 * 2**20) for _ in range(5)]  # 40 MiB each
        pin = blocks.pop()  # above the others: they cannot go back by themselves
        blocks.clear()
        kept = resident() - before
        return_freed_memory()
        return kept, resident() - before, pin.nbytes

    [(kept, left, pinned)] = run_ranks(1, measure)
    assert kept > 4 * pinned
    assert left < 2 * pinned


def test_what_learns_at_first_is_what_the_first_stage_does_not_freeze(config, monkeypatch):
    monkeypatch.setattr(train, "build_model", lambda num_classes: nn.Sequential(*tiny_network(num_classes), nn.PReLU()))
    stages = (Stage("stage0", 1, 1e-2, freeze=("3",)), Stage("stage1", 1, 1e-2, freeze=("2",)))
    end = command(dataclasses.replace(config, stages=stages))
    assert end.code == 0, end.err
    total, learning = re.search(r"model    .* ([\d,]+) parameters, ([\d,]+) of them learn at first", end.out).groups()
    assert int(total.replace(",", "")) == int(learning.replace(",", "")) + 1  # a PReLU has one


@pytest.mark.parametrize("steps", [3, 5, 9])
def test_an_epoch_too_short_for_a_profile_is_said(config, steps):
    end = command(dataclasses.replace(config, limit_batches=steps, batch_size=8), "--profile")
    assert end.code == 0, end.err
    assert "--profile wrote no trace: it wants an epoch of 10 steps or more." in end.out


def test_a_profile_is_a_trace_of_a_few_steps(config):
    end = command(dataclasses.replace(config, limit_batches=20, batch_size=8), "--profile")
    assert end.code == 0, end.err
    trace = json.loads((config.logdir / "profile/trace_rank0.json").read_text())
    steps = {event["name"] for event in trace["traceEvents"] if str(event.get("name")).startswith("ProfilerStep")}
    assert len(steps) == 5


def test_pretrained_weights_go_in_where_they_fit_and_the_rest_is_named(tmp_path):
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


def test_pretrained_weights_without_a_place_are_named_and_a_prefix_of_data_parallel_is_taken_off(tmp_path, config):
    model = nn.Sequential(*tiny_network(10), nn.Linear(10, 10))
    torch.save(nn.DataParallel(model).state_dict(), tmp_path / "deeper.pth")
    found = load_pretrained(nn.Sequential(*tiny_network(10)), str(tmp_path / "deeper.pth"))
    assert found == ([], ["3.weight", "3.bias"])
    end = command(config, "--pretrained", str(tmp_path / "deeper.pth"))
    assert end.code == 0, end.err
    assert "; not in the model: 3.weight, 3.bias\n" in end.out


def test_pretrained_weights_of_another_architecture_or_of_no_source_are_refused_on_all_ranks(tmp_path):
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "torn.pth").write_text("torn")

    def message(source: str) -> str:
        with pytest.raises(UserError) as error:
            load_pretrained(plain_model(), source)
        return str(error.value)

    assert "is of another architecture: 0 of 4 tensors fit" in message(str(tmp_path / "other.pth"))
    assert "holds no weights by name" in message(str(tmp_path / "list.pth"))
    assert "cannot be read as weights" in message(str(tmp_path / "torn.pth"))
    said = run_ranks(2, lambda: message("ResNet18_Weights.NOTHING"))
    assert said == [said[0]] * 2
    assert "is neither a file nor a name in torchvision" in said[0]


def test_pretrained_weights_by_name_come_through_torchvision(tmp_path, monkeypatch):
    from torchvision import models

    name = tmp_path / "small.pth"
    torch.save(plain_model().state_dict(), name)
    weights = SimpleNamespace(get_state_dict=lambda **_: torch.hub.load_state_dict_from_url(name.as_uri()))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(models, "get_weight", lambda wanted: {"Small_Weights.DEFAULT": weights}[wanted])
    model = plain_model()
    nn.init.zeros_(model[1].weight)
    assert load_pretrained(model, "Small_Weights.DEFAULT") == ([], [])
    assert torch.equal(model[1].weight, plain_model()[1].weight)
    assert (tmp_path / "home/hub/checkpoints/small.pth").exists()
