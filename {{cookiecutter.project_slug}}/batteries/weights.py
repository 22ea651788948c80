"""What is done to the weights of a model besides training them: decay groups, freezing, averages, other people's."""

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import get_ema_multi_avg_fn

from batteries.checkpoints import scored_weights
from batteries.distributed import on_main
from batteries.errors import BadInput, near
from batteries.parallel import bare


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
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


def freeze(model: nn.Module, names: Sequence[str], flag: str = "--stages.0.freeze") -> None:
    """Let all parameters learn but those of the modules with these names (`layer1`, `layer4.0`); errors name `flag`.

    Those for which build_model set `requires_grad = False` do not learn either.
    """
    modules = {name: module for name, module in bare(model).named_modules() if name}  # the model itself has no name
    for name in names:
        if name not in modules:
            raise BadInput(f"{flag} {name!r} is no module of the model{near(name, modules) or '.'}")
    for parameter in model.parameters():
        if not hasattr(parameter, "is_fixed"):  # the first time: it is as build_model made it
            parameter.is_fixed = not parameter.requires_grad  # type: ignore[attr-defined]
        parameter.requires_grad_(not parameter.is_fixed)  # type: ignore[attr-defined]
    for name in names:
        modules[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise BadInput(f"{' '.join((flag, *names))} leaves nothing to learn.")


def train_mode(model: nn.Module, frozen: Sequence[str]) -> None:
    """`model.train()`, but for frozen modules: their batch norm keeps its statistics, their dropout is off."""
    model.train()
    for name in frozen:
        bare(model).get_submodule(name).eval()


class EMA:
    """A copy of a model whose weights and batch norm statistics follow it slowly: decay * own + (1 - decay) * its.

    What does not learn, and other buffers, such as a mask of -inf, are the model's own. It remembers about
    1 / (1 - decay) steps. The arithmetic is torch.optim.swa_utils'; its AveragedModel is not used, since it waits for a
    GPU in each step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(bare(model)).requires_grad_(False)
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After each optimizer step."""
        moving = _moving(bare(model))
        pairs = list(zip(_tensors(self.model), _tensors(bare(model)), strict=True))
        averaged = [pair for pair in pairs if id(pair[1]) in moving]
        copied = [pair for pair in pairs if id(pair[1]) not in moving]
        self._average([own for own, _ in averaged], [its for _, its in averaged], 0)
        if copied:
            torch._foreach_copy_([own for own, _ in copied], [its for _, its in copied])  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged weights, by the names that the model has."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from there."""
        self.model.load_state_dict(state)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*itertools.chain(model.parameters(), model.buffers())]


def _moving(model: nn.Module) -> set[int]:
    """By `id` the tensors that a step changes little by little: weights that learn, running means and variances."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    statistics = [buffer for module in norms for buffer in module.buffers(recurse=False)]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {id(tensor) for tensor in (*weights, *statistics) if tensor.is_floating_point()}


class Pretrained(NamedTuple):
    """How pretrained weights fitted, by the names of tensors."""

    left: list[str]  # of the model, which stay as they were made
    unused: list[str]  # of the source, which have no place in the model


def load_pretrained(model: nn.Module, source: str) -> Pretrained:
    """Put pretrained weights into `model` where names and shapes fit.

    `source` is a torchvision name (`ResNet18_Weights.IMAGENET1K_V1`, downloaded once by rank 0 into torch's cache) or a
    file of weights or of a checkpoint. Every rank calls this. Raises BadInput, on all of them, for a source that is
    neither, and where less than half of the tensors fit: that is another architecture.
    """
    state = on_main(lambda: _read_weights(source))
    own = model.state_dict()
    if all(name.startswith("module.") for name in state) and not any(name.startswith("module.") for name in own):
        state = {name.removeprefix("module."): value for name, value in state.items()}  # saved inside DataParallel
    fitting = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    left = [name for name in own if name not in fitting]
    if len(fitting) < len(own) / 2:
        raise BadInput(
            f"--pretrained {source} is of another architecture: {len(fitting)} of {len(own)} tensors fit; "
            f"these do not: {', '.join(left[:5])}{', and more' if len(left) > 5 else ''}."
        )
    model.load_state_dict({**own, **fitting})
    return Pretrained(left, [name for name in state if name not in own])


def _read_weights(source: str) -> Mapping[str, torch.Tensor]:
    from torchvision.models import get_weight

    if Path(source).is_file():
        try:
            found = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:
            raise BadInput(f"--pretrained {source} cannot be read as weights ({type(error).__name__}).") from error
        state = found if isinstance(found, dict) else None
        if state and "model_state_dict" in state:
            state = scored_weights(state)
        if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise BadInput(
                f"--pretrained {source} holds no weights by name; give what torch.save(model.state_dict()) made."
            )
        return state
    try:
        weights = get_weight(source)
    except (ValueError, AttributeError, KeyError):
        raise BadInput(
            f"--pretrained {source} is neither a file nor a name in torchvision, such as ResNet18_Weights.DEFAULT."
        ) from None
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise BadInput(f"--pretrained {source} cannot be downloaded ({error}); give a file of weights.") from None
