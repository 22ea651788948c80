"""Placing and wrapping a model."""

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
    """`model` on its device; under DDP with batch norm over all ranks, in the memory format that is asked for."""
    if dist.is_initialized() and sync_batchnorm:
        model = convert_sync_batchnorm(model, device)
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model  # type: ignore[call-overload]


def wrap_model(
    model: nn.Module, device: torch.device, *, data_parallel: bool = False, compiled: bool = False
) -> nn.Module:
    """`model` wrapped where several devices share the work, and compiled; anew in each stage, for what is frozen in it.

    DataParallel on a machine without GPUs is one device; DistributedDataParallel comes with torchrun's processes.
    """
    if dist.is_initialized():
        device_ids = [device.index] if device.type == "cuda" else None
        # Buffers are sent once an epoch (see `evaluation`), not before each forward pass.
        model = DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)
    elif data_parallel:
        model = DataParallel(model)
    return torch.compile(model) if compiled else model  # type: ignore[return-value]


def check_wrapping(device: torch.device, *, data_parallel: bool, compiled: bool) -> None:
    """Raise BadInput for ways to share a model that do not go together."""
    if data_parallel and world_size() > 1:
        raise UserError("--data-parallel is for one process; under scripts/train_ddp.sh leave it out.")
    if data_parallel and torch.cuda.is_available() and device != torch.device("cuda", 0):
        raise UserError(f"--data-parallel takes all visible GPUs; leave --device {device} out.")
    if data_parallel and compiled:
        raise UserError("--compile does not go with --data-parallel; use scripts/train_ddp.sh.")


def check_batchnorm(model: nn.Module, loader: TrainLoader, *, synchronised: bool) -> None:
    """Raise BadInput where a micro-batch is one sample, of which batch norm has no variance.

    Counted per rank, or over all ranks where batch norm is synchronised.
    """
    has_batchnorm = any(isinstance(module, _BatchNorm) for module in model.modules())
    samples = loader.smallest_micro_batch * (world_size() if synchronised else 1)
    if has_batchnorm and samples < 2:
        raise UserError(
            "--batch-size leaves micro-batches of one sample, and batch norm needs two or more; "
            "use a larger --batch-size, fewer --accumulation-steps, or --drop-last."
        )


def accumulate(model: nn.Module, batch: Batch) -> AbstractContextManager:
    """Forward and backward of one micro-batch go in here.

    The model draws from the stream of this micro-batch, and ranks exchange gradients only where it ends a step:
    DistributedDataParallel decides that in its forward pass.
    """
    reseed(batch.seed)
    reseed_devices(batch.seed)
    shared = _uncompiled(model)
    is_shared = isinstance(shared, DistributedDataParallel)
    return shared.no_sync() if is_shared and not batch.ends_step else nullcontext()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode, without gradients, to be called as often as a rank has batches."""
    shared = _uncompiled(model)
    network = (
        shared.module if isinstance(shared, DistributedDataParallel) else model
    )  # its forward pass needs all ranks
    was_training = model.training
    if dist.is_initialized():
        _send_buffers(network)  # of an average as well
    model.eval()
    try:
        with torch.inference_mode():
            yield network
    finally:
        model.train(was_training)


def _uncompiled(model: nn.Module) -> nn.Module:
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def _send_buffers(model: nn.Module) -> None:
    """Rank 0's running statistics for all. With synchronised batch norm they are equal already."""
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
