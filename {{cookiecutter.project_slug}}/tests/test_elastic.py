"""With --shards, any number of processes gives the same bits, compared with each other and with a plain loop."""

import copy
import dataclasses
import hashlib
import itertools
import json
import random
import shutil
import time
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from documents import WITHOUT_REPORT, code_blocks, commands, copy_repository, read_page, run_commands
from image_data import RandomImages
from interrupted_runs import digest, finish, kill_after, small_run
from loops import CONFIG, CPU, LOGGER
from marks import CLASSES_ONLY
from models import CHANNELS, dropout_network
from processes import End, run_ranks, run_train
from shard_loops import (
    BATCH_SIZE,
    SHARDS,
    SIZE,
    add_in_tree,
    build_network,
    make_loader,
    make_state,
    train_in_shards,
    train_plainly,
)
from small_data import NEEDS_PATCH, make_data
from torch import nn
from torch.testing import assert_close

import train
from batteries.core.config_io import to_json
from batteries.core.errors import RunError, UserError
from batteries.core.exact_sum import ExactSum
from batteries.core.ranks import rank
from batteries.data.loaders import EvalLoader, TrainLoader
from batteries.distributed import tree_sum
from batteries.distributed.tree_sum import TreeSum, broadcast_in_buckets, tree_sum_over_ranks
from batteries.distributed.unwrap import unwrap_model
from batteries.run.messages import advise_out_of_memory
from batteries.run.metadata import describe_environment_changes, versions
from batteries.training.sharding import ShardedModel
from batteries.training.wrap import check_batchnorm, check_wrapping
from train import Config, Stage, train_fn, valid_fn


@CLASSES_ONLY
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_weights_and_batchnorm_statistics_equal_a_plain_loop_over_shards(world_size):
    expected = train_plainly()
    for actual in run_ranks(world_size, train_in_shards):
        assert actual["weights"].keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(actual["weights"][name], value, err_msg=name)


class Failing(nn.Module):
    """A network whose output is NaN for some shards."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = dropout_network(num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs = self.network(images)
        return outputs * float("nan") if images.double().sum() * 1000 % 9 < 1 else outputs


class Skipping(nn.Module):
    """Skips a layer and a batch norm for some shards, never uses another layer, and counts its calls in a buffer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(CHANNELS * 16, 16))
        self.sometimes = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16, momentum=None))
        self.never = nn.Linear(16, 16)
        self.last = nn.Linear(16, num_classes)
        self.register_buffer("last_mean", torch.zeros(()))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = self.first(images)
        if torch.rand(()) < 0.4:
            values = self.sometimes(values).relu()
        self.last_mean = values.detach().mean()  # a new tensor
        return self.last(values + self.last_mean)


OPTIONS: dict[str, dict[str, Any]] = {
    "mixup": {"mixup": 0.4},
    "clipping": {"config": dataclasses.replace(CONFIG, clip_norm=0.1)},
    "bf16": {"config": dataclasses.replace(CONFIG, precision="bf16")},
    "fp16, with steps that overflow": {"config": dataclasses.replace(CONFIG, precision="fp16")},
    "steps that are not finite": {"network": Failing},
    "layers that are skipped": {"network": Skipping},
}


@CLASSES_ONLY
@pytest.mark.parametrize("option", OPTIONS)
def test_number_of_processes_changes_no_bit_with(option):
    [expected] = run_ranks(1, partial(train_in_shards, **OPTIONS[option]))
    plain = train_in_shards()
    assert expected["sha256"] != plain["sha256"]  # the option has an effect
    assert (0 < expected["steps"] < plain["steps"]) == ("steps" in option)
    for world_size in (2, 4):
        for actual in run_ranks(world_size, partial(train_in_shards, **OPTIONS[option])):
            assert actual["sha256"] == expected["sha256"]


@CLASSES_ONLY
def test_accumulation_and_workers_change_no_bit():
    expected = train_in_shards(mixup=0.4)["sha256"]
    assert train_in_shards(mixup=0.4, accumulation_steps=2)["sha256"] == expected
    assert train_in_shards(mixup=0.4, num_workers=2)["sha256"] == expected
    for actual in run_ranks(2, lambda: train_in_shards(mixup=0.4, accumulation_steps=3, num_workers=1)):
        assert actual["sha256"] == expected


@CLASSES_ONLY
def test_unused_parameters_get_no_gradient_and_others_the_sum_over_the_shards_that_use_them():
    def train_skipping() -> list[bool]:
        state = make_state(build_network(Skipping))
        train_fn(state, make_loader().epoch(0, 1), LOGGER, CONFIG)
        return [parameter in state.optimizer.state for parameter in unwrap_model(state.model).parameters()]

    names = [name for name, _ in build_network(Skipping).named_parameters()]
    for trained in run_ranks(2, train_skipping):
        assert [name for name, is_trained in zip(names, trained, strict=True) if not is_trained] == [
            "never.weight",
            "never.bias",
        ]


@pytest.mark.parametrize("leaves", [1, 2, 4, 8, 16])
def test_tree_sum_adds_in_a_balanced_tree_and_keeps_few_partial_sums(leaves):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(50, generator=generator) * 10 ** (number % 5) for number in range(leaves)]
    tree = TreeSum()
    for number, value in enumerate(values, start=1):
        tree.add([value.clone(), value.clone() * 3])
        assert len(tree._partial_sums) == bin(number).count("1")
    count, (first, second) = tree.take()
    assert count == leaves
    assert torch.equal(first, add_in_tree(values))
    assert torch.equal(second, add_in_tree([value * 3 for value in values]))
    assert tree.is_empty
    if leaves > 2:
        assert not torch.equal(first, torch.stack(values).sum(0))  # the order matters for these values


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("bucket_bytes", [8, 25 * 2**20])
def test_tree_sum_over_ranks_equals_a_recursive_sum(world_size, bucket_bytes, monkeypatch):
    monkeypatch.setattr(tree_sum, "BUCKET_BYTES", bucket_bytes)

    def values_of(rank: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(rank)
        shapes = [((3, 7), torch.float32), ((), torch.float32), ((5,), torch.float64), ((2, 3, 2, 2), torch.float32)]
        return [torch.randn(shape, generator=generator, dtype=kind) * 10**rank for shape, kind in shapes]

    def add() -> list[np.ndarray]:
        tensors = values_of(int(torch.distributed.get_rank()) if torch.distributed.is_initialized() else 0)
        tensors[3] = tensors[3].to(memory_format=torch.channels_last)
        tree_sum_over_ranks(tensors)
        assert tensors[3].is_contiguous(memory_format=torch.channels_last)
        return [tensor.numpy().copy() for tensor in tensors]

    expected = [add_in_tree(terms) for terms in zip(*map(values_of, range(world_size)), strict=True)]
    for results in run_ranks(world_size, add):
        for actual, value in zip(results, expected, strict=True):
            np.testing.assert_array_equal(actual, value)


def test_buffers_of_any_dtype_are_broadcast():
    def send() -> list[Any]:
        is_first = torch.distributed.get_rank() == 0
        tensors = [
            torch.tensor([is_first, True]),
            torch.tensor(7 if is_first else 8),
            torch.full((2, 2), 0.1 + is_first),
        ]
        broadcast_in_buckets(tensors)
        return [tensor.tolist() for tensor in tensors]

    first, second = run_ranks(2, send)
    assert first == second == [[True, True], 7, torch.full((2, 2), 1.1).tolist()]


def test_exact_sum_equals_fractions_in_any_order():
    generator = np.random.default_rng(0)
    for shape in [(), (3,), (2, 2)] * 5:
        terms = [generator.normal(size=shape) * 10.0 ** generator.integers(-18, 18, size=shape) for _ in range(40)]
        total = ExactSum(terms)
        columns = np.array(terms).reshape(len(terms), -1).T.tolist()
        exact = [sum(map(Fraction, column)) for column in columns]
        np.testing.assert_array_equal(total.value().ravel(), [float(value) for value in exact])
        parts = np.array(total.parts())
        for column, value in zip(parts.reshape(len(parts), -1).T.tolist(), exact, strict=True):
            assert sum(map(Fraction, column)) == value
        np.testing.assert_array_equal(parts, ExactSum(terms[::-1]).parts())


@pytest.mark.parametrize(("terms", "total"), [([], 0), ([1, np.inf, 2], np.inf), ([np.inf, -np.inf], np.nan)])
def test_exact_sum_of_no_terms_and_of_infinite_ones(terms, total):
    np.testing.assert_array_equal(ExactSum(terms).value(), total)
    np.testing.assert_array_equal(ExactSum(terms).parts(), [total])


class Drifting(nn.Module):
    """Changes a buffer, adds another one and draws random numbers, in evaluation mode too."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = dropout_network(num_classes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.register_buffer("last_batch", images[:, 0].detach().float())
        return self.network(images) + self.calls + torch.rand(()) * len(self._buffers)


@CLASSES_ONLY
@pytest.mark.parametrize("network", [dropout_network, Drifting])
@pytest.mark.parametrize("world_size", [2, 3])
def test_validation_metrics_are_equal_to_the_last_bit_for_any_number_of_processes(world_size, network):
    def validate() -> dict[str, float]:
        loader = EvalLoader(RandomImages(SIZE, CHANNELS), range(SIZE), None, CPU, batch_size=6)
        model = build_network(network)
        before = copy.deepcopy(model.state_dict())
        torch.manual_seed(rank())  # the state of the generators before has no effect
        metrics = valid_fn(model, loader, LOGGER, CONFIG)
        assert_close(model.state_dict(), before, rtol=0, atol=0)
        return metrics

    expected = validate()
    assert all(actual == expected for actual in run_ranks(world_size, validate))


def test_each_shard_of_an_epoch_has_its_own_seed_for_any_number_of_processes():
    def seeds() -> list[int]:
        return [batch.seed for batch in make_loader().epoch(0, 1)]

    expected = np.array(seeds(), dtype=np.uint64).reshape(-1, SHARDS)  # a row for each step
    assert len(np.unique(expected)) == expected.size
    first, second = run_ranks(2, seeds)
    half = SHARDS // 2
    assert first == expected[:, :half].ravel().tolist()
    assert second == expected[:, half:].ravel().tolist()


def test_shard_is_mixed_within_itself_with_its_own_draw():
    [step] = [list(make_loader(mixup=0.4).epoch(0, 1))[:SHARDS]]
    plain = list(make_loader().epoch(0, 1))[:SHARDS]
    kept = []
    for mixed, shard in zip(step, plain, strict=True):
        classes = torch.eye(4)[shard.targets]
        partners = classes.roll(1, 0)
        differs = (classes != partners).any(1)
        fraction = float((mixed.targets - partners)[differs].max())
        kept.append(fraction)
        torch.testing.assert_close(mixed.targets, fraction * classes + (1 - fraction) * partners)
        images = shard.images.float()
        torch.testing.assert_close(mixed.images, fraction * images + (1 - fraction) * images.roll(1, 0))
    assert len(set(kept)) == SHARDS


def test_peek_returns_mixed_samples_as_training_gets_them():
    epoch = make_loader(mixup=0.4).epoch(0, 1)
    originals, images, targets = epoch.peek(12)
    shards = list(epoch)[:2]
    assert len(originals) == 12
    assert torch.equal(images, torch.cat([shard.images for shard in shards])[:12])
    assert torch.equal(targets, torch.cat([shard.targets for shard in shards])[:12])


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(monkeypatch, data_dir, tmp_path) -> Config:
    monkeypatch.setattr(train, "build_model", dropout_network)
    first = next(name for name, child in dropout_network(2).named_children() if list(child.parameters()))
    stages = (Stage("stage0", 2, 1e-2), Stage("stage1", 2, 1e-3, "plateau", freeze=(first,)))
    return small_run(tmp_path, data_dir, stages=stages, shards=8, checkpoint_every_steps=3)


def files_of(config: Config, world_size: int) -> dict[str, str]:
    """Return the sha256 of all checkpoints and of metrics.jsonl of a run, which is then deleted."""
    finish(config, world_size)
    files = [*config.logdir.glob("stage*/*.pth"), config.logdir / "metrics.jsonl"]
    hashes = {str(file.relative_to(config.logdir)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    shutil.rmtree(config.logdir)
    return hashes


def test_checkpoint_files_and_metrics_are_byte_identical_for_any_number_of_processes(config):
    expected = files_of(config, 1)
    assert len(expected) > 4
    for world_size in (2, 4, 8):
        assert files_of(config, world_size) == expected


@pytest.mark.slow
def test_state_is_identical_for_any_processes_accumulation_and_workers(config):
    digests = set()
    for world_size, steps, workers in itertools.product((1, 2, 4, 8), (1, 2), (0, 2)):
        finish(dataclasses.replace(config, accumulation_steps=steps, num_workers=workers), world_size)
        digests.add(json.dumps(digest(config.logdir), sort_keys=True))
        shutil.rmtree(config.logdir)
    assert len(digests) == 1


@pytest.mark.slow
@pytest.mark.skipif(NEEDS_PATCH, reason="the test data can be read in this process only")
@pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts need bash")
def test_commands_of_the_page_show_equal_bits(tmp_path):
    copy = copy_repository(tmp_path / "copy")
    run_commands(commands("docs/elastic.md"), copy, f"{WITHOUT_REPORT} --batch-size 32")
    [comparison] = code_blocks(read_page("docs/elastic.md"), "sh")
    assert run_commands(comparison, copy).stdout == "equal\nTrue\n"


@pytest.mark.parametrize("runs", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_run_killed_at_random_instants_continues_with_other_numbers_of_processes(config, runs):
    uninterrupted = dataclasses.replace(config, logdir=config.logdir.with_name("uninterrupted"))
    begin = time.monotonic()
    finish(uninterrupted, 4)
    seconds = time.monotonic() - begin
    expected = digest(uninterrupted.logdir)
    rng = random.Random(runs)
    for _ in range(runs):
        for world_size in (4, 2, 1):
            kill_after(rng.uniform(0.2, 1) * seconds, config, world_size)
        finish(config, 4)
        assert digest(config.logdir) == expected
        shutil.rmtree(config.logdir)


def run_with(config: Config, **changes: Any) -> End:
    path = config.logdir.with_name("config.json")
    path.write_text(json.dumps(to_json(dataclasses.replace(config, **changes))))
    return run_train(train.main, Config, "--config", str(path), *(["--resume"] if config.resume else []))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": 6}, "--shards 6 must be a power of two; use 4 or 8."),
        ({"batch_size": 36}, "--batch-size 36 must be a multiple of 8 (--shards); use 32 or 40."),
        (
            {"data_parallel": True},
            "--shards and --data-parallel exclude each other; use scripts/train_ddp.sh with --shards.",
        ),
        (
            {"compile": True},
            "--shards and --compile exclude each other: compiled kernels may round differently; remove one.",
        ),
        ({"deterministic": False}, "--shards needs deterministic kernels; remove --no-deterministic."),
        (
            {"shards": 32},
            "--shards 32 results in shards of one sample, and batch norm needs two or more; use fewer shards or a "
            "larger --batch-size.",
        ),
    ],
    ids=str,
)
def test_impossible_shards_are_rejected_and_nothing_is_written(config, changes, message):
    end = run_with(config, **changes)
    assert (end.code, end.err) == (2, f"error: {message}\n")
    assert not config.logdir.exists()


def test_last_step_with_fewer_samples_than_shards_is_rejected():
    with pytest.raises(UserError) as error:
        TrainLoader(RandomImages(67), range(67), None, CPU, seed=0, batch_size=32, shards=4, drop_last=False)
    assert str(error.value) == (
        "--batch-size 32 leaves 3 samples for the last step of an epoch, fewer than the 4 shards; use --drop-last or "
        "another --batch-size."
    )


def test_number_of_processes_that_does_not_divide_the_shards_is_rejected_with_the_possible_ones():
    def check() -> str:
        with pytest.raises(UserError) as error:
            check_wrapping(CPU, data_parallel=False, compiled=False, shards=8)
        return str(error.value)

    expected = "--shards 8 cannot be divided by 3 processes; use a number of these (NPROC): 1, 2, 4, 8."
    assert run_ranks(3, check) == [expected] * 3


def test_resume_with_another_number_of_processes_warns_only_without_shards():
    saved = {"world_size": 2, "threads": torch.get_num_threads(), "versions": versions(), "gpu": None}
    [message] = describe_environment_changes(saved, CPU)
    assert message.startswith("Changed since the run was saved: processes 2 -> 1.")
    assert describe_environment_changes(saved | {"world_size": None}, CPU) == []


def test_resume_on_another_gpu_or_build_warns():
    saved = {
        "world_size": None,
        "threads": torch.get_num_threads(),
        "versions": versions() | {"cudnn": "1"},
        "gpu": "A",
    }
    [message] = describe_environment_changes(saved, CPU)
    assert message == (
        f"Changed since the run was saved: cudnn 1 -> {versions()['cudnn']}, GPU A -> None. "
        "The results are equal up to rounding, not bit-identical."
    )


def test_shards_are_stated_at_the_start_and_in_the_advice_after_running_out_of_memory(config):
    end = run_with(config, stages=config.stages[:1])
    assert end.code == 0, end.err
    assert "32 samples per step in 8 shards" in end.out
    assert "--shards 16, a smaller model" in advise_out_of_memory(config, CPU)


def test_sharded_run_uses_one_thread_on_a_cpu(config):
    # The number of threads changes the rounding of kernels, and one process has more of them than each of several.
    def threads() -> int:
        torch.set_num_threads(2)
        train.main(dataclasses.replace(config, stages=config.stages[:1]))
        return torch.get_num_threads()

    assert run_ranks(1, threads, join=False) == [1]


def test_batchnorm_needs_two_samples_in_each_shard():
    loader = TrainLoader(RandomImages(SIZE), range(SIZE), None, CPU, seed=0, batch_size=BATCH_SIZE, shards=16)
    check_batchnorm(dropout_network(4), loader, synchronised=False)
    loader = TrainLoader(RandomImages(SIZE), range(SIZE), None, CPU, seed=0, batch_size=BATCH_SIZE, shards=32)
    check_batchnorm(nn.Linear(1, 1), loader, synchronised=False)
    with pytest.raises(UserError, match="--shards 32 results in shards of one sample"):
        check_batchnorm(dropout_network(4), loader, synchronised=True)


ADDED_BUFFER = (
    "the forward pass adds the buffer 1.extra, or changes its shape or type, and --shards needs fixed ones; create it "
    "in __init__, or train without --shards."
)
CHANGED_PARAMETER = (
    "the forward pass changes the parameter 1.weight (as nn.Embedding with max_norm does), and with --shards only the "
    "optimizer may; remove that, or train without --shards."
)


class Adding(nn.Linear):
    """Has a buffer whose shape depends on the number of samples."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.register_buffer("extra", torch.zeros(len(values)))
        return super().forward(values)


class Rescaling(nn.Linear):
    """Changes its weight in the forward pass."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.mul_(0.5)
        return super().forward(values)


class Normalising(nn.Linear):
    """Changes its weight without a new version of the tensor."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.weight.data = self.weight.data * 0.5
        return super().forward(values)


class Sparse(nn.Module):
    """Has a sparse gradient."""

    def __init__(self, *_: int) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 1, sparse=True)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.table(values.long()[:, 0])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Adding, ADDED_BUFFER),
        (Rescaling, CHANGED_PARAMETER),
        (Normalising, CHANGED_PARAMETER),
        (Sparse, "a gradient is sparse, which --shards does not support; set sparse=False in nn.Embedding."),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_model_that_the_shards_of_other_ranks_would_not_see_is_rejected(world_size, layer, message):
    def train_shard() -> str:
        model = ShardedModel(nn.Sequential(nn.ReLU(), layer(1, 1)))
        with pytest.raises(RunError) as error, model.shard(ends_step=True):
            model(torch.ones(4, 1)).sum().backward()
        return str(error.value)

    assert run_ranks(world_size, train_shard) == [message] * world_size


def test_batchnorm_of_all_processes_is_rejected():
    with pytest.raises(UserError, match=r"the layer 1 is an nn\.SyncBatchNorm, .*; use nn\.BatchNorm2d"):
        ShardedModel(nn.Sequential(nn.ReLU(), nn.SyncBatchNorm(2)))


class NoisySGD(torch.optim.SGD):
    """Adds noise to the gradients."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.add_(torch.randn_like(parameter), alpha=0.1)
        return super().step(closure)


@CLASSES_ONLY
def test_random_numbers_of_the_optimizer_are_equal_for_any_number_of_processes():
    def train_with_noise() -> list[float]:
        state = make_state(build_network(dropout_network))
        state.optimizer = NoisySGD(state.optimizer.param_groups, lr=0.1)
        train_fn(state, make_loader().epoch(0, 1), LOGGER, CONFIG)
        return torch.cat([value.flatten() for value in unwrap_model(state.model).parameters()]).tolist()

    [expected] = run_ranks(1, train_with_noise)
    assert run_ranks(2, train_with_noise) == [expected] * 2
