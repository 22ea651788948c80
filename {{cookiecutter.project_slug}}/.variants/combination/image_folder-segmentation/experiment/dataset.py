"""The data set: image files in images/, and for each a mask of the same name in masks/.

    data/images/1.jpg        data/masks/1.png                 split by experiment/splits.py
    data/train/images/1.jpg  data/train/masks/1.png           or: train/ has the training data,
    data/test/images/2.jpg   data/test/masks/2.png                test/ is the official test split; masks are optional
    data/valid/images/3.jpg  data/valid/masks/3.png               valid/ is fold 0, if it exists

A mask is a PNG file with one value per pixel, grey or of a palette. `--data-dir` is the directory of images and masks,
or of train, valid and test.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors

from batteries.core.errors import UserError
from batteries.core.text import count_of, list_first
from batteries.data.dataset import UNKNOWN
from batteries.data.image_files import check_names, count_suffixes, find_files, is_image
from batteries.data.masks import read_mask
from batteries.metrics.masks import IGNORED
from experiment.images import SUFFIXES, file_size, find_invalid_files, read_image

CLASSES = ("background", "object")  # in the order of their indices
CLASS_OF_VALUE = {0: 0, 1: 1, 255: IGNORED}  # the class of each value in a mask; {0: 0, 255: 1} for black and white
MASK_SUFFIX = ".png"  # what follows the name of the image in that of its mask, such as "_mask.png"
FOLD_OF = {"train": 1, "valid": 0, "val": 0, "test": -1}  # directories of official splits, and their folds
MAX_LISTED = 5  # files that an error message lists


class MaskFolder:
    """Images as uint8 tensors (3, H, W), 0 to 255, of any sizes; targets are masks (H, W), uint8, IGNORED or classes.

    An id is the path of the image relative to `data_dir`. Hidden files and directories are ignored.
    batteries/data/dataset.py documents the attributes and methods that a data set can have.

    Args:
        data_dir: The directory of images/ and masks/, or of the official splits.

    Raises:
        UserError: If there are no images, or an image has no mask.
    """

    suffixes = SUFFIXES
    classes = CLASSES
    targets = None  # masks are read with their images

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = Path(data_dir)
        splits = [name for name in FOLD_OF if (self.data_dir / name / "images").is_dir()]
        roots = splits if "train" in splits else ["."]
        files = [(root, path) for root in roots for path in find_files(self.data_dir / root / "images", SUFFIXES)]
        images = [(root, path) for root, path in files if is_image(path, SUFFIXES)]
        self.left_out = count_suffixes(path for _, path in files if not is_image(path, SUFFIXES))
        self._check_not_empty(len(images), splits)
        self.ids = [path.relative_to(self.data_dir).as_posix() for _, path in images]
        check_names(f"--data-dir {self.data_dir}", self.ids)
        self.masks = [self._mask_of(root, path) for root, path in images]
        folds = np.array([FOLD_OF.get(root, 0) for root, _ in images])
        self.official_test = folds == -1 if "test" in roots else None
        self.folds = folds if {"valid", "val"} & set(roots) else None
        self._check_masks([root for root, _ in images])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one image (3, H, W) and its mask (H, W), or UNKNOWN, shape (), if it has none."""
        image = self.read_image(self.data_dir / self.ids[index])
        path = self.masks[index]
        if path is None:
            return image, torch.tensor(UNKNOWN)
        mask = torch.from_numpy(read_mask(path, CLASS_OF_VALUE))
        if mask.shape != image.shape[1:]:
            raise UserError(
                f"{path} has {mask.shape[0]} x {mask.shape[1]} pixels (height x width), but its image "
                f"{self.ids[index]} has {image.shape[1]} x {image.shape[2]}; an image may be turned by its EXIF "
                "orientation."
            )
        return image, tv_tensors.Mask(mask)

    def read_image(self, path: Path) -> torch.Tensor:
        """Return the image (3, H, W) of a file; tools/predict.py --images reads with it too."""
        return read_image(path)

    def check(self, indices: np.ndarray) -> None:
        """Raise UserError with the names of images among `indices` that cannot be read, or whose masks cannot."""
        index_of = {self.ids[index]: int(index) for index in indices}
        errors = find_invalid_files(list(index_of), lambda name: self[index_of[str(name)]][0])
        if errors:
            names = list_first((self.ids[indices[position]] for position in errors), MAX_LISTED)
            pairs = f"{count_of(len(errors), 'invalid pair')} of image and mask"
            raise UserError(
                f"--data-dir {self.data_dir} has {pairs}: {names}; fix or remove them. The first "
                f"error: {next(iter(errors.values()))}"
            )

    def fingerprint(self) -> str:
        """Return a hash of the names and sizes of images and masks; no file is opened."""
        digest = hashlib.sha256()
        for name, mask in zip(self.ids, self.masks, strict=True):
            size = -1 if mask is None else file_size(mask)
            digest.update(f"{name}\0{file_size(self.data_dir / name)}\0{size}\n".encode())
        return digest.hexdigest()

    def _mask_of(self, root: str, path: Path) -> Path | None:
        """Return the mask of an image, or None if it does not exist."""
        directory = self.data_dir / root
        name = path.relative_to(directory / "images")
        mask = directory / "masks" / name.with_name(f"{name.stem}{MASK_SUFFIX}")
        return mask if mask.is_file() else None

    def _check_not_empty(self, count: int, splits: list[str]) -> None:
        if splits and "train" not in splits:
            raise UserError(f"--data-dir {self.data_dir} has {', '.join(splits)}, but no train/images.")
        if count == 0:
            left_out = f"; left out: {self.left_out}" if self.left_out else ""
            raise UserError(
                f"--data-dir {self.data_dir} has no images in images/ or train/images/{left_out}; put the images "
                "there, and their masks into masks/."
            )

    def _check_masks(self, roots: list[str]) -> None:
        """Raise UserError if an image has no mask, unless no image of the official test split has one."""
        tested = [mask for root, mask in zip(roots, self.masks, strict=True) if root == "test"]
        may_lack = {"test"} if not any(tested) else set()
        missing = [
            name
            for root, name, mask in zip(roots, self.ids, self.masks, strict=True)
            if mask is None and root not in may_lack
        ]
        if missing:
            example = Path(missing[0]).with_name(f"{Path(missing[0]).stem}{MASK_SUFFIX}").as_posix()
            raise UserError(
                f"--data-dir {self.data_dir} has {count_of(len(missing), 'image')} without a mask: "
                f"{list_first(missing, MAX_LISTED)}; the mask of the first is {example.replace('images', 'masks', 1)}, "
                "see MASK_SUFFIX in experiment/dataset.py."
            )


def load_dataset(data_dir: Path) -> MaskFolder:
    """Load the data set of this experiment."""
    return MaskFolder(data_dir)
