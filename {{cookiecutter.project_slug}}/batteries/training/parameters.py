"""Parameter groups and freezing."""

import re
from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from batteries.core.errors import UserError
from batteries.core.text import did_you_mean, list_first
from batteries.distributed.unwrap import unwrap_model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group the trainable parameters for an optimizer: weight decay for matrices and kernels only.

    Biases and norms have none, as in Goyal et al. 2017 (norms) and He et al. 2019 (both). A parameter counts as one of
    them if it has fewer than two dimensions, if its name ends with `bias`, or if the class name of its module ends
    with Norm, Norm1d, Norm2d or Norm3d.

    Args:
        model: The model.
        weight_decay: The weight decay of matrices and kernels.

    Returns:
        One or two parameter groups; a group without parameters is left out.
    """
    norms = [module for module in model.modules() if re.search(r"Norm(\dd)?$", type(module).__name__)]
    norm_parameters = {id(parameter) for module in norms for parameter in module.parameters(recurse=False)}
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim <= 1 or name.endswith("bias") or id(parameter) in norm_parameters:
            not_decayed.append(parameter)
        else:
            decayed.append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class FrozenStage(Protocol):
    """The options of a stage that concern freezing."""

    @property
    def freeze(self) -> Sequence[str]:
        """The names of the modules to freeze."""
        ...


def check_module_names(model: nn.Module, stages: Sequence[FrozenStage]) -> None:
    """Check the modules that the stages freeze. The parameters are frozen as in the last stage afterwards.

    Args:
        model: The model; it can be wrapped.
        stages: All stages.

    Raises:
        UserError: If a stage freezes a module that does not exist, or all parameters.
    """
    names = [name for name, _ in unwrap_model(model).named_modules() if name]  # the model itself has no name
    for number, stage in enumerate(stages):
        flag = f"--stages.{number}.freeze"
        for name in stage.freeze:
            if name not in names:
                hint = did_you_mean(name, names) or f"; it has {list_first(name for name in names if '.' not in name)}."
                raise UserError(f"{flag} {name!r} is not a module of the model{hint}")
        freeze(model, stage.freeze)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError(f"{' '.join((flag, *stage.freeze))} leaves no trainable parameter.")


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Freeze the modules with these names (`layer1`, `layer4.0`) and unfreeze all others.

    Parameters for which build_model set `requires_grad = False` stay frozen. A module that has only such parameters is
    treated like one with a frozen name, see `train_mode`.
    """
    for parameter in model.parameters():
        if not hasattr(parameter, "is_fixed"):  # the first call: as build_model set it
            parameter.is_fixed = not parameter.requires_grad  # type: ignore[attr-defined]
        parameter.requires_grad_(not parameter.is_fixed)  # type: ignore[attr-defined]
    for name in names:
        unwrap_model(model).get_submodule(name).requires_grad_(False)


def train_mode(model: nn.Module, frozen: Sequence[str]) -> None:
    """Set the model to training mode, and frozen modules to evaluation mode.

    The batch norm of frozen modules keeps its statistics, and their dropout is off. A module is frozen by its name, or
    because none of its parameters requires a gradient.

    Args:
        model: The model; it can be wrapped.
        frozen: The names of the frozen modules.
    """
    network = unwrap_model(model)
    model.train()
    for name in frozen:
        network.get_submodule(name).eval()
    for module in network.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
