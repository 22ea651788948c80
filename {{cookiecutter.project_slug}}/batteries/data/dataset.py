"""The data set interface, and reading it under per-sample random streams."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import default_collate

from batteries.core.errors import UserError
from batteries.core.seeding import Stream, preserved_random_state, reseed, stream_seeds

Transform = Callable[[Any, Any], tuple[Any, Any]]

# Mixes a batch (images, targets) on the device, each sample with the one before it alone (torchvision's MixUp and
# CutMix do), and draws for the batch, not for a sample.
Mixer = Callable[[Any, Any], tuple[Any, Any]]


class Samples(Protocol):
    """What a loader reads: an index gives one (image, target)."""

    @property
    def ids(self) -> Sequence[str]:
        """A stable and unique name for each sample."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Any, Any]: ...


class Dataset(Samples, Protocol):
    """What experiment/dataset.py provides.

    It may have the optional attributes of `DatasetInfo` as well, and these methods:

    - `get_batch(indices) -> (images, targets)` reads many samples at once. It is used if there is no transform, and
      must not draw random numbers.
    - `check(indices)` raises UserError if a file that training is going to read is missing or damaged.
    """

    @property
    def classes(self) -> Sequence[str]:
        """A name for each output of the model."""
        ...

    def fingerprint(self) -> str:
        """A hash of the data, which a resumed run compares."""
        ...


class SampleRequest(NamedTuple):
    """What a worker is asked for: samples by index, and one seed each; none where nothing is drawn."""

    indices: np.ndarray
    seeds: np.ndarray | None


@dataclass(frozen=True)
class WorkerError:
    """What a worker sends instead of a batch where the data are bad."""

    sentence: str


class SeededDataset:
    """A data set as the loader reads it: by whole batches, each sample under its own random stream."""

    def __init__(self, dataset: Samples, transform: Transform | None) -> None:
        self.dataset = dataset
        self.transform = transform
        self._get_batch = getattr(dataset, "get_batch", None) if transform is None else None

    def __len__(self) -> int:
        return len(self.dataset)

    def make_seeds(self, count: int, *key: int) -> np.ndarray | None:
        """The seeds of `count` samples in an epoch; none where they are read by whole batches, which draw nothing."""
        return None if self._get_batch is not None else stream_seeds(count, *key, Stream.SAMPLE)

    def __getitems__(self, request: SampleRequest) -> Any:
        """A collated batch; torch's fetcher calls this with whatever the batch sampler gave.

        A Refusal where the user has to mend something: torch would send an error of a worker as a page of text.
        """
        try:
            return self._load(request)
        except Exception as error:
            if isinstance(error, UserError):
                return WorkerError(str(error))
            raise

    def _load(self, request: SampleRequest) -> Any:
        if self._get_batch is not None:
            return self._get_batch(request.indices)
        assert request.seeds is not None
        with preserved_random_state():
            pairs = zip(request.indices.tolist(), request.seeds.tolist(), strict=True)
            samples = [self._sample(index, seed) for index, seed in pairs]
        self._check_shapes(samples, request.indices)
        return default_collate(samples)

    def _check_shapes(self, samples: Sequence[tuple[Any, Any]], indices: np.ndarray) -> None:
        """Raise BadInput where images of one batch differ in shape."""
        shapes = [tuple(getattr(image, "shape", ())) for image, _ in samples]
        if len(set(shapes)) == 1:
            return
        place = next(place for place, shape in enumerate(shapes) if shape != shapes[0])
        ids = getattr(self.dataset, "ids", range(len(self.dataset)))
        raise UserError(
            f"images of one batch have different shapes: {shapes[0]} of {ids[int(indices[0])]} and {shapes[place]} of "
            f"{ids[int(indices[place])]}; bring all to one size, such as by v2.Resize in experiment/augmentations.py."
        )

    def _sample(self, index: int, seed: int) -> tuple[Any, Any]:
        reseed(seed)
        sample = self.dataset[index]
        return sample if self.transform is None else self.transform(*sample)


def receive(loaded: Any, device: torch.device) -> tuple[Any, Any]:
    """(images, targets) as a worker sent them, on `device`. Raises BadInput with what it had to say instead."""
    if isinstance(loaded, WorkerError):
        raise UserError(loaded.sentence)
    images, targets = loaded
    return to_device(images, device), to_device(targets, device)


def to_device(data: Any, device: torch.device) -> Any:
    """`data` (a tensor, or tensors in lists, tuples and dicts) on `device`; the copy overlaps with work on a GPU."""
    if isinstance(data, torch.Tensor):
        return data.to(device, non_blocking=True)
    if isinstance(data, dict):
        return {name: to_device(value, device) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(to_device(value, device) for value in data)
    return data


UNKNOWN = -1  # the class of a sample whose target is not known: it can only be tested


def has_classes(dataset: Dataset) -> bool:
    """Whether a sample's target is one of the data set's `classes`; a single one may name a number that is learned."""
    targets, classes = getattr(dataset, "targets", None), getattr(dataset, "classes", None)
    if classes is None or targets is None or np.ndim(targets) != 1:
        return False
    return len(classes) > 1 or not np.issubdtype(np.asarray(targets).dtype, np.floating)
