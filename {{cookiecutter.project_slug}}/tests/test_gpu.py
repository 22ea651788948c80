"""Guarantees on a GPU: no step waits for it, batch norm is synchronised, an interrupted run resumes bit for bit."""

import copy
import dataclasses
import hashlib
import os
import signal
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from gpus import needs_gpu, run_on_gpu
from image_data import RandomImages
from loops import CONFIG, make_state
from marks import CLASSES_ONLY
from models import CHANNELS, plain_model, tiny_network
from processes import join_ranks
from shard_loops import train_in_shards, train_plainly
from small_data import NEEDS_PATCH, make_data
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import train
from batteries.core.command_line import run_command
from batteries.data.loaders import TrainLoader
from batteries.distributed.connectivity import find_free_port
from batteries.distributed.sync_batchnorm import convert_sync_batchnorm
from batteries.training.ema import EMA
from batteries.training.precision import make_scaler
from batteries.training.state import SilentLogger, TrainState
from batteries.training.wrap import wrap_model
from train import Config, Stage, build_optimizer, train_fn

pytestmark = [needs_gpu, pytest.mark.slow]

GPU = torch.device("cuda", 0)


class RaisesOnSynchronization(SilentLogger):
    """Raises if a step waits for the GPU."""

    def track(self, batches, metrics):
        torch.cuda.set_sync_debug_mode("error")
        yield from batches
        torch.cuda.set_sync_debug_mode("default")


@CLASSES_ONLY
@pytest.mark.parametrize("shards", [None, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_step_waits_for_the_gpu(precision, shards):
    run_on_gpu(train_without_waiting, precision, shards)


def train_without_waiting(precision: str, shards: int | None) -> None:
    model = plain_model().to(GPU)
    config = dataclasses.replace(CONFIG, precision=precision, clip_norm=1.0)
    optimizer = build_optimizer(model, Stage("a", 1, 0.1), config)
    wrapped = wrap_model(model, GPU, shards=shards)
    state = TrainState(wrapped, optimizer, make_state(plain_model()).scheduler, make_scaler(GPU, precision))
    state.ema = EMA(model, 0.9)
    loader = TrainLoader(RandomImages(64, CHANNELS), range(64), None, GPU, seed=0, batch_size=16, shards=shards)
    for epoch in (1, 2):  # the first one allocates memory
        logger = RaisesOnSynchronization(GPU) if epoch == 2 else SilentLogger(GPU)
        train_fn(state, loader.epoch(0, epoch), logger, config)


@CLASSES_ONLY
def test_steps_of_shards_are_repeatable_and_equal_a_plain_loop():
    run_on_gpu(compare_shards_with_plain_loop)


def compare_shards_with_plain_loop() -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # as setup_training does
    torch.use_deterministic_algorithms(True)
    first = train_in_shards(device=GPU)
    assert train_in_shards(device=GPU)["sha256"] == first["sha256"]
    for name, value in train_plainly(GPU).items():
        np.testing.assert_array_equal(first["weights"][name], value, err_msg=name)


class BatchNormAct2d(nn.BatchNorm2d):
    """A subclass with a forward that calls the one of its base class."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's name)
        return torch.relu(super().forward(input))


def convolutions(first_norm: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Conv2d(2, 4, 3), first_norm, nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()


def test_sync_batchnorm_with_a_subclass_matches_torch():
    run_on_gpu(compare_two_ranks)


def compare_two_ranks() -> None:
    context = get_context("spawn")
    port = find_free_port()
    ranks = [context.Process(target=compare_with_torch, args=(rank, port)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]


def compare_with_torch(rank: int, port: int) -> None:
    """Compare a converted subclass with torch's conversion of BatchNorm2d and ReLU.

    Two gloo ranks share one GPU, because nccl needs a GPU for each rank.
    """
    join_ranks(rank, 2, port)
    torch.distributed.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    images = (torch.randn(16, 2, 8, 8, generator=generator, dtype=torch.float64) * 3 + 5).to(GPU)
    targets = torch.randint(3, (16,), generator=generator).to(GPU)
    expected = nn.SyncBatchNorm.convert_sync_batchnorm(convolutions(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())))
    model = convert_sync_batchnorm(convolutions(BatchNormAct2d(4)), GPU)
    assert isinstance(model[1], BatchNormAct2d)
    assert type(copy.deepcopy(model)[1]) is type(model[1])  # as EMA does
    outputs = []
    for network in (expected.to(GPU), model.to(GPU)):
        outputs.append(DistributedDataParallel(network)(images.chunk(2)[rank]))
        nn.functional.cross_entropy(outputs[-1], targets.chunk(2)[rank]).backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-9)
    for buffer, other in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-12, atol=1e-12)
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(NEEDS_PATCH, reason="the small data can only be read in this process")
@pytest.mark.parametrize(
    "flags", [(), ("--precision", "bf16", "--ema-decay", "0.9"), ("--precision", "fp16"), ("--shards", "4")]
)
def test_interrupted_run_on_a_gpu_resumes_bit_identical(tmp_path, flags):
    data = ["--data-dir", str(make_data(tmp_path / "data")), "--split-file", str(tmp_path / "split.csv")]
    flags = [*data, "--batch-size", "8", "--num-workers", "0", "--checkpoint-every-steps", "3", *flags]
    run_on_gpu(train_on_gpu, tmp_path / "whole", flags, None)
    interrupted = tmp_path / "interrupted"
    with pytest.raises(AssertionError):
        run_on_gpu(train_on_gpu, interrupted, flags, 8)
    run_on_gpu(train_on_gpu, interrupted, [*flags, "--resume"], None)
    assert digest(interrupted) == digest(tmp_path / "whole")


def train_on_gpu(logdir: Path, flags: list[str], killed_after: int | None) -> None:
    """Run train.py on the GPU; SIGKILL after so many optimizer steps."""
    train.build_model = tiny_network
    steps = 0

    def optimizer_step(*arguments):
        nonlocal steps
        steps += 1
        if steps == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    original = train.optimizer_step
    train.optimizer_step = optimizer_step
    sys.argv = ["train.py", "--logdir", str(logdir), "--device", "cuda", "--tracker", "none", "--no-report", *flags]
    sys.argv += ["--stages.0.epochs", "2", "--stages.1.epochs", "1", "--limit-batches", "5"]
    run_command(train.main, Config)


def digest(logdir: Path) -> list[str]:
    """The sha256 of metrics.jsonl and of all tensors of the last checkpoint."""
    checkpoint = torch.load(logdir / "stage1/last.pth", map_location="cpu", weights_only=True)
    weights = hashlib.sha256()
    for value in checkpoint["model_state_dict"].values():
        weights.update(value.numpy().tobytes())
    return [hashlib.sha256((logdir / "metrics.jsonl").read_bytes()).hexdigest(), weights.hexdigest()]
