"""The data set: image files listed in a table, `samples.csv` in `--data-dir`, with a mask each.

    path,mask,group                     `path` and `mask` are relative to --data-dir; the path is the id
    images/1.jpg,masks/1.png,city7      a mask is a PNG file with one value per pixel, grey or of a palette
    images/2.jpg,,city8                 empty if not known, in the test split only; `group` is optional

Or run-length encodings, if RLE_COLUMN is set: one column for the second class, or one row for each image and class with
CLASS_COLUMN. If there is a column `fold` (0, 1, …, and -1 for test), it is the split; otherwise experiment/splits.py
makes one.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors

from batteries.core.errors import UserError
from batteries.data.dataset import UNKNOWN
from batteries.data.masks import decode_runs, read_mask
from batteries.metrics.masks import IGNORED
from experiment.images import file_size, find_invalid_files
from experiment.table import ImageTable, TableFormat

TABLE = "samples.csv"  # the file in --data-dir
PATH_COLUMN = "path"  # the path of an image, or its name; it is the id
IMAGE_DIRECTORY = ""  # the directory of the images, relative to --data-dir, such as "train_images"
SUFFIX = ""  # appended to the path, such as ".jpg" if the table has names without it
MASK_COLUMN = "mask"  # the path of a mask, relative to --data-dir; used if RLE_COLUMN is empty
RLE_COLUMN: str = ""  # run-length encoding, such as "EncodedPixels": starts and lengths, by column, from 1
CLASS_COLUMN: str = ""  # with RLE_COLUMN: the name of the class of each row; "" if there are two classes
GROUP_COLUMN = "group"  # optional
FOLD_COLUMN = "fold"  # optional
CLASSES = ("background", "object")  # in the order of their indices
CLASS_OF_VALUE = {0: 0, 1: 1, 255: IGNORED}  # the class of each value in a mask; {0: 0, 255: 1} for black and white


class Table(ImageTable):
    """Images as uint8 tensors (3, H, W), 0 to 255, of any sizes; targets are masks (H, W), uint8, IGNORED or classes.

    Args:
        data_dir: The directory of the table.

    Raises:
        UserError: If the table is invalid, or a file is missing or empty.
    """

    classes = CLASSES
    targets = None  # masks are read with their images

    def __init__(self, data_dir: Path) -> None:
        table_format = TableFormat(TABLE, PATH_COLUMN, IMAGE_DIRECTORY, SUFFIX, GROUP_COLUMN, FOLD_COLUMN)
        super().__init__(data_dir, table_format, self._columns(), repeats=bool(CLASS_COLUMN))
        cells = self.column(RLE_COLUMN or MASK_COLUMN)
        self.cells = [[cells[row] for row in rows] for rows in self.rows_of]
        self._check_classes()
        self._check_masks()
        is_unknown = np.array([not RLE_COLUMN and not texts[0] for texts in self.cells])
        self.set_official_test(is_unknown)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        """Return one image (3, H, W) and its mask (H, W), or UNKNOWN, shape (), if it is not known."""
        image = self.read_image(self.data_dir / self.paths[index])
        height, width = image.shape[1:]
        if RLE_COLUMN:
            return image, tv_tensors.Mask(torch.from_numpy(self._decode(index, height, width)))
        [name] = self.cells[index]
        if not name:
            return image, torch.tensor(UNKNOWN)
        mask = torch.from_numpy(read_mask(self.data_dir / name, CLASS_OF_VALUE))
        if mask.shape != (height, width):
            raise UserError(
                f"{self.data_dir / name} has {mask.shape[0]} x {mask.shape[1]} pixels (height x width), but its image "
                f"{self.paths[index]} has {height} x {width}; an image may be turned by its EXIF orientation."
            )
        return image, tv_tensors.Mask(mask)

    def check(self, indices: np.ndarray) -> None:
        """Raise UserError with the rows among `indices` whose images or masks cannot be read."""
        index_of = {self.ids[index]: int(index) for index in indices}
        errors = find_invalid_files(list(index_of), lambda name: self[index_of[str(name)]][0])
        fix = f"fix these rows. The first error: {next(iter(errors.values()), '').rstrip('.')}"
        self.raise_for([int(indices[position]) for position in errors], "invalid pair", fix)

    def target_text(self, index: int) -> str:
        """Return what the fingerprint has of a target: the encoding, or the name and the size of the mask."""
        texts = self.cells[index]
        if RLE_COLUMN:
            return f"{self._numbers(index)} {texts}"
        return f"{texts} {file_size(self.data_dir / texts[0]) if texts[0] else -1}"

    def _columns(self) -> dict[str, str]:
        """Return the columns of targets, with the constant that names each."""
        if not RLE_COLUMN:
            return {MASK_COLUMN: "MASK_COLUMN"}
        return {RLE_COLUMN: "RLE_COLUMN"} | ({CLASS_COLUMN: "CLASS_COLUMN"} if CLASS_COLUMN else {})

    def _numbers(self, index: int) -> list[int]:
        """Return the class of each row of an image."""
        if not CLASS_COLUMN:
            return [1]
        names = self.column(CLASS_COLUMN)
        return [CLASSES.index(names[row]) if names[row] else 0 for row in self.rows_of[index]]

    def _decode(self, index: int, height: int, width: int) -> np.ndarray:
        """Return the mask (H, W) of the rows of an image; later rows are drawn over earlier ones."""
        mask = np.zeros((height, width), dtype=np.uint8)
        for number, text in zip(self._numbers(index), self.cells[index], strict=True):
            try:
                mask[decode_runs(text, height, width)] = number
            except UserError as error:
                raise UserError(f"{self.file} line {self.lines[index]}: {error}") from None
        return mask

    def _check_classes(self) -> None:
        """Raise UserError if CLASS_COLUMN is needed, or has an unknown class."""
        if RLE_COLUMN and not CLASS_COLUMN and len(CLASSES) != 2:
            raise UserError(
                f"{self.file} is read with {len(CLASSES)} CLASSES and without CLASS_COLUMN; set CLASS_COLUMN in "
                "experiment/dataset.py."
            )
        if not CLASS_COLUMN:
            return
        for row, name in enumerate(self.column(CLASS_COLUMN)):
            if name and name not in CLASSES:
                raise UserError(
                    f"{self.file} line {self.rows[row]['line']} has class {name!r}; use one of {', '.join(CLASSES)}, "
                    "or set CLASSES in experiment/dataset.py."
                )

    def _check_masks(self) -> None:
        """Raise UserError if a file of a mask does not exist."""
        if RLE_COLUMN:
            return
        missing = [index for index, [name] in enumerate(self.cells) if name and file_size(self.data_dir / name) <= 0]
        self.raise_for(missing, "missing or empty mask", "correct the column " + MASK_COLUMN)


def load_dataset(data_dir: Path) -> Table:
    """Load the data set of this experiment."""
    return Table(data_dir)
