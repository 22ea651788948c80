"""Reading packs: smaller copies of image data sets, which tools/pack.py writes.

A JPEG pack has the names of its source, so that the class of the data set reads it as any other directory. A raw pack
holds the pixels of all images in one file, which is mapped into memory, and a table of everything else.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from batteries.core.command_line import shell_command
from batteries.core.errors import UserError
from batteries.core.files import read_json
from batteries.data.dataset import Samples, dataset_info

PACK = "pack.json"  # written last
UNFINISHED = "pack.unfinished.json"  # written first
PIXELS = "images.bin"
INDEX = "index.npz"
VERSION = 1
INDEX_ARRAYS = ("ids", "classes", "targets", "groups", "folds", "official_test", "raw_labels")  # if a data set has them


class FileDataset(Samples, Protocol):
    """A data set of image files: the id of a sample is the path of its file in `data_dir`."""

    data_dir: Path

    def read_image(self, path: Path) -> torch.Tensor:
        """Return the image (C, H, W) of a file."""
        ...


@dataclass(frozen=True)
class PackRecord:
    """The contents of pack.json.

    Attributes:
        kind: jpeg or raw.
        side: The longest that the shorter side of an image may be, in pixels.
        quality: The JPEG quality, 1 to 100; None in a raw pack.
        source: The directory of the original data.
        source_files: A hash of the names, sizes and modification times of its files.
        resize: How images are made smaller.
        versions: The versions of the libraries that made the pack.
        files: A hash of the files of the pack; empty until the pack is finished.
        images: The number of images.
        bytes: The size of the pack.
        version: The version of this format.
    """

    kind: str
    side: int
    quality: int | None
    source: str
    source_files: str
    resize: str
    versions: dict[str, str]
    files: str = ""
    images: int = 0
    bytes: int = 0
    version: int = VERSION

    def command(self, output: Path, *more: str) -> str:
        """Return the command that makes this pack."""
        how = ["--raw"] if self.kind == "raw" else ["--quality", str(self.quality)]
        words = ["python", "tools/pack.py", "--data-dir", self.source, "--output", str(output)]
        return shell_command(*words, "--side", str(self.side), *how, *more)

    def to_json(self) -> str:
        """Return the text of the file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def is_pack(directory: Path) -> bool:
    """Return whether a directory is a pack, finished or not."""
    return (directory / PACK).is_file() or (directory / UNFINISHED).is_file()


def read_record(file: Path) -> PackRecord:
    """Read pack.json or pack.unfinished.json. Raises UserError if it is damaged."""
    values = read_json(file)
    try:
        record = PackRecord(**values)
    except TypeError:
        raise UserError(f"{file} was not written by this version of tools/pack.py; make the pack again.") from None
    if record.version != VERSION:
        raise UserError(f"{file} has format version {record.version} instead of {VERSION}; make the pack again.")
    return record


def open_data(data_dir: Path, build: Callable[[Path], Any]) -> Any:
    """Return the data set in a directory, which may be a pack of it.

    Args:
        data_dir: The directory.
        build: Builds the data set from a directory of image files.

    Raises:
        UserError: If the pack is not finished, was edited, or its source has changed since. The source is compared only
            if its directory still exists.
    """
    data_dir = Path(data_dir)
    if not is_pack(data_dir):
        return build(data_dir)
    if not (data_dir / PACK).is_file():
        command = read_record(data_dir / UNFINISHED).command(data_dir)
        raise UserError(f"--data-dir {data_dir} is an unfinished pack; finish it with: {command}")
    record = read_record(data_dir / PACK)
    repair = record.command(data_dir, "--overwrite")
    try:
        dataset = RawPack(data_dir, build) if record.kind == "raw" else build(data_dir)
    except (UserError, OSError, ValueError, KeyError) as error:
        raise UserError(f"--data-dir {data_dir} is a damaged pack ({error}); make it again with: {repair}") from None
    if hash_files(data_dir, pack_files(record, dataset)) != record.files:
        raise UserError(f"--data-dir {data_dir} is a pack whose files were changed; make it again with: {repair}")
    source = Path(record.source)
    if source.is_dir() and hash_source(build(source)) != record.source_files:
        raise UserError(
            f"--data-dir {data_dir} is a pack of {source}, which has changed since; pack it again with: {repair}"
        )
    return dataset


def pack_files(record: PackRecord, dataset: Any) -> list[str]:
    """List the files of a finished pack, without pack.json."""
    return [PIXELS, INDEX] if record.kind == "raw" else source_files(dataset)


def source_files(dataset: FileDataset) -> list[str]:
    """List the files of a data set: images and tables, relative to its directory."""
    return [*image_paths(dataset), *getattr(dataset, "tables", ())]


def image_paths(dataset: FileDataset) -> Sequence[str]:
    """Return the path of each image relative to the directory of the data set: `paths` if it has them, else `ids`."""
    return getattr(dataset, "paths", dataset.ids)


def hash_source(dataset: FileDataset) -> str:
    """Return a hash of the names, sizes and modification times of the files of a data set."""
    return _hash(dataset.data_dir, source_files(dataset), lambda status: f"{status.st_size} {status.st_mtime_ns}")


def hash_files(directory: Path, names: Iterable[str]) -> str:
    """Return a hash of the names and sizes of files; a copy of a pack has the same one."""
    return _hash(directory, names, lambda status: str(status.st_size))


def _hash(directory: Path, names: Iterable[str], describe: Callable[[os.stat_result], str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        try:
            text = describe(os.stat(directory / name))
        except OSError:
            text = "missing"
        digest.update(f"{name}\0{text}\n".encode())
    return digest.hexdigest()


class RawPack:
    """The images of a raw pack, uint8 tensors (3, H, W), with the classes, groups and folds of the source.

    Args:
        data_dir: The directory of the pack.
        kind: The class of the source, which reads image files that are not in the pack.
    """

    def __init__(self, data_dir: Path, kind: Any) -> None:
        self.data_dir = data_dir
        self.kind = kind
        self.suffixes = getattr(kind, "suffixes", None)
        with np.load(data_dir / INDEX) as index:
            self.ids: Sequence[str] = index["ids"].tolist()
            self.shapes: np.ndarray = index["shapes"]  # (N, 3): height, width, channels
            self.targets: Any = index.get("targets")
            self.groups = index.get("groups")
            self.folds = index.get("folds")
            self.official_test = index.get("official_test")
            self.raw_labels = index.get("raw_labels")
            classes = index.get("classes")
        self.classes: Sequence[str] | None = None if classes is None else tuple(classes.tolist())
        self.starts = np.concatenate([[0], np.cumsum(np.prod(self.shapes, 1, dtype=np.int64))])
        self.left_out = ""
        self._pixels: np.ndarray | None = None  # mapped by each process for itself

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapped file out, which a spawned worker maps again."""
        return self.__dict__ | {"_pixels": None}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        """Return a copy of one image (C, H, W), channels last in memory, and its target."""
        if self._pixels is None:
            self._pixels = np.memmap(self.data_dir / PIXELS, np.uint8, "r")
        pixels = self._pixels[self.starts[index] : self.starts[index + 1]].copy()
        image = torch.from_numpy(pixels).view(*self.shapes[index].tolist()).permute(2, 0, 1)
        target = self.targets[index]
        return image, torch.from_numpy(target) if target.ndim else target.item()

    def read_image(self, path: Path) -> torch.Tensor:
        """Return the image (C, H, W) of a file, as the class of the source reads it."""
        return self.kind.read_image(self, path)

    def fingerprint(self) -> str:
        """Return a hash of the index and of the record of the pack."""
        digest = hashlib.sha256((self.data_dir / INDEX).read_bytes())
        digest.update((self.data_dir / PACK).read_bytes())
        return digest.hexdigest()


def index_arrays(dataset: Any, shapes: np.ndarray) -> dict[str, np.ndarray]:
    """Return the arrays of the index of a raw pack.

    Args:
        dataset: The source.
        shapes: Height, width and channels of each packed image, shape (N, 3).

    Raises:
        UserError: If an attribute is neither numbers nor texts.
    """
    info = dataset_info(dataset)
    values = {name: getattr(info, name) for name in INDEX_ARRAYS}
    arrays = {name: np.asarray(value) for name, value in values.items() if value is not None}
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise UserError(
                f"{name} of {type(dataset).__name__} cannot be stored in a raw pack; use numbers or texts, or leave "
                "out --raw."
            )
    return arrays | {"shapes": shapes}
