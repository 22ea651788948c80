"""Placing a model on its device, wrapping it for several devices, and the contexts of its forward passes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from batteries.core.errors import UserError
from batteries.core.ranks import world_size
from batteries.core.seeding import reseed, reseed_devices
from batteries.data.loaders import Batch, TrainLoader
from batteries.distributed.sync_batchnorm import convert_sync_batchnorm


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
        The model; under DDP its batch norm modules can be replaced.
    """
    if dist.is_initialized() and sync_batchnorm:
        model = convert_sync_batchnorm(model, device)
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model  # type: ignore[call-overload]


def wrap_model(
    model: nn.Module, device: torch.device, *, data_parallel: bool = False, compiled: bool = False
) -> nn.Module:
    """Wrap a model for several devices, and compile it. Call it in each stage, after freezing.

    Args:
        model: The output of `prepare_model`.
        device: The device of this process.
        data_parallel: Use DataParallel in a single process; it has no effect without GPUs. In a process group,
            DistributedDataParallel is used.
        compiled: Use torch.compile.
    """
    if dist.is_initialized():
        device_ids = [device.index] if device.type == "cuda" else None
        # Buffers are broadcast once per epoch (see `eval_mode`), not before each forward pass.
        model = DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)
    elif data_parallel:
        model = DataParallel(model)
    return torch.compile(model) if compiled else model  # type: ignore[return-value]


def check_wrapping(device: torch.device, *, data_parallel: bool, compiled: bool) -> None:
    """Raise UserError for options of `wrap_model` that exclude each other."""
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
    samples = loader.smallest_micro_batch * (world_size() if synchronised else 1)
    if has_batchnorm and samples < 2:
        raise UserError(
            "--batch-size results in micro-batches of one sample, and batch norm needs two or more; use a larger "
            "--batch-size, fewer --accumulation-steps, or --drop-last."
        )


def accumulate(model: nn.Module, batch: Batch) -> AbstractContextManager:
    """Return the context for the forward and backward pass of one micro-batch.

    It seeds the random numbers that the model draws. Ranks exchange gradients only in the last micro-batch of a step;
    DistributedDataParallel decides that in its forward pass, so the forward pass belongs inside too.

    Args:
        model: The output of `wrap_model`.
        batch: The micro-batch.
    """
    reseed(batch.seed)
    reseed_devices(batch.seed)
    wrapped = _uncompiled(model)
    if isinstance(wrapped, DistributedDataParallel) and not batch.ends_step:
        return wrapped.no_sync()
    return nullcontext()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Set a model to evaluation mode without gradients, and restore its mode at the end. Every rank must call it.

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
    try:
        with torch.inference_mode():
            yield network
    finally:
        model.train(was_training)


def _uncompiled(model: nn.Module) -> nn.Module:
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def _broadcast_buffers(model: nn.Module) -> None:
    """Give all ranks the running statistics of rank 0. With synchronised batch norm they are equal already."""
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
