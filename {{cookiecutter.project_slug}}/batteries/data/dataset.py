"""The data set interface, and reading it under per-sample random streams."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from batteries.core.errors import UserError
from batteries.core.seeding import Stream, preserved_random_state, reseed, stream_seeds
from batteries.data.collation import SampleNames, Stack, check_class_targets, check_sample, collate
from batteries.data.transport import SharedBuffers, map_tensors

Transform = Callable[[Any, Any], tuple[Any, Any]]

# Mixes a batch (images, targets) on the device. It must mix each sample only with the one before it, as torchvision's
# MixUp and CutMix do, and draw random numbers once for the batch, not for each sample.
Mixer = Callable[[Any, Any], tuple[Any, Any]]

UNKNOWN = -1  # the class of a sample whose target is not known; such a sample can only be in the test split


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

    - `get_batch(indices) -> (images, targets)` reads many samples at once. It is used without a transform, and must not
      draw random numbers.
    - `check(indices)` raises UserError if a file that training is going to read is missing or damaged.
    - `read_image(path) -> image` reads one image file, as `__getitem__` does. tools/predict.py --images uses it.
    """

    @property
    def classes(self) -> Sequence[str]:
        """A name for each output of the model."""
        ...

    def fingerprint(self) -> str:
        """A hash of the data, which a resumed run compares."""
        ...


@dataclass(frozen=True)
class DatasetInfo:
    """The attributes of a data set, with a default for each one that it does not have.

    Attributes:
        ids: A stable and unique name for each sample.
        targets: The targets: indices into `classes`, shape (N,), or several labels per sample, 0 and 1, shape (N, C),
            UNKNOWN if not known; or floats, shape (N,) or (N, C), NaN if not known. None for masks.
        classes: A name for each output of the model.
        groups: A group for each sample, such as a patient; a group is never in two folds.
        folds: The fold of each sample, shape (N,), if the data set defines them; -1 for the test split.
        official_test: Whether each sample belongs to the official test split, shape (N,), bool, if there is one.
        left_out: The files that are not used, with their number, such as "3 .bmp"; empty if there are none.
        raw_labels: The label of each sample as it is in the data, such as "2.0" of the class "2"; None for class names.
        suffixes: The suffixes of image files, in lower case; None for the default.
        read_image: The reader of one image file, from its path; None if there is none.
    """

    ids: Sequence[str] | None = None
    targets: Any = None
    classes: Sequence[str] | None = None
    groups: Sequence[Any] | None = None
    folds: Any = None
    official_test: Any = None
    left_out: str = ""
    raw_labels: Sequence[str] | None = None
    suffixes: Sequence[str] | None = None
    read_image: Callable[[Any], Any] | None = None


def dataset_info(dataset: object) -> DatasetInfo:
    """Read the attributes of a data set, which are all optional here."""
    return DatasetInfo(
        ids=getattr(dataset, "ids", None),
        targets=getattr(dataset, "targets", None),
        classes=getattr(dataset, "classes", None),
        groups=getattr(dataset, "groups", None),
        folds=getattr(dataset, "folds", None),
        official_test=getattr(dataset, "official_test", None),
        left_out=getattr(dataset, "left_out", ""),
        raw_labels=getattr(dataset, "raw_labels", None),
        suffixes=getattr(dataset, "suffixes", None),
        read_image=getattr(dataset, "read_image", None),
    )


def has_classes(dataset: object) -> bool:
    """Return whether the targets are indices into `classes`. A single class can be the name of a number."""
    info = dataset_info(dataset)
    if info.classes is None or info.targets is None or np.ndim(info.targets) != 1:
        return False
    return len(info.classes) > 1 or not np.issubdtype(np.asarray(info.targets).dtype, np.floating)


def has_labels(dataset: object) -> bool:
    """Return whether the targets are several labels per sample, shape (N, C): 1 if present, 0 if not, or UNKNOWN."""
    targets = dataset_info(dataset).targets
    if targets is None or np.ndim(targets) != 2:
        return False
    values = np.asarray(targets)
    return not np.issubdtype(values.dtype, np.floating) or bool(np.isin(values, (0, 1, UNKNOWN)).all())


def has_numbers(dataset: object) -> bool:
    """Return whether the targets are numbers, shape (N,) or (N, C); NaN if not known."""
    targets = dataset_info(dataset).targets
    if targets is None or has_classes(dataset) or has_labels(dataset):
        return False
    return np.issubdtype(np.asarray(targets).dtype, np.floating)


class SampleRequest(NamedTuple):
    """What the loader requests from a worker.

    Attributes:
        indices: The samples, shape (N,).
        seeds: A seed for each sample, shape (N,); None if nothing is drawn.
    """

    indices: np.ndarray
    seeds: np.ndarray | None


@dataclass(frozen=True)
class WorkerError:
    """What a worker sends instead of a batch after a UserError; torch would send a traceback as text."""

    message: str


class SeededDataset:
    """A data set as the loader reads it: in batches, each sample under its own random stream.

    Attributes:
        dataset: The data set.
        transform: Applied to each sample; None if there is none.
        ids: The ids of the data set; None if it has none.
        num_classes: The number of its classes.
        buffers: In a worker, the memory in which it sends its batches; otherwise None.
    """

    def __init__(self, dataset: Samples, transform: Transform | None) -> None:
        self.dataset = dataset
        self.transform = transform
        info = dataset_info(dataset)
        self.ids = info.ids
        self.num_classes = len(info.classes or ())
        self.buffers: SharedBuffers | None = None
        self._get_batch = getattr(dataset, "get_batch", None) if transform is None else None

    def __len__(self) -> int:
        return len(self.dataset)

    def make_seeds(self, count: int, *key: int) -> np.ndarray | None:
        """Return the seeds of `count` samples of an epoch; None if `get_batch` reads them, which draws nothing."""
        return None if self._get_batch is not None else stream_seeds(count, *key, Stream.SAMPLE)

    def __getitems__(self, request: SampleRequest) -> Any:
        """Return the collated batch, or a WorkerError. torch calls this with the item of the batch sampler."""
        try:
            if self.buffers is None:
                return self._load(request, torch.stack)
            self.buffers.start_batch()
            return map_tensors(self._load(request, self.buffers.stack), self.buffers.place)
        except UserError as error:
            return WorkerError(str(error))

    def _load(self, request: SampleRequest, stack: Stack) -> Any:
        indices = request.indices.tolist()
        names = SampleNames(self.ids, indices)
        if self._get_batch is not None:
            batch = self._get_batch(request.indices)
        else:
            assert request.seeds is not None
            with preserved_random_state():
                pairs = zip(indices, request.seeds.tolist(), strict=True)
                samples = [self._sample(index, seed) for index, seed in pairs]
            batch = collate(self.dataset, samples, names, stack)
        check_class_targets(self.dataset, batch[1], names, self.num_classes)
        return batch

    def _sample(self, index: int, seed: int) -> tuple[Any, Any]:
        reseed(seed)
        sample = check_sample(self.dataset, self.dataset[index], SampleNames(self.ids, [index]))
        return sample if self.transform is None else self.transform(*sample)


def receive(loaded: Any, device: torch.device) -> tuple[Any, Any]:
    """Move a batch that a worker sent to `device`.

    Returns:
        (images, targets).

    Raises:
        UserError: If the worker sent a WorkerError.
    """
    if isinstance(loaded, WorkerError):
        raise UserError(loaded.message)
    images, targets = loaded
    return to_device(images, device), to_device(targets, device)


def to_device(data: Any, device: torch.device) -> Any:
    """Move a tensor, or the tensors in lists, tuples and dicts, to `device`; a GPU works during the copy."""
    return map_tensors(data, lambda tensor: tensor.to(device, non_blocking=True))
