"""Checks of model, optimizer and checkpoint."""

import math
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batteries.checkpoint.async_writer import HostBuffers
from batteries.checkpoint.io import read_checkpoint, save_checkpoint
from batteries.core.text import count_of, list_first
from batteries.data.loaders import TrainLoader
from batteries.distributed.unwrap import unwrap_model
from batteries.preflight.results import CheckResult
from batteries.training.state import TrainState

# Fractions of the first loss: at or below the one the batch counts as learned, at or below the other as half learned.
LEARNED = 0.1
HALF_LEARNED = 0.5
# With fewer, batch norm gets noisy statistics (Wu and He 2018, "Group normalization", fig. 1).
MIN_SAMPLES_OF_SHARD = 16
MAX_LISTED = 5  # parameters listed in a result


def check_overfit_one_batch(
    losses: Iterable[float], samples: int, lr: float, *, pretrained: bool = False
) -> CheckResult:
    """Check that the loss of one batch, which is trained repeatedly, falls towards 0.

    Args:
        losses: The loss of each step; no more steps are taken than necessary.
        samples: The number of samples in the batch.
        lr: The learning rate.
        pretrained: Whether the initial weights may have been trained on the samples, so that the first loss is low.
    """
    seen: list[float] = []
    for loss in losses:
        seen.append(loss)
        if not math.isfinite(loss) or loss <= LEARNED * seen[0]:
            break
    first = seen[0]
    last = seen[-1]
    steps = count_of(len(seen), "step")
    details = f"loss {first:.3g} to {last:.3g} in {steps} on the same {count_of(samples, 'sample')}, lr {lr:g}"
    if not math.isfinite(last):
        hint = "use a smaller --stages.0.lr; check the loss and normalize for 0 / 0 and log(0)"
        return CheckResult("fail", f"{details}; the loss is not finite", hint)
    if last <= LEARNED * first:
        return CheckResult("pass", details)
    if last <= HALF_LEARNED * first or pretrained:
        hint = "try another --stages.0.lr, or more --overfit-steps"
        return CheckResult("warning", f"{details}; the loss decreases slowly", hint)
    hint = "check that images match targets, that the optimizer updates the model, and that the lr is suitable"
    return CheckResult("fail", f"{details}; the model does not learn them", hint)


class GradientMonitor:
    """Records what the gradients of parameters were during some backward passes.

    Attributes:
        reached: The names of the parameters that got a gradient.
        missed: The names of those that got none in at least one step.
        nonzero: The names of those whose gradient was not zero at least once.
        nonfinite: The names of those whose gradient was not finite at least once.
    """

    def __init__(self) -> None:
        self.reached: set[str] = set()
        self.missed: set[str] = set()
        self.nonzero: set[str] = set()
        self.nonfinite: set[str] = set()
        self._reached_in_step: set[str] = set()

    def watch(self, parameters: Mapping[str, nn.Parameter], steps: Iterable[object]) -> None:
        """Record the gradients of `parameters` (name to parameter) in each of `steps`, which trains when iterated."""
        handles = [
            parameter.register_post_accumulate_grad_hook(partial(self._record, name))
            for name, parameter in parameters.items()
        ]
        try:
            for _ in steps:
                self.missed |= parameters.keys() - self._reached_in_step
                self._reached_in_step.clear()
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, name: str, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        self.reached.add(name)
        self._reached_in_step.add(name)
        if gradient.any():
            self.nonzero.add(name)
        if not gradient.isfinite().all():
            self.nonfinite.add(name)


def check_gradients(
    model: nn.Module,
    trainable: Collection[str],
    steps: Iterable[object],
    *,
    scaled: bool,
    find_unused_parameters: bool,
) -> CheckResult:
    """Check that every trainable parameter gets a gradient that is finite and not always zero.

    Args:
        model: The model.
        trainable: The names of the parameters that at least one stage trains.
        steps: Trains one step for each item.
        scaled: Whether the loss is scaled (fp16); the first gradients may then overflow.
        find_unused_parameters: Whether DDP allows parameters without a gradient.
    """
    parameters = dict(unwrap_model(model).named_parameters())
    watched = {name: parameter for name, parameter in parameters.items() if name in trainable}
    monitor = GradientMonitor()
    monitor.watch(watched, steps)
    count = len(trainable)
    unreached = [name for name in watched if name not in monitor.reached]
    if unreached:
        details = f"no gradient for {len(unreached)} of {count} parameters: {list_first(unreached, MAX_LISTED)}"
        hint = "use them in forward, freeze them, or remove them; DDP raises an error for unused parameters"
        return CheckResult("warning" if find_unused_parameters else "fail", details, hint)
    nonfinite = [name for name in watched if name in monitor.nonfinite]
    if nonfinite and not scaled:
        details = (
            f"non-finite gradients for {len(nonfinite)} of {count} parameters: {list_first(nonfinite, MAX_LISTED)}"
        )
        hint = "check the model and the loss for sqrt, log and division at 0; try --precision fp32"
        return CheckResult("fail", details, hint)
    missed = [name for name in watched if name in monitor.missed]
    if missed and not find_unused_parameters:
        details = f"no gradient in some steps for {len(missed)} of {count} parameters: {list_first(missed, MAX_LISTED)}"
        return CheckResult("warning", details, "give --find-unused-parameters when using scripts/train_ddp.sh")
    zero = [name for name in watched if name not in monitor.nonzero]
    if zero:
        details = f"only zero gradients for {len(zero)} of {count} parameters: {list_first(zero, MAX_LISTED)}"
        hint = "check for a factor of 0, a dead activation, or detach() in front of them"
        return CheckResult("warning", details, hint)
    frozen = len(parameters) - count
    in_all_stages = f"; {frozen} are frozen in all stages" if frozen else ""
    return CheckResult("pass", f"all {count} parameters get a gradient{in_all_stages}")


def check_shards(model: nn.Module, loader: TrainLoader) -> CheckResult:
    """Check that the shards of `loader` have enough samples for the statistics of batch norm."""
    samples = count_of(loader.smallest_micro_batch, "sample")
    details = f"the smallest of {loader.shards} shards has {samples}"
    if loader.smallest_micro_batch < MIN_SAMPLES_OF_SHARD and any(isinstance(m, _BatchNorm) for m in model.modules()):
        hint = (
            f"batch norm has the statistics of a shard: use {MIN_SAMPLES_OF_SHARD} samples or more, or fewer --shards"
        )
        return CheckResult("warning", details, hint)
    return CheckResult("pass", details)


@contextmanager
def temporary_directory(logdir: Path) -> Iterator[Path]:
    """Make a directory on the file system of `logdir`, which need not exist; remove it at the end."""
    with tempfile.TemporaryDirectory(prefix=".check-", dir=nearest_directory(logdir)) as directory:
        yield Path(directory)


def nearest_directory(path: Path) -> Path:
    """Return `path`, or the closest directory above it that exists."""
    return next(directory for directory in (path, *path.absolute().parents) if directory.is_dir())


def check_checkpoint_roundtrip(
    logdir: Path,
    make_state: Callable[[int], TrainState],
    make_checkpoint: Callable[[TrainState], dict[str, Any]],
    train_and_validate: Callable[[TrainState, int], Any] | None,
) -> CheckResult:
    """Check that a state which is saved and loaded into another model is bit-identical, and continues bit-identically.

    Args:
        logdir: The run directory; the checkpoint is written to the same file system, and removed.
        make_state: Makes a state; 0 and 1 give different random weights.
        make_checkpoint: Makes the checkpoint of a state.
        train_and_validate: Called with a state and an epoch; returns the metrics of some steps. None if the kernels are
            not deterministic: then only the loaded state is compared.
    """
    from rich.filesize import decimal

    state = make_state(0)
    expected = None
    if train_and_validate is not None:
        train_and_validate(state, 1)
    with temporary_directory(logdir) as directory:
        path = directory / "checkpoint.pth"
        size, _ = save_checkpoint(path, make_checkpoint(state))
        saved = HostBuffers().copy(make_checkpoint(state))
        if train_and_validate is not None:
            expected = HostBuffers().copy({"result": train_and_validate(state, 2), **make_checkpoint(state)})
        del state  # before the next one is made: a GPU may not have memory for both
        loaded = make_state(1)
        loaded.restore(read_checkpoint(path), path.name)
    hint = "keep what the model computes with in its state_dict: register_buffer or get_extra_state"
    different = find_differences(saved, make_checkpoint(loaded))
    if different:
        return CheckResult("fail", f"loading changes these values: {list_first(different, MAX_LISTED)}", hint)
    if train_and_validate is None:
        details = (
            f"{decimal(size)} saved and loaded, bit-identical; further steps cannot be compared without --deterministic"
        )
        return CheckResult("pass", details)
    different = find_differences(expected, {"result": train_and_validate(loaded, 2), **make_checkpoint(loaded)})
    if different:
        details = f"loading changes no value, but further steps differ in: {list_first(different, MAX_LISTED)}"
        return CheckResult("fail", details, hint)
    return CheckResult("pass", f"{decimal(size)} saved and loaded, bit-identical, also after further steps")


def find_differences(first: Any, second: Any, name: str = "") -> list[str]:
    """List the names of the values in which two nested objects differ, bit for bit; `name` is the prefix."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return _find_mapping_differences(first, second, name)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        found: list[str] = []
        for number, (a, b) in enumerate(zip(first, second, strict=True)):
            found += find_differences(a, b, f"{name}{number}.")
        return found
    return [] if _is_same(first, second) else [name.rstrip(".")]


def _find_mapping_differences(first: Mapping[Any, Any], second: Mapping[Any, Any], name: str) -> list[str]:
    keys = [*first, *(key for key in second if key not in first)]
    found = [f"{name}{key}" for key in keys if (key in first) != (key in second)]
    for key in keys:
        if key in first and key in second:
            found += find_differences(first[key], second[key], f"{name}{key}.")
    return found


def _is_same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        same_kind = first.dtype == second.dtype and first.shape == second.shape
        return same_kind and _bytes_of(first).equal(_bytes_of(second))
    both_nan = first != first and second != second
    return type(first) is type(second) and bool(first == second or both_nan)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
