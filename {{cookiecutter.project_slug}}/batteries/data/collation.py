"""Collating samples to a batch, with errors that name the sample and the function that returned it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import default_collate

from batteries.core.errors import UserError
from batteries.core.project import source_of
from batteries.metrics.masks import IGNORED

Stack = Callable[[list[torch.Tensor]], torch.Tensor]

COLLATABLE = (torch.Tensor, np.ndarray, np.generic, float, int, str, bytes, dict, list, tuple)
FIXES = {
    "image": "return a uint8 tensor (C, H, W), such as with torchvision.transforms.v2.functional.pil_to_tensor",
    "target": "return a class index, a number or a tensor",
}


class SampleNames(NamedTuple):
    """The names of the samples of a batch, for errors.

    Attributes:
        ids: The ids of the data set; None if it has none.
        indices: The index of each sample of the batch.
    """

    ids: Sequence[str] | None
    indices: Sequence[int]

    def of(self, position: int) -> object:
        """Return the id, or else the index, of a sample, given by its position in the batch."""
        index = self.indices[position]
        return index if self.ids is None else self.ids[index]


def check_sample(dataset: object, sample: Any, names: SampleNames) -> tuple[Any, Any]:
    """Return a sample of a data set. Raises UserError, with the name of the sample, if it is not (image, target)."""
    if isinstance(sample, tuple | list) and len(sample) == 2:
        return sample[0], sample[1]
    kind = f"{len(sample)} values" if isinstance(sample, tuple | list) else f"a {type(sample).__name__}"
    raise UserError(f"{_getitem(dataset)} returned {kind} for sample {names.of(0)}; return (image, target).")


def collate(
    dataset: object, samples: Sequence[tuple[Any, Any]], names: SampleNames, stack: Stack = torch.stack
) -> tuple[Any, Any]:
    """Collate samples of a data set to a batch (images, targets).

    Args:
        dataset: The data set.
        samples: The samples (image, target).
        names: Their names.
        stack: Stacks tensors of one shape and dtype.

    Raises:
        UserError: If a value cannot be collated, such as a PIL image, or the images differ in shape.
    """
    for position, (image, target) in enumerate(samples):
        for part, value in (("image", image), ("target", target)):
            if not isinstance(value, COLLATABLE):
                package = type(value).__module__.partition(".")[0]
                kind = "None" if value is None else f"a {package} {type(value).__name__}"
                raise UserError(
                    f"{_getitem(dataset)} returned {kind} as {part} of sample {names.of(position)}; {FIXES[part]}."
                )
    shapes = [tuple(getattr(image, "shape", ())) for image, _ in samples]
    other = next((position for position, shape in enumerate(shapes) if shape != shapes[0]), None)
    if other is not None:
        raise UserError(
            f"images of one batch have different shapes: {shapes[0]} of {names.of(0)} and {shapes[other]} of "
            f"{names.of(other)}; resize all to one size, such as with v2.Resize in experiment/augmentations.py."
        )
    images, targets = zip(*samples, strict=True)
    return _collate_values(images, stack), _collate_values(targets, stack)


def _collate_values(values: Sequence[Any], stack: Stack) -> Any:
    """Collate the images or the targets of a batch."""
    values = [_from_numpy(value) for value in values]
    if not _can_be_stacked(values):
        return default_collate(values)
    if not all(_is_channels_last(value) for value in values):
        return stack(values)
    # Copying to another order in memory would take several times as long.
    return stack([value.permute(1, 2, 0) for value in values]).permute(0, 3, 1, 2)


def _from_numpy(value: Any) -> Any:
    """Return an array of numbers as a tensor, as torch's collation does, and other values unchanged."""
    return torch.as_tensor(value) if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" else value


def _can_be_stacked(values: Sequence[Any]) -> bool:
    """Return whether all values are tensors on the CPU of one shape and dtype."""
    first = values[0]
    return isinstance(first, torch.Tensor) and all(
        isinstance(value, torch.Tensor)
        and (value.shape, value.dtype, value.device.type) == (first.shape, first.dtype, "cpu")
        and not (value.requires_grad or value.is_sparse)
        for value in values
    )


def _is_channels_last(image: torch.Tensor) -> bool:
    """Return whether the channels of a pixel are side by side in memory, as in decoded images."""
    return image.ndim == 3 and image.shape[0] > 1 and image.stride(0) == 1


def check_class_targets(dataset: object, targets: Any, names: SampleNames, num_classes: int) -> None:
    """Raise UserError if a target of a batch is not an index into the classes: a class, or the pixels of a mask.

    -1, for an unknown class, and IGNORED pixels are accepted.

    On a GPU, the loss would end with an assertion that names neither the target nor the sample.

    Args:
        dataset: The data set.
        targets: The targets; only integers of shape (N,), and masks (N, H, W), are checked.
        names: The names of the samples.
        num_classes: The number of classes; of a single one the targets are not checked, because it can be a number.
    """
    is_index = isinstance(targets, torch.Tensor) and targets.ndim in (1, 3) and not targets.is_floating_point()
    if not is_index or num_classes < 2 or not len(targets):
        return
    if targets.ndim == 3:
        _check_masks(dataset, targets, names, num_classes)
        return
    if targets.min() >= -1 and targets.max() < num_classes:
        return
    position = int(((targets < -1) | (targets >= num_classes)).nonzero()[0])
    raise UserError(
        f"{_getitem(dataset)} returned target {int(targets[position])} for sample {names.of(position)}; with "
        f"{num_classes} classes it must be an integer from 0 to {num_classes - 1}."
    )


def _check_masks(dataset: object, masks: torch.Tensor, names: SampleNames, num_classes: int) -> None:
    is_valid = (masks >= 0) & (masks < num_classes) | (masks == IGNORED)
    if is_valid.all():
        return
    position, row, column = (~is_valid).nonzero()[0].tolist()
    raise UserError(
        f"{_getitem(dataset)} returned a mask with {int(masks[position, row, column])} for sample "
        f"{names.of(position)}; with {num_classes} classes a pixel must be 0 to {num_classes - 1}, or {IGNORED} to be "
        "ignored."
    )


def _getitem(dataset: object) -> str:
    return f"__getitem__ of {type(dataset).__name__} in {source_of(type(dataset))}"
