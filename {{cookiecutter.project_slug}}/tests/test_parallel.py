"""L2, elastic-close: one device, many ranks and accumulation end with the same weights. The oracle is a bare loop."""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from loops import CONFIG, CPU, EPOCHS, LOGGER, SIZE, make_loader, make_optimizer, make_state
from models import CHANNELS, batchnorm_model, plain_model
from pictures import Pictures
from processes import run_ranks
from torch import nn

from batteries.core.errors import RunError
from batteries.distributed.process_group import process_group
from batteries.distributed.sync_batchnorm import SyncBatchNormCPU
from batteries.distributed.unwrap import unwrap_model
from batteries.training.wrap import eval_mode
from experiment.augmentations import normalize
from train import train_fn, valid_fn


def train(build: Callable[[], nn.Module], accumulation_steps: int = 1, data_parallel: bool = False) -> dict:
    """The weights and metrics after some epochs of train.py's own loop, on this rank."""
    state = make_state(build(), data_parallel)
    loader = make_loader(accumulation_steps)
    for epoch in range(1, EPOCHS + 1):
        metrics = train_fn(state, loader.epoch(0, epoch), LOGGER, CONFIG)
    with eval_mode(state.model):
        pass  # sends the buffers
    return {"weights": numbers(unwrap_model(state.model)), "metrics": metrics}


def bare_loop(build: Callable[[], nn.Module], micro_batches: int = 1) -> dict:
    """What `train` ought to give, with nothing of ours in it but the data."""
    model = build()
    optimizer, scheduler = make_optimizer(model)
    loader = make_loader()
    for epoch in range(1, EPOCHS + 1):
        losses, correct = 0.0, 0
        for batch in loader.epoch(0, epoch):
            optimizer.zero_grad()
            size = len(batch.targets)
            cuts = [size * part // micro_batches for part in range(micro_batches + 1)]
            for start, stop in pairwise(cuts):
                images, targets = batch.images[start:stop], batch.targets[start:stop]
                logits = model(normalize(images))
                loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
                (loss / size).backward()
                losses += loss.item()
                correct += int((logits.argmax(1) == targets).sum())
            optimizer.step()
            scheduler.step()
    return {"weights": numbers(model), "metrics": {"accuracy": correct / SIZE, "loss": losses / SIZE}}


def numbers(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy().copy() for name, value in model.state_dict().items()}


def assert_close(got: dict, wanted: dict, tolerance: float) -> None:
    """Equal up to `tolerance`, relative to the length of all weights together, and in each metric."""
    assert got["weights"].keys() == wanted["weights"].keys()
    ours, theirs = (np.concatenate([values.ravel() for values in run["weights"].values()]) for run in (got, wanted))
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)
    assert got["metrics"]["accuracy"] == wanted["metrics"]["accuracy"]
    assert got["metrics"]["loss"] == pytest.approx(wanted["metrics"]["loss"], rel=tolerance)


# float32 shows the promise; float64 that only rounding is left of the difference.
TOLERANCES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=str)


@TOLERANCES
@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_ranks_and_accumulation_end_with_the_weights_of_a_bare_loop(
    world_size, accumulation_steps, dtype, tolerance
):
    build = partial(plain_model, dtype)
    wanted = bare_loop(build)
    for got in run_ranks(world_size, lambda: train(build, accumulation_steps)):
        assert_close(got, wanted, tolerance)


@TOLERANCES
@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("world_size", [2, 4])
def test_with_synchronised_batch_norm_any_ranks_end_with_the_weights_of_a_bare_loop(
    world_size, accumulation_steps, dtype, tolerance
):
    # Batch norm sees one micro-batch at a time, so the bare loop accumulates as well.
    build = partial(batchnorm_model, dtype)
    wanted = bare_loop(build, micro_batches=accumulation_steps)
    for got in run_ranks(world_size, lambda: train(build, accumulation_steps)):
        assert_close(got, wanted, tolerance)


def test_one_process_and_data_parallel_without_gpus_end_with_the_weights_of_a_bare_loop():
    wanted = bare_loop(plain_model)
    assert_close(train(plain_model), wanted, 1e-6)
    assert_close(train(plain_model, data_parallel=True), wanted, 1e-6)


def test_without_synchronised_batch_norm_all_ranks_take_rank_0s_statistics_before_validation():
    def statistics() -> np.ndarray:
        state = make_state(batchnorm_model(), sync_batchnorm=False)
        train_fn(state, make_loader().epoch(0, 1), LOGGER, CONFIG)
        with eval_mode(state.model) as network:
            return network[2].running_mean.numpy().copy()

    first, second = run_ranks(2, statistics)
    np.testing.assert_array_equal(first, second)


def test_our_batch_norm_equals_torchs_in_outputs_gradients_and_statistics():
    values = torch.randn(24, 5, 3, generator=torch.Generator().manual_seed(0)) * 3 + 100

    def synchronised() -> tuple:
        part = values.chunk(3)[torch.distributed.get_rank()].clone().requires_grad_()
        module = nn.BatchNorm1d(5)
        module.__class__ = SyncBatchNormCPU
        output = module(part)
        output.pow(3).sum().backward()
        weight_gradient = module.weight.grad.clone()
        torch.distributed.all_reduce(weight_gradient)
        buffers = [module.running_mean, module.running_var]
        return tuple(value.detach().numpy() for value in (output, part.grad, weight_gradient, *buffers))

    whole = values.clone().requires_grad_()
    module = nn.BatchNorm1d(5)
    output = module(whole)
    output.pow(3).sum().backward()
    ranks = run_ranks(3, synchronised)
    compare = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(np.concatenate([rank[0] for rank in ranks]), output.detach(), **compare)
    np.testing.assert_allclose(np.concatenate([rank[1] for rank in ranks]), whole.grad, **compare)
    for rank in ranks:
        np.testing.assert_allclose(rank[2], module.weight.grad, **compare)
        np.testing.assert_allclose(rank[3], module.running_mean, rtol=1e-6)
        np.testing.assert_allclose(rank[4], module.running_var, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_our_batch_norm_takes_statistics_of_halves_in_float32_as_torch_does(dtype):
    values = (torch.randn(24, 5, 40, generator=torch.Generator().manual_seed(0)) * 30 + 100).to(dtype)

    def synchronised() -> tuple:
        module = nn.BatchNorm1d(5)
        module.__class__ = SyncBatchNormCPU
        output = module(values.chunk(2)[torch.distributed.get_rank()])
        return output.dtype, output.detach().float().numpy(), module.running_mean.numpy(), module.running_var.numpy()

    module = nn.BatchNorm1d(5)
    output = module(values).detach().float()
    ranks = run_ranks(2, synchronised)
    np.testing.assert_allclose(np.concatenate([rank[1] for rank in ranks]), output, atol=0.02)
    for rank in ranks:
        assert rank[0] == dtype
        np.testing.assert_allclose(rank[2], module.running_mean, rtol=1e-6)
        np.testing.assert_allclose(rank[3], module.running_var, rtol=1e-5)


def test_no_rank_goes_on_before_all_have_joined(monkeypatch):
    joined, init = get_context("fork").Event(), torch.distributed.init_process_group

    def init_slowly(backend: str) -> None:
        init(backend)
        if os.environ["RANK"] == "1":
            time.sleep(0.5)  # long enough for a rank that would not wait
            joined.set()

    monkeypatch.setattr(torch.distributed, "init_process_group", init_slowly)
    assert run_ranks(2, joined.is_set) == [True, True]


def test_a_rank_forks_only_when_no_thread_is_about_to_enter_python_where_python_does_not_see_to_that(monkeypatch):
    def fork() -> int:
        waits = []
        monkeypatch.setattr(sys, "_current_frames", lambda: waits.append(1))
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        return len(waits)

    assert run_ranks(1, fork) == [1 if sys.version_info < (3, 11, 8) else 0]


def test_a_rank_whose_launcher_was_killed_while_it_started_ends(monkeypatch):
    def join() -> str:
        try:
            with process_group(torch.device("cpu")):
                return "joined"
        except RunError as error:
            return str(error)

    monkeypatch.setenv("BATTERIES_LAUNCHER", "1")
    assert run_ranks(1, join, join=False) == ["the launcher has gone, and its processes end with it."]
    monkeypatch.setenv("BATTERIES_LAUNCHER", str(os.getpid()))
    assert run_ranks(1, join, join=False) == ["joined"]


def test_gradients_are_exchanged_once_a_step_and_not_for_each_micro_batch():
    def exchanges() -> tuple[int, int]:
        counted = []

        def count(state: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
            counted.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        state = make_state(plain_model())
        state.model.register_comm_hook(None, count)
        loader = make_loader(accumulation_steps=4)
        train_fn(state, loader.epoch(0, 1), LOGGER, CONFIG)
        return len(counted), len(loader)

    assert run_ranks(2, exchanges) == [(4, 4), (4, 4)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_scores_equal_a_plain_computation_for_any_ranks(world_size):
    from batteries.data.loaders import EvalLoader

    pictures = Pictures(101, CHANNELS)
    model = plain_model().eval()
    with torch.no_grad():
        logits = model(normalize(pictures.images))
    accuracy = (logits.argmax(1) == pictures.targets).double().mean().item()
    loss = nn.functional.cross_entropy(logits.double(), pictures.targets).item()

    def validate() -> dict[str, float]:
        loader = EvalLoader(pictures, range(101), None, CPU, batch_size=64)
        return valid_fn(make_state(plain_model()).model, loader, LOGGER, CONFIG)

    for metrics in run_ranks(world_size, validate):
        assert metrics["accuracy"] == accuracy
        assert metrics["loss"] == pytest.approx(loss, rel=1e-6)


def test_dropout_follows_from_the_position_and_not_from_what_was_drawn_before():
    def weights(disturb: bool) -> dict[str, np.ndarray]:
        state = make_state(nn.Sequential(*plain_model(), nn.Dropout(0.5)))
        for epoch in (1, 2):
            if disturb:
                torch.rand(epoch * 7)
            train_fn(state, make_loader().epoch(0, epoch), LOGGER, CONFIG)
        return numbers(state.model)

    quiet, disturbed = weights(disturb=False), weights(disturb=True)
    for name, values in quiet.items():
        np.testing.assert_array_equal(disturbed[name], values)
