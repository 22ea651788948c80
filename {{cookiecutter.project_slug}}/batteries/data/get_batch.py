"""The comparison of `get_batch` and `__getitem__` of a data set."""

from typing import Any

import numpy as np
import torch

from batteries.core.errors import UserError
from batteries.core.project import source_of
from batteries.core.seeding import preserved_random_state, reseed
from batteries.data.collation import SampleNames, check_sample, collate
from batteries.data.dataset import dataset_info

NUM_SAMPLES = 8  # samples that are compared
TOLERANCE = 1e-4  # of floats, as a fraction of the largest value: computing a batch rounds differently


def check_get_batch(dataset: Any, indices: np.ndarray) -> None:
    """Raise UserError if `get_batch` and `__getitem__` return different samples.

    Samples are read by the one with a transform and by the other one without, so training and validation could use
    different data. If `__getitem__` draws random numbers, only types and shapes are compared.

    Args:
        dataset: The data set; it need not have `get_batch`.
        indices: Samples, of which a few are read, not in ascending order.
    """
    if getattr(dataset, "get_batch", None) is None or not len(indices):
        return
    chosen = np.unique(np.linspace(0, len(indices) - 1, NUM_SAMPLES).astype(int))[::-1]
    indices = np.asarray(indices)[chosen]
    with preserved_random_state():
        shapes = [getattr(_read(dataset, index)[0], "shape", ()) for index in indices.tolist()]
        indices = indices[[shape == shapes[0] for shape in shapes]]  # images of different shapes have no batch
        single = _read_singly(dataset, indices, seed=0)
        again = _read_singly(dataset, indices, seed=1)
        batch = dataset.get_batch(indices)
    is_random = _find_difference(again, single, "sample", compare_values=True) is not None
    difference = _find_difference(batch, single, "sample", compare_values=not is_random)
    if difference is not None:
        position, text = difference
        name = SampleNames(dataset_info(dataset).ids, indices.tolist()).of(position)
        raise UserError(
            f"get_batch and __getitem__ of {type(dataset).__name__} in {source_of(type(dataset))} differ for sample "
            f"{name}: {text}; return the same from both, or remove get_batch."
        )


def _read_singly(dataset: Any, indices: np.ndarray, seed: int) -> Any:
    reseed(seed)
    samples = [_read(dataset, index) for index in indices.tolist()]
    return collate(dataset, samples, SampleNames(dataset_info(dataset).ids, indices.tolist()))


def _read(dataset: Any, index: int) -> tuple[Any, Any]:
    return check_sample(dataset, dataset[index], SampleNames(dataset_info(dataset).ids, [index]))


def _find_difference(batch: Any, single: Any, name: str, *, compare_values: bool) -> tuple[int, str] | None:
    """Return the position of a sample in which a batch differs from collated samples, and the difference."""
    if isinstance(single, dict) and isinstance(batch, dict) and batch.keys() == single.keys():
        parts = [(f"{name} {key!r}", batch[key], single[key]) for key in single]
    elif isinstance(single, list | tuple) and isinstance(batch, list | tuple) and len(batch) == len(single):
        names = ["image", "target"] if name == "sample" and len(single) == 2 else [name] * len(single)
        parts = list(zip(names, batch, single, strict=True))
    else:
        return _find_difference_of_values(batch, single, name, compare_values=compare_values)
    found = (_find_difference(a, b, part, compare_values=compare_values) for part, a, b in parts)
    return next((difference for difference in found if difference is not None), None)


def _find_difference_of_values(batch: Any, single: Any, name: str, *, compare_values: bool) -> tuple[int, str] | None:
    if not isinstance(batch, torch.Tensor) or not isinstance(single, torch.Tensor):
        is_same = type(batch) is type(single) and batch == single
        return None if is_same else (0, f"get_batch returns {_kind(batch)} for the {name}, instead of {_kind(single)}")
    if batch.shape != single.shape or batch.dtype != single.dtype:
        return 0, f"get_batch returns {_kind(batch)} for the {name}, instead of {_kind(single)}"
    if not compare_values:
        return None
    is_different = ~_is_close(batch, single).reshape(len(single), -1).all(1)
    if not is_different.any():
        return None
    position = int(is_different.nonzero()[0])
    values, others = _range(batch[position]), _range(single[position])
    if values == others:
        return position, f"the {name} is not the same, although both are {values}"
    return position, f"the {name} is {values} from get_batch and {others} from __getitem__"


def _is_close(batch: torch.Tensor, single: torch.Tensor) -> torch.Tensor:
    if not single.is_floating_point():
        return batch == single
    finite = single[single.isfinite()]
    scale = float(finite.abs().max()) if len(finite) else 0.0
    return torch.isclose(batch, single, rtol=0, atol=TOLERANCE * scale, equal_nan=True)


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    shape = f" of shape {value.shape}" if isinstance(value, np.ndarray) else ""
    return f"{type(value).__name__}{shape}"


def _range(values: torch.Tensor) -> str:
    low, high = values.min().item(), values.max().item()
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
