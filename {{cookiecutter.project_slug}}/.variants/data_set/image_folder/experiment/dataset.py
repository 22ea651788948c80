"""The data set: image files in one directory per class.

    data/cats/1.jpg  data/dogs/1.jpg                          split by experiment/splits.py
    data/train/cats/1.jpg  data/test/cats/2.jpg               with an official test split
    data/train/…  data/valid/…  data/test/…                   with an official validation split too, which is --fold 0

`--data-dir` is the directory of the classes, or of train, valid and test.
"""

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from batteries.core.errors import UserError
from batteries.core.text import count_of
from batteries.data.image_decoding import IMAGE_SUFFIXES
from experiment.images import file_size, find_invalid_files, read_image

FOLD_OF = {"train": 1, "valid": 0, "val": 0, "test": -1}  # directories of official splits, and their folds
SPLIT_NAMES = {*FOLD_OF, "training", "testing", "validation"}  # names that are not accepted as classes
MAX_LISTED = 5  # files that an error message lists


class ImageFolder:
    """Images as uint8 tensors (3, H, W), 0 to 255, of any sizes; targets are indices into `classes`.

    An id is the path relative to `data_dir`. Files and directories whose names begin with a dot are ignored.
    batteries/data/dataset.py documents the attributes and methods that a data set can have.

    Args:
        data_dir: The directory of the classes, or of the official splits.

    Raises:
        UserError: If there are fewer than two classes, or a directory is neither a class nor a split.
    """

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = Path(data_dir)
        check_split_directories(self.data_dir)
        splits = [name for name in FOLD_OF if (self.data_dir / name).is_dir()]
        roots = splits if "train" in splits else ["."]
        self.classes = find_classes(self.data_dir, roots)
        files = [
            (root, target, path)
            for root in roots
            for target, name in enumerate(self.classes)
            for path in files_in(self.data_dir / root / name)
        ]
        self.left_out = describe_left_out([path for *_, path in files], [self.data_dir / root for root in roots])
        images = [file for file in files if is_image(file[2])]
        check_not_empty(self.data_dir, roots[0], len(images), self.classes, self.left_out)
        self.ids = [path.relative_to(self.data_dir).as_posix() for _, _, path in images]
        check_ids(self.data_dir, self.ids)
        self.targets = np.array([target for _, target, _ in images])
        folds = np.array([FOLD_OF.get(root, 0) for root, _, _ in images])
        self.official_test = folds == -1 if "test" in roots else None
        self.folds = folds if {"valid", "val"} & set(roots) else None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return one image (3, H, W) and its target."""
        return read_image(self.data_dir / self.ids[index]), int(self.targets[index])

    def check(self, indices: np.ndarray) -> None:
        """Raise UserError with the names of files among `indices` that are truncated or not images."""
        if invalid := find_invalid_files([self.data_dir / self.ids[index] for index in indices]):
            names = ", ".join(self.ids[indices[position]] for position in invalid[:MAX_LISTED])
            raise UserError(
                f"--data-dir {self.data_dir} has {count_of(len(invalid), 'truncated or invalid file')}: {names}; fix "
                "or remove them."
            )

    def fingerprint(self) -> str:
        """Return a hash of the names, classes and sizes of the files; no file is opened."""
        digest = hashlib.sha256()
        for name, target in zip(self.ids, self.targets.tolist(), strict=True):
            digest.update(f"{name}\0{target}\0{file_size(self.data_dir / name)}\n".encode())
        return digest.hexdigest()


def check_split_directories(data_dir: Path) -> None:
    """Raise UserError if splits have other names, or a directory with images next to train is not a split."""
    names = sorted(directory.name for directory in directories_in(data_dir))
    if "train" not in map(str.lower, names):
        if names and {name.lower() for name in names} <= SPLIT_NAMES:
            raise UserError(
                f"--data-dir {data_dir} has the directories {', '.join(names)}, which are splits and not classes; "
                "rename them to train, valid and test, of which train is required."
            )
        return
    invalid = [
        name
        for name in names
        if name not in FOLD_OF and (name.lower() in FOLD_OF or any(map(is_image, files_in(data_dir / name))))
    ]
    if invalid:
        raise UserError(
            f"--data-dir {data_dir} has a directory train, so its directories must be splits named train, valid and "
            f"test in lower case, but it has {', '.join(invalid)}; rename or move these, or rename train if it is a "
            "class."
        )


def check_not_empty(data_dir: Path, root: str, num_images: int, classes: tuple[str, ...], left_out: str) -> None:
    """Raise UserError without images, or with fewer than two classes."""
    if not num_images:
        others = f"; left out: {left_out}" if left_out else ""
        raise UserError(
            f"--data-dir {data_dir} has no images in directories of classes, such as {data_dir / root}/cats/1.jpg"
            f"{others} (supported: {', '.join(IMAGE_SUFFIXES)})."
        )
    if len(classes) == 1:
        raise UserError(
            f"--data-dir {data_dir} has only one class, {classes[0]}; add directories of other classes"
            f"{suggest_subdirectory(data_dir / root / classes[0])}."
        )


def check_ids(data_dir: Path, ids: list[str]) -> None:
    """Raise UserError if a split file cannot contain an id, because it is not UTF-8 or has a carriage return."""
    for name in ids:
        if not is_utf8(name) or "\r" in name:
            raise UserError(
                f"--data-dir {data_dir} has a file named {name!r}, which a table cannot contain; rename it."
            )


def is_utf8(name: str) -> bool:
    """Return whether a file name can be encoded as UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def find_classes(data_dir: Path, roots: list[str]) -> tuple[str, ...]:
    """Return the names of the directories in `roots`, sorted."""
    return tuple(sorted({directory.name for root in roots for directory in directories_in(data_dir / root)}))


def directories_in(directory: Path) -> list[Path]:
    """List the directories in `directory`, without hidden ones."""
    if not directory.is_dir():
        return []
    return [path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")]


def files_in(directory: Path) -> list[Path]:
    """List the files in `directory` and below it, sorted, without hidden files and directories.

    Symbolic links are followed; a directory that is reached twice is read once.
    """
    found: list[Path] = []
    visited: set[str] = set()
    for parent, directories, names in os.walk(directory, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            directories.clear()
            continue
        visited.add(real)
        directories[:] = [name for name in directories if not name.startswith(".")]
        paths = [Path(parent, name) for name in (*names, *directories) if not name.startswith(".")]
        found += [path for path in paths if is_image(path) or path.is_file()]
    return sorted(found)


def is_image(path: Path) -> bool:
    """Return whether a file has the suffix of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def suggest_subdirectory(directory: Path) -> str:
    """Suggest another --data-dir if `directory` has directories of images itself."""
    below = [path.name for path in directories_in(directory) if any(map(is_image, files_in(path)))]
    return f", or use --data-dir {directory} if its directories are the classes" if len(below) > 1 else ""


def describe_left_out(paths: list[Path], roots: list[Path]) -> str:
    """Count the files of other types among `paths`, and the images in `roots` that are in no class directory."""
    counts = Counter(path.suffix.lower() or path.name for path in paths if not is_image(path))
    counts["in no class directory"] = sum(is_image(path) for root in roots for path in root.glob("[!.]*"))
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def load_dataset(data_dir: Path) -> ImageFolder:
    """Load the data set of this experiment."""
    return ImageFolder(data_dir)
