"""Any number of ranks and accumulation steps ends with the same weights, compared with a plain training loop."""

import copy
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
from image_data import RandomImages
from loops import CONFIG, CPU, EPOCHS, LOGGER, SIZE, make_loader, make_optimizer, make_state
from marks import CLASSES_ONLY
from models import CHANNELS, batchnorm_model, plain_model
from processes import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batteries.core.errors import RunError, UserError
from batteries.data.loaders import EvalLoader
from batteries.distributed.process_group import process_group
from batteries.distributed.sync_batchnorm import SyncBatchNormCPU, SyncedForward, convert_sync_batchnorm
from batteries.distributed.unwrap import unwrap_model
from batteries.training.wrap import eval_mode
from experiment.augmentations import normalize
from train import train_fn, valid_fn


def train(
    build: Callable[[], nn.Module],
    accumulation_steps: int = 1,
    data_parallel: bool = False,
    find_unused_parameters: bool = False,
) -> dict:
    """Train some epochs with train_fn; return the weights and metrics of this rank."""
    state = make_state(build(), data_parallel, find_unused_parameters=find_unused_parameters)
    loader = make_loader(accumulation_steps)
    for epoch in range(1, EPOCHS + 1):
        metrics = train_fn(state, loader.epoch(0, epoch), LOGGER, CONFIG)
    with eval_mode(state.model):
        pass  # broadcasts the buffers
    return {"weights": to_numpy(unwrap_model(state.model)), "metrics": metrics}


def train_plainly(build: Callable[[], nn.Module], micro_batches: int = 1) -> dict:
    """Return what `train` must return, from a plain loop that uses only the data of the project."""
    model = build()
    optimizer, scheduler = make_optimizer(model)
    loader = make_loader()
    for epoch in range(1, EPOCHS + 1):
        total_loss = 0.0
        correct = 0
        for batch in loader.epoch(0, epoch):
            optimizer.zero_grad()
            size = len(batch.targets)
            bounds = [size * number // micro_batches for number in range(micro_batches + 1)]
            for start, stop in pairwise(bounds):
                images = batch.images[start:stop]
                targets = batch.targets[start:stop]
                logits = model(normalize(images))
                loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
                (loss / size).backward()
                total_loss += loss.item()
                correct += int((logits.argmax(1) == targets).sum())
            optimizer.step()
            scheduler.step()
    return {"weights": to_numpy(model), "metrics": {"accuracy": correct / SIZE, "loss": total_loss / SIZE}}


def to_numpy(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy().copy() for name, value in model.state_dict().items()}


def assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    """Assert equality up to `tolerance`, relative to the norm of all weights and to the loss."""
    assert actual["weights"].keys() == expected["weights"].keys()
    actual_weights = np.concatenate([values.ravel() for values in actual["weights"].values()])
    expected_weights = np.concatenate([values.ravel() for values in expected["weights"].values()])
    assert np.linalg.norm(actual_weights - expected_weights) <= tolerance * np.linalg.norm(expected_weights)
    assert actual["metrics"]["accuracy"] == expected["metrics"]["accuracy"]
    assert actual["metrics"]["loss"] == pytest.approx(expected["metrics"]["loss"], rel=tolerance)


# float32 is what users train with; float64 shows that the difference is only rounding.
TOLERANCES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=str)


@CLASSES_ONLY
@TOLERANCES
@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_and_accumulation_do_not_change_the_weights(world_size, accumulation_steps, dtype, tolerance):
    build = partial(plain_model, dtype)
    expected = train_plainly(build)
    for actual in run_ranks(world_size, lambda: train(build, accumulation_steps)):
        assert_close(actual, expected, tolerance)


@CLASSES_ONLY
@TOLERANCES
@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_do_not_change_the_weights_with_sync_batchnorm(world_size, accumulation_steps, dtype, tolerance):
    # Batch norm normalises one micro-batch at a time, so the plain loop accumulates as well.
    build = partial(batchnorm_model, dtype)
    expected = train_plainly(build, micro_batches=accumulation_steps)
    for actual in run_ranks(world_size, lambda: train(build, accumulation_steps)):
        assert_close(actual, expected, tolerance)


class SkippingModel(nn.Module):
    """Skips a layer for some batches, and never uses another one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Sequential(nn.Conv2d(CHANNELS, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 8))
        self.sometimes = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)
        self.last = nn.Linear(8, 4)
        self.double()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = self.first(images.double())
        if images.double().sum() * 1000 % 2 < 1:
            values = values + self.sometimes(values).relu()
        return self.last(values)


@CLASSES_ONLY
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_ranks_that_use_different_parameters_equal_a_plain_loop(accumulation_steps):
    expected = train_plainly(SkippingModel, micro_batches=2 * accumulation_steps)
    for actual in run_ranks(2, lambda: train(SkippingModel, accumulation_steps, find_unused_parameters=True)):
        assert_close(actual, expected, 1e-13)


@CLASSES_ONLY
def test_unused_parameters_are_named_with_the_option_that_allows_them():
    class Unused(SkippingModel):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(images.double()))

    def fail() -> str:
        with pytest.raises(RunError) as error:
            train(Unused)
        return str(error.value)

    for message in run_ranks(2, fail):
        assert "sometimes.weight, sometimes.bias, never.weight, never.bias. Give --find-unused-parameters if" in message


@CLASSES_ONLY
def test_single_process_and_data_parallel_without_gpus_equal_a_plain_loop():
    expected = train_plainly(plain_model)
    assert_close(train(plain_model), expected, 1e-6)
    assert_close(train(plain_model, data_parallel=True), expected, 1e-6)


@CLASSES_ONLY
def test_rank_0_broadcasts_batchnorm_statistics_before_validation():
    def statistics() -> np.ndarray:
        state = make_state(batchnorm_model(), sync_batchnorm=False)
        train_fn(state, make_loader().epoch(0, 1), LOGGER, CONFIG)
        with eval_mode(state.model) as network:
            return network[2].running_mean.numpy().copy()

    first, second = run_ranks(2, statistics)
    np.testing.assert_array_equal(first, second)


def make_batchnorm(bias: bool) -> nn.BatchNorm1d:
    """Build a batch norm; without bias as nn.BatchNorm1d(5, bias=False) of torch 2.15 does."""
    module = nn.BatchNorm1d(5)
    if not bias:
        module.bias = None
    return module


@pytest.mark.parametrize("bias", [True, False])
def test_sync_batchnorm_matches_torch_in_outputs_gradients_and_statistics(bias):
    values = torch.randn(24, 5, 3, generator=torch.Generator().manual_seed(0)) * 3 + 100

    def synchronised() -> tuple:
        chunk = values.chunk(3)[torch.distributed.get_rank()].clone().requires_grad_()
        module = convert_sync_batchnorm(make_batchnorm(bias), CPU)
        output = module(chunk)
        output.pow(3).sum().backward()
        weight_gradient = module.weight.grad.clone()
        torch.distributed.all_reduce(weight_gradient)
        tensors = [output, chunk.grad, weight_gradient, module.running_mean, module.running_var]
        return tuple(tensor.detach().numpy() for tensor in tensors)

    batch = values.clone().requires_grad_()
    module = make_batchnorm(bias)
    output = module(batch)
    output.pow(3).sum().backward()
    ranks = run_ranks(3, synchronised)
    np.testing.assert_allclose(np.concatenate([rank[0] for rank in ranks]), output.detach(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([rank[1] for rank in ranks]), batch.grad, rtol=1e-4, atol=1e-5)
    for rank in ranks:
        np.testing.assert_allclose(rank[2], module.weight.grad, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(rank[3], module.running_mean, rtol=1e-6)
        np.testing.assert_allclose(rank[4], module.running_var, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sync_batchnorm_computes_half_precision_statistics_in_float32(dtype):
    values = (torch.randn(24, 5, 40, generator=torch.Generator().manual_seed(0)) * 30 + 100).to(dtype)

    def synchronised() -> tuple:
        module = convert_sync_batchnorm(nn.BatchNorm1d(5), CPU)
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


class BatchNormAct2d(nn.BatchNorm2d):
    """Batch norm with a ReLU, as in several model libraries."""

    def __init__(self, num_features: int, scale: float) -> None:
        super().__init__(num_features)
        self.scale = scale
        self.activation = nn.ReLU()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scale * self.activation(super().forward(images))


class FunctionalBatchNormAct2d(BatchNormAct2d):
    """Calls F.batch_norm itself, as timm does."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.num_batches_tracked.add_(self.training)
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        images = nn.functional.batch_norm(images, *statistics, self.training, self.momentum, self.eps)
        return self.scale * self.activation(images)


class TorchBatchNormAct2d(BatchNormAct2d):
    """Calls torch.batch_norm, whose arguments have another order."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.num_batches_tracked.add_(self.training)
        state = self.weight, self.bias, self.running_mean, self.running_var
        images = torch.batch_norm(images, *state, self.training, self.momentum, self.eps, False)
        return self.scale * self.activation(images)


class ParentBatchNormAct2d(BatchNormAct2d):
    """Calls the forward pass of its parent class, in another method, with an optional argument."""

    def forward(self, images: torch.Tensor, shift: float = 0.25) -> torch.Tensor:
        return self.normalize(images) + shift

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        return self.scale * self.activation(nn.BatchNorm2d.forward(self, images))


class ExtraState2d(BatchNormAct2d):
    """Has another parameter, another buffer and cumulative averages."""

    def __init__(self, num_features: int, scale: float) -> None:
        super().__init__(num_features, scale)
        self.momentum = None
        self.gain = nn.Parameter(torch.full((num_features, 1, 1), 1.5))
        self.register_buffer("offset", torch.full((num_features, 1, 1), 0.5))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.gain * super().forward(images) + self.offset


class InstanceNormAct2d(nn.BatchNorm2d):
    """Normalises each image separately."""

    def __init__(self, num_features: int, scale: float) -> None:
        super().__init__(num_features, track_running_stats=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.instance_norm(images, weight=self.weight, bias=self.bias, eps=self.eps).relu()


class OwnStatistics2d(nn.BatchNorm2d):
    """Computes the statistics of a batch itself."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(images, (0, 2, 3), keepdim=True)
        return (images - mean) / (variance + self.eps).sqrt()


class ConditionalOwnStatistics2d(OwnStatistics2d):
    """Needs an argument that the conversion does not know."""

    def forward(self, images: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return scale * super().forward(images)


NORMS = [
    BatchNormAct2d,
    FunctionalBatchNormAct2d,
    TorchBatchNormAct2d,
    ParentBatchNormAct2d,
    ExtraState2d,
    InstanceNormAct2d,
]


def subclass_model(norm: type = BatchNormAct2d) -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Conv2d(2, 4, 3), norm(4, scale=1.5), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()


def forward_backward(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> dict[str, np.ndarray]:
    """Return the logits, and the gradients and the state of `model` after one backward pass."""
    logits = model(images)
    nn.functional.cross_entropy(logits, targets).backward()
    network = unwrap_model(model)
    gradients = {f"gradient of {name}": value.grad.numpy() for name, value in network.named_parameters()}
    return {"logits": logits.detach().numpy()} | gradients | to_numpy(network)


@pytest.mark.parametrize("norm", NORMS)
def test_sync_batchnorm_under_ddp_matches_one_process_with_the_full_batch(norm):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 2, 8, 8, generator=generator, dtype=torch.float64) * 3 + 5
    targets = torch.randint(3, (16,), generator=generator)
    expected = forward_backward(subclass_model(norm), images, targets)

    def synchronised() -> dict[str, np.ndarray]:
        rank = torch.distributed.get_rank()
        network = convert_sync_batchnorm(subclass_model(norm), CPU)
        model = DistributedDataParallel(network)
        outcome = forward_backward(model, images.chunk(2)[rank], targets.chunk(2)[rank])
        plain = subclass_model(norm)
        plain.load_state_dict(network.state_dict())  # as predict.py does
        assert torch.equal(network.eval()(images), plain.eval()(images))
        return outcome

    ranks = run_ranks(2, synchronised)
    logits = np.concatenate([rank.pop("logits") for rank in ranks])
    np.testing.assert_allclose(logits, expected.pop("logits"), rtol=1e-11, atol=1e-12)
    for rank in ranks:
        assert rank.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(rank[name], values, rtol=1e-11, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("compiled", [nn.Sequential, partial(torch.compile, backend="eager")])
def test_sync_batchnorm_of_subclasses_works_with_and_without_compilation(compiled):
    images = torch.randn(8, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = subclass_model(FunctionalBatchNormAct2d)(images).detach()

    def synchronised() -> np.ndarray:
        model = compiled(convert_sync_batchnorm(subclass_model(FunctionalBatchNormAct2d), CPU))
        return model(images.chunk(2)[torch.distributed.get_rank()]).detach().numpy()

    np.testing.assert_allclose(np.concatenate(run_ranks(2, synchronised)), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_own_statistics_that_cannot_be_synchronised_are_rejected(device):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Sequential(OwnStatistics2d(4)))
    with pytest.raises(UserError, match=r"^the layer 1.0 \(OwnStatistics2d\) computes .*--no-sync-batchnorm"):
        convert_sync_batchnorm(model, torch.device(device))


def test_own_statistics_behind_an_argument_are_rejected_in_the_first_forward_pass():
    def forward() -> str:
        model = convert_sync_batchnorm(nn.Sequential(ConditionalOwnStatistics2d(4)), CPU)
        model.eval()
        model[0](torch.randn(3, 4, 2, 2), torch.ones(()))
        model.train()
        with pytest.raises(UserError) as error:
            model[0](torch.randn(3, 4, 2, 2), torch.ones(()))
        return str(error.value)

    for message in run_ranks(2, forward):
        assert message.startswith("the layer 0 (ConditionalOwnStatistics2d) computes")


@pytest.mark.parametrize("skipped", [1, 3])
def test_ranks_in_different_batchnorm_layers_are_reported(skipped):
    def step() -> str:
        layers = list(subclass_model())
        if torch.distributed.get_rank() == 1:
            layers[skipped] = nn.Identity()
        model = convert_sync_batchnorm(nn.Sequential(*layers), CPU)
        for number, layer in enumerate(model):
            if isinstance(layer, SyncedForward):
                layer._synced_layer = layer._synced_layer._replace(number=number, size=4)
        with pytest.raises(RunError) as error:
            model(torch.randn(4, 2, 8, 8, dtype=torch.float64)).sum().backward()
        return str(error.value)

    messages = run_ranks(2, step)
    assert [message.partition(", this")[0] for message in messages] == [
        "the ranks are in different batch norm layers"
    ] * 2


def test_lazy_batchnorm_is_rejected_until_it_is_initialised():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.LazyBatchNorm2d())
    with pytest.raises(UserError, match=r"^the layer 1 \(LazyBatchNorm2d\) has no number of features yet"):
        convert_sync_batchnorm(model, CPU)
    model(torch.randn(2, 2, 4, 4))
    assert type(convert_sync_batchnorm(model, CPU)[1]) is SyncBatchNormCPU


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_converted_subclass_keeps_attributes_state_and_hooks(device):
    model = subclass_model()
    before = model[1]
    calls: list[str] = []
    before.register_forward_pre_hook(lambda module, inputs: calls.append("before"))
    before.register_forward_hook(lambda module, inputs, output: calls.append("after"))
    tensors = {name: value.data_ptr() for name, value in model.state_dict().items()}
    converted = convert_sync_batchnorm(model, torch.device(device))
    assert converted is model
    after = model[1]
    assert isinstance(after, BatchNormAct2d)
    assert isinstance(after, SyncedForward)
    assert (after.scale, after.activation, after.momentum) == (1.5, before.activation, before.momentum)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == tensors
    model.eval()
    output = after(-torch.ones(1, 4, 2, 2, dtype=torch.float64))
    assert torch.equal(output, torch.zeros_like(output))  # the activation is applied
    assert calls == ["before", "after"]


class SharedNorm(nn.Module):
    """One batch norm with three names, two of them in the same module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(5)
        self.second = self.first
        self.inner = nn.ModuleDict({"third": self.first})


def test_module_with_several_names_stays_one_module():
    model = SharedNorm()
    names = list(model.state_dict())
    convert_sync_batchnorm(model, CPU)
    assert isinstance(model.first, SyncBatchNormCPU)
    assert model.first is model.second is model.inner["third"]
    assert list(model.state_dict()) == names


def test_converting_twice_changes_nothing():
    model = nn.Sequential(nn.BatchNorm1d(5), BatchNormAct2d(4, scale=1.0))
    modules = list(convert_sync_batchnorm(model, CPU))
    assert list(convert_sync_batchnorm(model, CPU)) == modules


def test_sync_batchnorm_of_torch_is_replaced_on_a_cpu():
    module = convert_sync_batchnorm(nn.SyncBatchNorm(5), CPU)
    assert type(module) is SyncBatchNormCPU


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_converted_model_can_be_copied(device):
    def copy_model() -> bool:
        model = convert_sync_batchnorm(subclass_model(), torch.device(device))
        duplicate = copy.deepcopy(model)  # as EMA does
        return type(duplicate[1]) is type(model[1]) and duplicate[1].weight is not model[1].weight

    assert run_ranks(1, copy_model) == [True]


def test_ranks_wait_until_all_have_joined(monkeypatch):
    joined = get_context("fork").Event()
    init = torch.distributed.init_process_group

    def init_slowly(backend: str) -> None:
        init(backend)
        if os.environ["RANK"] == "1":
            time.sleep(0.5)  # long enough for a rank that would not wait
            joined.set()

    monkeypatch.setattr(torch.distributed, "init_process_group", init_slowly)
    assert run_ranks(2, joined.is_set) == [True, True]


def test_fork_waits_for_gloo_threads_before_python_3_11_8(monkeypatch):
    def fork() -> int:
        waits = []
        monkeypatch.setattr(sys, "_current_frames", lambda: waits.append(1))
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        return len(waits)

    assert run_ranks(1, fork) == [1 if sys.version_info < (3, 11, 8) else 0]


def test_rank_exits_if_its_launcher_died_while_it_started(monkeypatch):
    def join() -> str:
        try:
            with process_group(torch.device("cpu")):
                return "joined"
        except RunError as error:
            return str(error)

    monkeypatch.setenv("BATTERIES_LAUNCHER", "1")
    assert run_ranks(1, join, join=False) == ["the launcher process died, so this rank exits."]
    monkeypatch.setenv("BATTERIES_LAUNCHER", str(os.getpid()))
    assert run_ranks(1, join, join=False) == ["joined"]


@CLASSES_ONLY
def test_gradients_are_exchanged_once_per_step():
    def count_exchanges() -> tuple[int, int]:
        buckets = []

        def record(state: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
            buckets.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        state = make_state(plain_model())
        state.model.register_comm_hook(None, record)
        loader = make_loader(accumulation_steps=4)
        train_fn(state, loader.epoch(0, 1), LOGGER, CONFIG)
        return len(buckets), len(loader)

    assert run_ranks(2, count_exchanges) == [(4, 4), (4, 4)]


@CLASSES_ONLY
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_metrics_do_not_depend_on_the_number_of_ranks(world_size):
    dataset = RandomImages(101, CHANNELS)
    model = plain_model().eval()
    with torch.no_grad():
        logits = model(normalize(dataset.images))
    accuracy = (logits.argmax(1) == dataset.targets).double().mean().item()
    loss = nn.functional.cross_entropy(logits.double(), dataset.targets).item()

    def validate() -> dict[str, float]:
        loader = EvalLoader(dataset, range(101), None, CPU, batch_size=64)
        return valid_fn(make_state(plain_model()).model, loader, LOGGER, CONFIG)

    for metrics in run_ranks(world_size, validate):
        assert metrics["accuracy"] == accuracy
        assert metrics["loss"] == pytest.approx(loss, rel=1e-6)


@CLASSES_ONLY
def test_dropout_depends_on_the_position_only():
    def train_two_epochs(draws_between_epochs: bool) -> dict[str, np.ndarray]:
        state = make_state(nn.Sequential(*plain_model(), nn.Dropout(0.5)))
        for epoch in (1, 2):
            if draws_between_epochs:
                torch.rand(epoch * 7)
            train_fn(state, make_loader().epoch(0, epoch), LOGGER, CONFIG)
        return to_numpy(state.model)

    expected = train_two_epochs(draws_between_epochs=False)
    actual = train_two_epochs(draws_between_epochs=True)
    for name, values in expected.items():
        np.testing.assert_array_equal(actual[name], values)
