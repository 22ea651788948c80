"""Unwrapping a model."""

from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel


class ModelWrapper(nn.Module):
    """A wrapper around a model, whose forward pass is that of the model.

    Attributes:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.module(*args, **kwargs)


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the user's model inside its wrappers; its state names have no `module.` or `_orig_mod.` prefix."""
    while isinstance(model, DataParallel | DistributedDataParallel | ModelWrapper | OptimizedModule):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model
