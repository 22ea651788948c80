"""Batch norm with statistics over all ranks: for subclasses too, and on a CPU, where torch's SyncBatchNorm raises."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode

from batteries.core.errors import RunError, UserError
from batteries.core.seeding import preserved_random_state, reseed

PROBE_SHAPES = ((3, 3), (), (3,), (3, 3, 3))  # after (N, C): the inputs of BatchNorm2d, 1d, 1d with a length, and 3d


class BatchNormCall(NamedTuple):
    """The arguments of F.batch_norm."""

    input: torch.Tensor
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


def _read_torch_batch_norm(
    input: torch.Tensor,  # noqa: A002 (torch's name)
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> BatchNormCall:
    """Return the arguments of torch.batch_norm, which have another order."""
    return BatchNormCall(input, running_mean, running_var, weight, bias, training, momentum, eps)


BATCH_NORM_FUNCTIONS: dict[Any, Callable[..., BatchNormCall]] = {
    F.batch_norm: BatchNormCall,
    torch.batch_norm: _read_torch_batch_norm,
}


class SyncedLayer(NamedTuple):
    """What a synchronised layer knows about itself.

    Attributes:
        label: Its name and class, for errors.
        number: Its place among the layers of the model.
        size: The largest number of features of all layers.
        must_call: Whether it was not found out if its forward pass calls F.batch_norm.
    """

    label: str
    number: int
    size: int
    must_call: bool = False


# The process group of the statistics on a CPU: none of their sums may be matched with a bucket of
# DistributedDataParallel or a control message. None is the default group.
_statistics_group: Any = None


def convert_sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Synchronise the statistics of every batch norm of `model` over all ranks. Every rank must call it.

    The modules stay, with their parameters, buffers, hooks and state names; only their class changes. A subclass keeps
    its `forward`, in which F.batch_norm is the synchronised one. Subclasses that normalise each sample separately are
    not changed.

    Args:
        model: The model, modified in place.
        device: The device that it is going to run on.

    Returns:
        The model.

    Raises:
        UserError: If a subclass computes statistics of the batch itself, or is not initialised.
    """
    global _statistics_group
    _statistics_group = dist.new_group() if dist.is_initialized() and device.type == "cpu" else None
    plain = SyncBatchNormCPU if device.type == "cpu" else nn.SyncBatchNorm
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    size = max((module.num_features for _, module in norms), default=0)
    for number, (name, module) in enumerate(norms):
        if isinstance(module, SyncedForward | plain):
            continue
        layer = SyncedLayer(f"the layer {name or 'of the model'} ({type(module).__name__})", number, size)
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
            module.process_group = None  # type: ignore[assignment]  # all ranks
            module.__class__ = plain
        else:
            layer = _convert_subclass(module, layer)
        module._synced_layer = layer  # type: ignore[assignment]
    return model


def _convert_subclass(module: _BatchNorm, layer: SyncedLayer) -> SyncedLayer:
    """Change the class of a module, unless it normalises each sample separately; return what is known of it."""
    kind = type(module)
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
        raise UserError(
            f"{layer.label} has no number of features yet; give it in build_model, or call the model there once."
        )
    calls_batch_norm = _calls_batch_norm(module)
    if calls_batch_norm is False:
        if _is_per_sample(module):
            return layer
        raise UserError(_cannot_synchronise(layer))
    synced: Any = type(f"Sync{kind.__name__}", (SyncedForward, kind), {"__module__": kind.__module__})
    module.__class__ = synced
    return layer._replace(must_call=calls_batch_norm is None)


def _cannot_synchronise(layer: SyncedLayer) -> str:
    return (
        f"{layer.label} computes the statistics of a batch without F.batch_norm, so they cannot be synchronised over "
        "the ranks; give --no-sync-batchnorm to use those of each rank, or call super().forward in it."
    )


class SyncedForward(nn.Module):
    """Calls the `forward` of the next class with statistics over all ranks in training mode."""

    _synced_layer: SyncedLayer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the forward pass of the batch norm."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(*args, **kwargs)
        with BatchNormMode(partial(_synced_batch_norm, self._synced_layer)) as mode:
            output = super().forward(*args, **kwargs)
        if self._synced_layer.must_call and not mode.is_called:
            raise UserError(_cannot_synchronise(self._synced_layer))
        return output


class SyncBatchNormCPU(SyncedForward, _BatchNorm):
    """Batch norm whose mean and variance are those of a micro-batch over all ranks; differentiable.

    Input: (N, C, ...), with any N on each rank. Output: the same shape. In evaluation mode it is plain batch norm.
    Source: Ioffe and Szegedy 2015.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002 (torch's name)
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions (N, C, ...), got {input.ndim}")


class BatchNormMode(TorchFunctionMode):
    """Replaces F.batch_norm and torch.batch_norm while statistics of the batch are used.

    Attributes:
        is_called: Whether one was called.
    """

    def __init__(self, replacement: Callable[[BatchNormCall], torch.Tensor]) -> None:
        super().__init__()
        self.is_called = False
        self._replacement = replacement

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, or the replacement."""
        kwargs = kwargs or {}
        if func in BATCH_NORM_FUNCTIONS:
            call = BATCH_NORM_FUNCTIONS[func](*args, **kwargs)
            if call.training:
                self.is_called = True
                return self._replacement(call)
        return func(*args, **kwargs)


def _synced_batch_norm(layer: SyncedLayer, call: BatchNormCall) -> torch.Tensor:
    """Return the result of F.batch_norm with statistics over all ranks."""
    if call.input.device.type == "cpu":
        return _batch_norm_on_cpu(layer, call)  # type: ignore[call-arg]
    return TorchSyncBatchNorm.apply(
        call.input,
        call.weight,
        call.bias,
        call.running_mean,
        call.running_var,
        call.eps,
        call.momentum,
        dist.group.WORLD,
        dist.get_world_size(),
    )


@torch.compiler.disable
def _batch_norm_on_cpu(layer: SyncedLayer, call: BatchNormCall) -> torch.Tensor:
    # In float32, as torch does: sums of halves overflow, and a count over 256 is not exact in bfloat16.
    is_half = call.input.dtype in (torch.float16, torch.bfloat16)
    values = call.input.float() if is_half else call.input
    count, mean, variance = _statistics_over_ranks(layer, values)
    unbiased = variance * count / (count - 1).clamp(min=1)
    _update(call.running_mean, mean, call.momentum)
    _update(call.running_var, unbiased, call.momentum)
    shape = (1, -1, *[1] * (values.ndim - 2))
    output = (values - mean.view(shape)) * torch.rsqrt(variance + call.eps).view(shape)
    if call.weight is not None:
        output = output * call.weight.view(shape)
    if call.bias is not None:
        output = output + call.bias.view(shape)
    return output.to(call.input.dtype)


@torch.no_grad()
def _update(running: torch.Tensor | None, statistic: torch.Tensor, momentum: float) -> None:
    if running is not None:
        running.lerp_(statistic.to(running.dtype), torch.as_tensor(momentum, dtype=running.dtype))


def _statistics_over_ranks(layer: SyncedLayer, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return count (1,), mean (C,) and biased variance (C,) of `values` (N, C, ...) over all ranks.

    In two passes, because the mean of squares minus the square of the mean cancels in float32.
    """
    flat = values.transpose(0, 1).flatten(1)  # (C, N * ...)
    count = _sum_over_ranks(layer, values.new_tensor([flat.shape[1]]), is_backward=False)
    mean = _SumOverRanks.apply(layer, flat.sum(1)) / count
    variance = _SumOverRanks.apply(layer, (flat - mean.view(-1, 1)).square().sum(1)) / count
    return count, mean, variance


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; its gradient is the sum of the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, layer: SyncedLayer, tensor: torch.Tensor) -> torch.Tensor:
        ctx.layer = layer
        return _sum_over_ranks(layer, tensor, is_backward=False)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:  # type: ignore[override]
        return None, _sum_over_ranks(ctx.layer, gradient, is_backward=True)


def _sum_over_ranks(layer: SyncedLayer, tensor: torch.Tensor, *, is_backward: bool) -> torch.Tensor:
    """Sum a tensor (K,) over all ranks.

    Every sum of the model has the same size and begins with the number of its layer, so that ranks which execute
    different layers are found: gloo does not compare what it adds, and aborts the process if sizes differ.

    Raises:
        RunError: If the ranks are in different layers.
    """
    number = 2 * layer.number + is_backward
    padding = tensor.new_zeros(max(layer.size - len(tensor), 0))
    total = torch.cat([tensor.new_tensor([number]), tensor, padding])
    dist.all_reduce(total, group=_statistics_group)
    if total[0] != number * dist.get_world_size():
        raise RunError(
            f"the ranks are in different batch norm layers, this one in {layer.label}: the model skips layers on some "
            "ranks only; give --no-sync-batchnorm."
        )
    return total[1 : 1 + len(tensor)]


def _calls_batch_norm(module: _BatchNorm) -> bool | None:
    """Return whether the forward pass calls F.batch_norm; None if no input is known that it accepts."""
    with BatchNormMode(lambda call: F.batch_norm(*call)) as mode:
        output = _probe(module, 2)
    return None if output is None else mode.is_called


def _is_per_sample(module: _BatchNorm) -> bool:
    """Return whether the output of a sample does not depend on the others, as with instance norm."""
    two = _probe(module, 2)
    four = _probe(module, 4)
    return isinstance(two, torch.Tensor) and isinstance(four, torch.Tensor) and torch.allclose(two, four[:2])


@torch.no_grad()
def _probe(module: _BatchNorm, samples: int) -> Any:
    """Return the output of a copy of `module` for random values; None if it accepts no shape of PROBE_SHAPES."""
    state = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    options = {"dtype": state[0].dtype, "device": state[0].device} if state else {}
    for shape in PROBE_SHAPES:
        with preserved_random_state():
            reseed(0)
            values = torch.randn(4, module.num_features, *shape, **options)[:samples]
            try:
                return copy.deepcopy(module).train().forward(values)
            except Exception:  # noqa: BLE001, S112 (another shape, or an argument that is not known here)
                continue
    return None
