"""The user's model inside its wrappers."""

from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrap_model(model: nn.Module) -> nn.Module:
    """The user's own model inside the wrappers, whose state has no `module.` or `_orig_mod.` in its names."""
    while isinstance(model, DataParallel | DistributedDataParallel | OptimizedModule):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model
