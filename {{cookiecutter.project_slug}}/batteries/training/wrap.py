"""Placing a model on its device, wrapping it for several devices, and the contexts of its forward passes."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from batteries.checkpoint.io import make_loadable
from batteries.core.errors import RunError, UserError
from batteries.core.ranks import world_size
from batteries.core.seeding import reseed, reseed_devices
from batteries.core.text import list_first
from batteries.data.loaders import Batch, TrainLoader
from batteries.distributed.collectives import broadcast_from_rank_zero
from batteries.distributed.sync_batchnorm import convert_sync_batchnorm
from batteries.training.nonfinite import BufferSnapshot
from batteries.training.sharding import ShardedModel, check_shards

# Buffers are broadcast once per epoch (see `eval_mode`), not before each forward pass.
_arguments = inspect.signature(DistributedDataParallel).parameters
_buffers_flag = "forward_sync_buffers" if "forward_sync_buffers" in _arguments else "broadcast_buffers"  # torch 2.11
WITHOUT_BUFFERS: dict[str, Any] = {_buffers_flag: False}


def prepare_model(
    model: nn.Module, device: torch.device, *, sync_batchnorm: bool = True, channels_last: bool = False
) -> nn.Module:
    """Place a model on its device.

    Args:
        model: The model.
        device: The device of this process.
        sync_batchnorm: Under DDP, compute batch norm statistics over all ranks.
        channels_last: Use the channels-last memory format.

    Returns:
        The model; under DDP the class of its batch norm modules can be another one.

    Raises:
        UserError: If the model has lazy modules.
    """
    make_loadable(model)
    if dist.is_initialized() and sync_batchnorm:
        model = convert_sync_batchnorm(model, device)
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model  # type: ignore[call-overload]


def wrap_model(
    model: nn.Module,
    device: torch.device,
    *,
    data_parallel: bool = False,
    compiled: bool = False,
    find_unused_parameters: bool = False,
    shards: int | None = None,
) -> nn.Module:
    """Wrap a model for several devices, and compile it. Call it in each stage, after freezing.

    Args:
        model: The output of `prepare_model`.
        device: The device of this process.
        data_parallel: Use DataParallel in a single process; it has no effect without GPUs. In a process group,
            DistributedDataParallel is used.
        compiled: Use torch.compile.
        find_unused_parameters: Under DDP, allow steps in which some parameters get no gradient.
        shards: The shards of a step, for ShardedModel in place of DistributedDataParallel.
    """
    if shards is not None:
        return ShardedModel(model)
    if dist.is_initialized():
        device_ids = [device.index] if device.type == "cuda" else None
        model = DistributedDataParallel(
            model, device_ids=device_ids, find_unused_parameters=find_unused_parameters, **WITHOUT_BUFFERS
        )
    elif data_parallel:
        model = DataParallel(model)
    return torch.compile(model) if compiled else model  # type: ignore[return-value]


def check_wrapping(
    device: torch.device, *, data_parallel: bool, compiled: bool, shards: int | None = None, deterministic: bool = True
) -> None:
    """Raise UserError for options of `wrap_model` that exclude each other."""
    if shards is not None:
        check_shards(shards, data_parallel=data_parallel, compiled=compiled, deterministic=deterministic)
    if data_parallel and world_size() > 1:
        raise UserError("--data-parallel needs a single process; remove it when using scripts/train_ddp.sh.")
    if data_parallel and torch.cuda.is_available() and device != torch.device("cuda", 0):
        raise UserError(f"--data-parallel uses all visible GPUs and excludes --device {device}; remove one of them.")
    if data_parallel and compiled:
        raise UserError("--compile and --data-parallel exclude each other; use scripts/train_ddp.sh with --compile.")


def check_batchnorm(model: nn.Module, loader: TrainLoader, *, synchronised: bool) -> None:
    """Raise UserError if batch norm would get a micro-batch of one sample, which has no variance.

    Args:
        model: The model.
        loader: The train loader of a stage.
        synchronised: Count the samples over all ranks, otherwise per rank.
    """
    has_batchnorm = any(isinstance(module, _BatchNorm) for module in model.modules())
    if not has_batchnorm:
        return
    drop_last = "" if loader.drop_last else ", or --drop-last"
    if loader.shards is not None and loader.smallest_micro_batch < 2:
        raise UserError(
            f"--shards {loader.shards} results in shards of one sample, and batch norm needs two or more; use fewer "
            f"shards or a larger --batch-size{drop_last}."
        )
    if loader.smallest_micro_batch * (world_size() if synchronised else 1) < 2:
        raise UserError(
            "--batch-size results in micro-batches of one sample, and batch norm needs two or more; use a larger "
            f"--batch-size or fewer --accumulation-steps{drop_last}."
        )


@contextmanager
def accumulate(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Open the context for the forward and backward pass of one micro-batch.

    It seeds the random numbers that the model draws, and at the end of a step those that the optimizer draws, equally
    on all ranks. Ranks exchange gradients only in the last micro-batch of a step; DistributedDataParallel decides that
    in its forward pass, so the forward pass belongs inside too.

    Args:
        model: The output of `wrap_model`.
        batch: The micro-batch.

    Raises:
        RunError: If a parameter got no gradient, for which the other ranks would wait.
    """
    _reseed_all(batch.seed)
    wrapped = _uncompiled(model)
    if isinstance(wrapped, ShardedModel):
        with wrapped.shard(ends_step=batch.ends_step):
            yield
    elif not isinstance(wrapped, DistributedDataParallel):
        yield
    elif not batch.ends_step:
        with wrapped.no_sync():
            yield
    else:
        yield
        _check_gradients_are_exchanged(wrapped)
    if batch.ends_step:
        _reseed_all(batch.step_seed)


def _reseed_all(seed: int) -> None:
    reseed(seed)
    reseed_devices(seed)


def _check_gradients_are_exchanged(model: DistributedDataParallel) -> None:
    try:
        model._check_reducer_finalized()
    except RuntimeError as error:
        names = [name for name, parameter in model.module.named_parameters() if parameter.requires_grad]
        unused = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
        if unused is None:
            raise
        parameters = list_first([names[int(index)] for index in unused[1].split()], 5)
        raise RunError(
            f"these parameters got no gradient in a step, for which DistributedDataParallel waits: {parameters}. Give "
            "--find-unused-parameters if the model skips them in some steps; otherwise freeze or remove them."
        ) from error


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Set a model to evaluation mode without gradients, and restore its mode at the end. Every rank must call it.

    Buffers that a forward pass changes in evaluation mode (observers of quantization do) are restored before the next
    one and at the end. So the output does not depend on the batches before, which differ between ranks.

    Args:
        model: The output of `wrap_model`, or a plain model.

    Yields:
        The network to call. Ranks can call it a different number of times: it is not the DistributedDataParallel
        wrapper, whose forward pass needs all ranks.
    """
    wrapped = _uncompiled(model)
    network = wrapped.module if isinstance(wrapped, DistributedDataParallel) else model
    was_training = model.training
    if dist.is_initialized():
        _broadcast_buffers(network)  # also those of an EMA model
    model.eval()
    buffers = BufferSnapshot(network)
    hook = network.register_forward_pre_hook(lambda *_: buffers.restore())
    try:
        with torch.no_grad():  # in inference_mode, tensors that a module keeps could not be used in training
            yield network
    finally:
        hook.remove()
        buffers.restore()
        model.train(was_training)


def _uncompiled(model: nn.Module) -> nn.Module:
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def _broadcast_buffers(model: nn.Module) -> None:
    """Give all ranks the running statistics of rank 0. With synchronised batch norm they are equal already."""
    for buffer in model.buffers():
        broadcast_from_rank_zero(buffer)
