"""Training steps of a fixed number of shards, with the same bits for any number of ranks (`--shards`).

The batch of a step is divided into S shards. Each of W ranks has S / W consecutive ones, and makes a forward and
backward pass for each, so that every kernel gets the same shapes for any W. Gradients and batch norm statistics are
added in the fixed order of `batteries.distributed.tree_sum`. EasyScale (Li et al. 2022, arXiv 2208.14228) has the same
idea.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from batteries.core.errors import RunError, UserError
from batteries.core.ranks import world_size
from batteries.core.text import count_of
from batteries.distributed.tree_sum import TreeSum, broadcast_in_buckets, tree_sum_over_ranks
from batteries.distributed.unwrap import ModelWrapper
from batteries.training.nonfinite import BufferSnapshot


def check_shards(shards: int, *, data_parallel: bool, compiled: bool, deterministic: bool) -> None:
    """Raise UserError for a number of shards that is impossible, or options with which results could differ."""
    ranks = world_size()
    if shards & (shards - 1):
        below = 1 << (shards.bit_length() - 1)
        raise UserError(f"--shards {shards} must be a power of two; use {below} or {2 * below}.")
    if shards % ranks:
        sizes = ", ".join(str(1 << power) for power in range(shards.bit_length()))
        divided = f"--shards {shards} cannot be divided by {count_of(ranks, 'process')}"
        raise UserError(f"{divided}; use a number of these (NPROC): {sizes}.")
    if data_parallel:
        raise UserError("--shards and --data-parallel exclude each other; use scripts/train_ddp.sh with --shards.")
    if compiled:
        raise UserError(
            "--shards and --compile exclude each other: compiled kernels may round differently; remove one."
        )
    if not deterministic:
        raise UserError("--shards needs deterministic kernels; remove --no-deterministic.")


def _check_modules(model: nn.Module) -> None:
    """Raise UserError for batch norm with the statistics of all ranks."""
    synchronised = [name for name, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm)]
    if synchronised:
        raise UserError(
            f"--shards has the batch norm statistics of a shard, and the layer {synchronised[0]} is an "
            "nn.SyncBatchNorm, which has those of all processes; use nn.BatchNorm2d in build_model."
        )


def _are_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors have the same bits; NaN equals NaN."""
    return first.shape == second.shape and bool(((first == second) | (first.isnan() & second.isnan())).all())


class ShardedModel(ModelWrapper):
    """A model whose steps consist of shards.

    After the last shard of a step, the gradient of each parameter is the sum over all shards of all ranks. Running
    statistics of batch norm are the mean of those after each shard, which begin with the same values; other buffers are
    those after the first shard.

    Args:
        module: The model; parameters that require no gradient now get none.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._named_modules = list(module.named_modules())
        self._named_parameters = list(module.named_parameters())
        self._trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._has_gradient: list[bool] = []  # for each of them, in any shard of this rank so far
        self._gradients = TreeSum()
        self._statistics = TreeSum()
        self._first_buffers: list[torch.Tensor] = []  # other buffers, after the first shard
        self._is_first_step = True
        _check_modules(module)
        broadcast_in_buckets([*module.parameters(), *module.buffers()])
        self._buffers_of_step = BufferSnapshot(module)

    @contextmanager
    def shard(self, *, ends_step: bool) -> Iterator[None]:
        """Open the context for the forward and backward pass of one shard.

        Args:
            ends_step: Whether it is the last shard of this rank in a step.
        """
        if self._gradients.is_empty:
            self._buffers_of_step.save()
        else:
            self._buffers_of_step.restore()
        layout = self._describe_buffers()
        versions = self._parameter_versions()
        values = [parameter.detach().clone() for _, parameter in self._named_parameters] if self._is_first_step else []
        yield
        self._check_buffers(layout)
        self._check_parameters(versions, values)
        self._add_gradients()
        self._add_buffers()
        if ends_step:
            self._is_first_step = False
            self._finish_gradients()
            self._finish_buffers()

    def _add_gradients(self) -> None:
        """Take the gradients of this shard from the parameters. One that is missing is zero."""
        gradients = [parameter.grad for parameter in self._trainable]
        if self._gradients.is_empty:
            self._has_gradient = [False] * len(gradients)
        pairs = zip(self._has_gradient, gradients, strict=True)
        self._has_gradient = [before or gradient is not None for before, gradient in pairs]
        leaf = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(self._trainable, gradients, strict=True)
        ]
        if any(gradient.is_sparse for gradient in leaf):
            raise RunError("a gradient is sparse, which --shards does not support; set sparse=False in nn.Embedding.")
        self._gradients.add(leaf)
        for parameter in self._trainable:
            parameter.grad = None

    def _finish_gradients(self) -> None:
        """Give the parameters the sum over all shards; none to parameters that had none in any of them."""
        _, gradients = self._gradients.take()
        has_gradient = self._has_gradient
        if world_size() > 1 and gradients:
            counts = torch.tensor(has_gradient, dtype=gradients[0].dtype).to(gradients[0].device, non_blocking=True)
            tree_sum_over_ranks([*gradients, counts])
            if not all(has_gradient):  # other ranks may have one; reading it waits for the device
                has_gradient = counts.bool().tolist()
        for parameter, gradient, is_known in zip(self._trainable, gradients, has_gradient, strict=True):
            parameter.grad = gradient if is_known else None

    def _add_buffers(self) -> None:
        statistics, others = self._find_buffers()
        if self._statistics.is_empty:
            self._first_buffers = [buffer.clone() for buffer in others]
        self._statistics.add([buffer.clone() for buffer in statistics])

    def _finish_buffers(self) -> None:
        statistics, others = self._find_buffers()
        shards, means = self._statistics.take()
        tree_sum_over_ranks(means)
        broadcast_in_buckets(self._first_buffers)
        if means:
            torch._foreach_mul_(means, 1 / (shards * world_size()))  # type: ignore[attr-defined]
            torch._foreach_copy_(statistics, means)  # type: ignore[attr-defined]
        if others:
            torch._foreach_copy_(others, self._first_buffers)  # type: ignore[attr-defined]

    def _find_buffers(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the running statistics, and the other buffers."""
        norms = [module for _, module in self._named_modules if isinstance(module, _NormBase)]
        statistics = [
            buffer for module in norms for buffer in module.buffers(recurse=False) if buffer.is_floating_point()
        ]
        known = {id(buffer) for buffer in statistics}
        others = [buffer for buffer in self.module.buffers() if id(buffer) not in known]
        return statistics, others

    def _describe_buffers(self) -> dict[tuple[str, str], tuple[torch.Size, torch.dtype] | None]:
        """Return the shape and type of each buffer by (module, name); None for one without a value."""
        return {
            (module_name, name): None if buffer is None else (buffer.shape, buffer.dtype)
            for module_name, module in self._named_modules
            for name, buffer in module._buffers.items()
        }

    def _check_buffers(self, before: dict[tuple[str, str], tuple[torch.Size, torch.dtype] | None]) -> None:
        """Raise RunError if a shard added or removed a buffer, or changed its shape or type.

        Each rank finds that in its own shards, so it is an error for any number of ranks.
        """
        after = self._describe_buffers()
        changed = [place for place in before | after if before.get(place) != after.get(place)]
        if changed:
            name = ".".join(filter(None, changed[0]))
            raise RunError(
                f"the forward pass adds the buffer {name}, or changes its shape or type, and --shards needs fixed "
                "ones; create it in __init__, or train without --shards."
            )

    def _parameter_versions(self) -> list[int]:
        """Return how often each parameter was changed in place."""
        return [parameter._version for _, parameter in self._named_parameters]

    def _check_parameters(self, versions: list[int], values: list[torch.Tensor]) -> None:
        """Raise RunError if a shard changed a parameter, which the shards of other ranks would not see.

        A change through `.data` does not increase the version. So in the first step the values are compared too.

        Args:
            versions: The versions before the shard.
            values: The values before the shard; empty after the first step.
        """
        named = zip(self._named_parameters, versions, strict=True)
        changed = [name for (name, parameter), version in named if parameter._version != version]
        pairs = zip(self._named_parameters, values, strict=False)
        changed += [name for (name, parameter), value in pairs if not _are_equal(parameter, value)]
        if changed:
            raise RunError(
                f"the forward pass changes the parameter {changed[0]} (as nn.Embedding with max_norm does), and with "
                "--shards only the optimizer may; remove that, or train without --shards."
            )
