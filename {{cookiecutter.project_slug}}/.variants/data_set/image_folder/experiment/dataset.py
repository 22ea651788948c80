"""An index becomes one sample: image files in a folder for each class.

    data/cats/1.jpg  data/dogs/1.jpg                          split by experiment/splits.py
    data/train/cats/1.jpg  data/test/cats/2.jpg               with an official test split
    data/train/…  data/valid/…  data/test/…                   with an official validation split too: it is --fold 0

`--data-dir` is the folder that holds the classes, or train, valid and test.
"""

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from batteries.core.errors import UserError
from experiment.images import SUFFIXES, check_files, file_size, read_image

PARTS = {"train": 1, "valid": 0, "val": 0, "test": -1}  # folders with a split of their own, and their folds


class ImageFolder:
    """Images as uint8 tensors (3, H, W), 0 to 255, of any sizes; targets as whole numbers, indices into `classes`.

    An id is the path in `data_dir`. Files and folders whose names begin with a dot are left out. `left_out` says in
    words which others are, and how many.
    """

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = Path(data_dir)
        check_parts(self.data_dir)
        parts = [name for name in PARTS if (self.data_dir / name).is_dir()]
        roots = parts if "train" in parts else ["."]
        self.classes = tuple(sorted({folder.name for root in roots for folder in folders_in(self.data_dir / root)}))
        there = [
            (root, number, path)
            for root in roots
            for number, name in enumerate(self.classes)
            for path in files_in(self.data_dir / root / name)
        ]
        files = [file for file in there if is_image(file[2])]
        self.left_out = count_others([path for *_, path in there], [self.data_dir / root for root in roots])
        if not files:
            others = f"; left out: {self.left_out}" if self.left_out else ""
            raise UserError(
                f"--data-dir {data_dir} has no images in folders of classes, such as "
                f"{self.data_dir / roots[0]}/cats/1.jpg{others} (these are read: {', '.join(SUFFIXES)})."
            )
        only, *others = self.classes
        if not others:
            raise UserError(
                f"--data-dir {data_dir} has one class alone, {only}; give a folder for each of two or more"
                f"{look_below(self.data_dir / roots[0] / only)}."
            )
        self.ids = [path.relative_to(self.data_dir).as_posix() for _, _, path in files]
        if odd := [name for name in self.ids if not is_text(name)]:
            raise UserError(f"--data-dir {data_dir} has a file called {odd[0]!r}, which no table can hold; rename it.")
        self.targets = np.array([number for _, number, _ in files])
        folds = np.array([PARTS.get(root, 0) for root, _, _ in files])
        self.official_test = folds == -1 if "test" in roots else None
        self.folds = folds if {"valid", "val"} & set(roots) else None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """One image (3, H, W) and its target."""
        return read_image(self.data_dir / self.ids[index]), int(self.targets[index])

    def check(self, indices: np.ndarray) -> None:
        """Raise ValueError with the names of files among `indices` that are no images or cut short."""
        if broken := check_files([self.data_dir / self.ids[index] for index in indices]):
            names = ", ".join(self.ids[indices[place]] for place in broken[:5])
            raise UserError(
                f"{len(broken)} files in {self.data_dir} are no images, or cut short: {names}; mend or remove them."
            )

    def fingerprint(self) -> str:
        """Tells these data from others, by names, classes and sizes of the files: none is opened."""
        digest = hashlib.sha256()
        for name, target in zip(self.ids, self.targets.tolist(), strict=True):
            digest.update(f"{name}\0{target}\0{file_size(self.data_dir / name)}\n".encode())
        return digest.hexdigest()


def check_parts(data_dir: Path) -> None:
    """Raise ValueError where a folder beside train has images and is no part, or train is written otherwise."""
    names = sorted(folder.name for folder in folders_in(data_dir))
    if "train" not in map(str.lower, names):
        if names and {name.lower() for name in names} <= {*PARTS, "training", "testing", "validation"}:
            raise UserError(
                f"--data-dir {data_dir} has the folders {', '.join(names)}, which are no classes but parts of a split; "
                "call them train, valid and test, of which train is needed."
            )
        return
    wrong = [
        name
        for name in names
        if name not in PARTS and (name.lower() in PARTS or any(map(is_image, files_in(data_dir / name))))
    ]
    if wrong:
        raise UserError(
            f"--data-dir {data_dir} has a folder train and so is cut in parts, but {', '.join(wrong)} "
            f"{'are' if len(wrong) > 1 else 'is'} none: these are called train, valid and test, in small letters; "
            f"rename or move {'them' if len(wrong) > 1 else 'it'} or, where train is a class, call that otherwise."
        )


def folders_in(folder: Path) -> list[Path]:
    """The folders in `folder`, without hidden ones."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]


def files_in(folder: Path) -> list[Path]:
    """The files in `folder` and below, in the order of their names, without hidden ones and hidden folders.

    Links are followed, and a folder that is reached twice is read once.
    """
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(place, name) for name in (*names, *folders) if not name.startswith(".")]
        found += [path for path in paths if is_image(path) or path.is_file()]
    return sorted(found)


def is_image(path: Path) -> bool:
    """Whether a file is called as those that `read_image` reads."""
    return path.suffix.lower() in SUFFIXES


def is_text(name: str) -> bool:
    """Whether a split file can hold `name`: as UTF-8, and without a carriage return."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return "\r" not in name


def look_below(folder: Path) -> str:
    """Where the classes may be, if `folder` has folders of images itself."""
    below = [path.name for path in folders_in(folder) if any(map(is_image, files_in(path)))]
    return f", such as those in it, by --data-dir {folder}" if len(below) > 1 else ""


def count_others(paths: list[Path], roots: list[Path]) -> str:
    """How many of `paths` are of each other type, and how many images lie in `roots` beside the folders of classes."""
    kinds = Counter(path.suffix.lower() or path.name for path in paths if not is_image(path))
    kinds["in no class's folder"] = sum(is_image(path) for root in roots for path in root.glob("[!.]*"))
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)


def load_dataset(data_dir: Path) -> ImageFolder:
    """The data set of this experiment."""
    return ImageFolder(data_dir)
