"""Parameter groups and freezing."""

import re
from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from batteries.core.errors import UserError
from batteries.core.text import did_you_mean
from batteries.distributed.unwrap import unwrap_model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that learn, for an optimizer: weight decay on matrices and kernels, none on biases and norms.

    So Goyal et al. 2017 for norms, He et al. 2019 for both. What has less than two dimensions counts as one of them;
    what is called bias, or belongs to a norm by its type's name, is one of any dimension.
    """
    norms = [module for module in model.modules() if re.search(r"Norm(\dd)?$", type(module).__name__)]
    of_norms = {id(parameter) for module in norms for parameter in module.parameters(recurse=False)}
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_spared = parameter.ndim <= 1 or name.endswith("bias") or id(parameter) in of_norms
            (others if is_spared else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class FrozenStage(Protocol):
    """A stage of train.py, as far as freezing is concerned."""

    @property
    def freeze(self) -> Sequence[str]:
        """The names of the modules to freeze."""
        ...


def check_module_names(model: nn.Module, stages: Sequence[FrozenStage]) -> None:
    """Raise UserError if a stage freezes a module that does not exist, or all parameters."""
    names = [name for name, _ in unwrap_model(model).named_modules() if name]  # the model itself has no name
    for number, stage in enumerate(stages):
        flag = f"--stages.{number}.freeze"
        for name in stage.freeze:
            if name not in names:
                raise UserError(f"{flag} {name!r} is not a module of the model{did_you_mean(name, names) or '.'}")
        freeze(model, stage.freeze)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError(f"{' '.join((flag, *stage.freeze))} leaves no trainable parameter.")


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Freeze the modules with these names (`layer1`, `layer4.0`) and unfreeze all others.

    Parameters for which build_model set `requires_grad = False` stay frozen.
    """
    for parameter in model.parameters():
        if not hasattr(parameter, "is_fixed"):  # the first time: as build_model made it
            parameter.is_fixed = not parameter.requires_grad  # type: ignore[attr-defined]
        parameter.requires_grad_(not parameter.is_fixed)  # type: ignore[attr-defined]
    for name in names:
        unwrap_model(model).get_submodule(name).requires_grad_(False)


def train_mode(model: nn.Module, frozen: Sequence[str]) -> None:
    """`model.train()`, but for frozen modules: their batch norm keeps its statistics, their dropout is off."""
    model.train()
    for name in frozen:
        unwrap_model(model).get_submodule(name).eval()
