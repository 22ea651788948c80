"""The data set: image files in one directory per class.

    data/cats/1.jpg  data/dogs/1.jpg                          split by experiment/splits.py
    data/train/cats/1.jpg  data/test/cats/2.jpg               with an official test split
    data/train/…  data/valid/…  data/test/…                   with an official validation split too, which is --fold 0
    data/train/…  data/test/unknown/1.jpg                     with test images whose classes are not known

`--data-dir` is the directory of the classes, or of train, valid and test.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from batteries.core.errors import UserError
from batteries.core.text import count_of, list_first
from batteries.data.classes import class_name, sort_classes
from batteries.data.dataset import UNKNOWN
from batteries.data.image_files import check_names, count_suffixes, find_files, is_image
from batteries.data.packs import open_data
from experiment.images import SUFFIXES, file_size, find_invalid_files, read_image

FOLD_OF = {"train": 1, "valid": 0, "val": 0, "test": -1}  # directories of official splits, and their folds
SPLIT_NAMES = {*FOLD_OF, "training", "testing", "validation"}  # names that are not accepted as classes
UNKNOWN_CLASS = "unknown"  # the directory in test/ with images whose classes are not known
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

    suffixes = SUFFIXES

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = Path(data_dir)
        check_split_directories(self.data_dir)
        splits = [name for name in FOLD_OF if (self.data_dir / name).is_dir()]
        roots = splits if "train" in splits else ["."]
        self.classes = find_classes(self.data_dir, roots)
        files = [
            (root, target, path)
            for root in roots
            for target, directory in class_directories(self.data_dir / root, self.classes)
            for path in find_files(directory, SUFFIXES)
        ]
        images = [file for file in files if is_image(file[2], SUFFIXES)]
        others = [path for *_, path in files if not is_image(path, SUFFIXES)]
        self.left_out = describe_left_out(others, [self.data_dir / root for root in roots])
        check_not_empty(self.data_dir, roots[0], len(images), self.classes, self.left_out)
        self.ids = [path.relative_to(self.data_dir).as_posix() for _, _, path in images]
        check_names(f"--data-dir {self.data_dir}", self.ids)
        self.targets = np.array([target for _, target, _ in images])
        folds = np.array([FOLD_OF.get(root, 0) for root, _, _ in images])
        self.official_test = folds == -1 if "test" in roots else None
        self.folds = folds if {"valid", "val"} & set(roots) else None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return one image (3, H, W) and its target."""
        return self.read_image(self.data_dir / self.ids[index]), int(self.targets[index])

    def read_image(self, path: Path) -> torch.Tensor:
        """Return the image (3, H, W) of a file; tools/predict.py --images reads with it too."""
        return read_image(path)

    def check(self, indices: np.ndarray) -> None:
        """Raise UserError with the names of files among `indices` that cannot be read."""
        errors = find_invalid_files([self.data_dir / self.ids[index] for index in indices], self.read_image)
        if errors:
            names = list_first((self.ids[indices[position]] for position in errors), MAX_LISTED)
            raise UserError(
                f"--data-dir {self.data_dir} has {count_of(len(errors), 'truncated or invalid file')}: {names}; fix "
                f"or remove them. The first error: {next(iter(errors.values()))}"
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
        name for name in names if name not in FOLD_OF and (name.lower() in FOLD_OF or has_images(data_dir / name))
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
            f"{others} (supported: {', '.join(SUFFIXES)})."
        )
    if len(classes) == 1:
        raise UserError(
            f"--data-dir {data_dir} has only one class, {classes[0]}; add directories of other classes"
            f"{suggest_subdirectory(data_dir / root / classes[0])}."
        )


def find_classes(data_dir: Path, roots: Sequence[str]) -> tuple[str, ...]:
    """Return the classes: the names of the directories in the first of `roots`.

    Raises:
        UserError: If the directory of another split has images of another class, except test/unknown.
    """
    first, *others = roots
    classes = sort_classes(directory.name for directory in directories_in(data_dir / first))
    for root in others:
        allowed = {*classes, UNKNOWN_CLASS} if root == "test" else set(classes)
        names = {path.name for path in directories_in(data_dir / root) if class_name(path.name) not in allowed}
        if invalid := sorted(name for name in names if has_images(data_dir / root / name)):
            fix = f", or move images whose classes are not known to {root}/{UNKNOWN_CLASS}" if root == "test" else ""
            raise UserError(
                f"--data-dir {data_dir} has {list_first((f'{root}/{name}' for name in invalid), MAX_LISTED)}, but "
                f"{first} has no directory of that name, so the class has 0 samples for training; rename it to one of "
                f"{list_first(classes, MAX_LISTED)}{fix}."
            )
    return classes


def class_directories(root: Path, classes: Sequence[str]) -> list[tuple[int, Path]]:
    """Return the directories in `root` with the index of the class of each, in the order of the classes.

    UNKNOWN, for test/unknown, comes last.
    """
    index_of = {name: index for index, name in enumerate(classes)}
    found = [(index_of.get(class_name(path.name), UNKNOWN), path) for path in directories_in(root)]
    return sorted(found, key=lambda item: (item[0] == UNKNOWN, item))


def directories_in(directory: Path) -> list[Path]:
    """List the directories in `directory`, without hidden ones."""
    if not directory.is_dir():
        return []
    return [path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")]


def has_images(directory: Path) -> bool:
    """Return whether there is an image in `directory` or below it."""
    return any(is_image(path, SUFFIXES) for path in find_files(directory, SUFFIXES))


def suggest_subdirectory(directory: Path) -> str:
    """Suggest another --data-dir if `directory` has directories of images itself."""
    below = [path.name for path in directories_in(directory) if has_images(path)]
    return f", or use --data-dir {directory} if its directories are the classes" if len(below) > 1 else ""


def describe_left_out(others: Sequence[Path], roots: Sequence[Path]) -> str:
    """Count the files of other types, and the images in `roots` that are in no class directory."""
    outside = sum(is_image(path, SUFFIXES) for root in roots for path in root.glob("[!.]*"))
    parts = [count_suffixes(others), f"{outside} in no class directory" if outside else ""]
    return ", ".join(part for part in parts if part)


def load_dataset(data_dir: Path) -> ImageFolder:
    """Load the data set of this experiment. `data_dir` may be a pack, which tools/pack.py makes of it."""
    return open_data(data_dir, ImageFolder)
