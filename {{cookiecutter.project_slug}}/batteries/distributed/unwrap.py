"""Unwrapping a model."""

from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the user's model inside its wrappers; its state names have no `module.` or `_orig_mod.` prefix."""
    while isinstance(model, DataParallel | DistributedDataParallel | OptimizedModule):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model
