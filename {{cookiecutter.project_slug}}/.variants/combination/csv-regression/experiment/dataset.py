"""The data set: image files listed in a table, `samples.csv` in `--data-dir`, with one number or several each.

    path,target,group               `path` is relative to --data-dir, and is the id
    images/1.jpg,31.5,patient7      `target` is a number; empty if not known: such a row can only be in the test split
    images/2.jpg,40,patient8        `group` is optional: a group is never in two folds; a row without one is a group

If there is a column `fold` (0, 1, …, and -1 for test), it is the split; otherwise experiment/splits.py makes one. A
table with other names is read after the constants below are set.
"""

import math
from pathlib import Path

import numpy as np

from batteries.core.errors import UserError
from batteries.data.packs import open_data
from experiment.table import ImageTable, TableFormat

TABLE = "samples.csv"  # the file in --data-dir
PATH_COLUMN = "path"  # the path of an image, or its name; it is the id
IMAGE_DIRECTORY = ""  # the directory of the images, relative to --data-dir, such as "train_images"
SUFFIX = ""  # appended to the path, such as ".jpg" if the table has names without it
TARGET_COLUMNS = ("target",)  # one number or several, such as ("height", "weight")
GROUP_COLUMN = "group"  # optional
FOLD_COLUMN = "fold"  # optional
# The loss compares (target - TARGET_MEAN) / TARGET_STD; one value for each target, or one for all. `tools/split.py
# --keep --statistics` prints those of the train split.
TARGET_MEAN = (0.0,)
TARGET_STD = (1.0,)


class Table(ImageTable):
    """Images as uint8 tensors (3, H, W), 0 to 255, of any sizes; targets are numbers, float32, shape (N, C).

    Args:
        data_dir: The directory of the table.

    Raises:
        UserError: If the table is invalid, or a file is missing or empty.
    """

    classes = TARGET_COLUMNS

    def __init__(self, data_dir: Path) -> None:
        table_format = TableFormat(TABLE, PATH_COLUMN, IMAGE_DIRECTORY, SUFFIX, GROUP_COLUMN, FOLD_COLUMN)
        super().__init__(data_dir, table_format, dict.fromkeys(TARGET_COLUMNS, "TARGET_COLUMNS"))
        self.classes = TARGET_COLUMNS
        self.targets = np.stack([self._parse_column(name) for name in TARGET_COLUMNS], axis=1)
        self._check_targets()
        self.set_official_test(np.isnan(self.targets).all(1))

    def _parse_column(self, name: str) -> np.ndarray:
        """Return the numbers of a column, shape (N,), float32; NaN if the cell is empty."""
        numbers = []
        for line, text in zip(self.lines, self.column(name), strict=True):
            number = parse_number(text) if text else math.nan
            if number is None:
                raise UserError(f"{self.file} line {line} has {text!r} in column {name}; use a finite number.")
            numbers.append(number)
        return np.array(numbers, dtype=np.float32)

    def _check_targets(self) -> None:
        """Raise UserError if only some numbers of a row are empty, or if all numbers of a column are equal."""
        is_unknown = np.isnan(self.targets)
        partly = np.flatnonzero(is_unknown.any(1) & ~is_unknown.all(1))
        if len(partly):
            raise UserError(
                f"{self.file} line {self.lines[partly[0]]} has some targets empty; fill them in, or leave all of them "
                "empty if they are not known."
            )
        known = self.targets[~is_unknown.any(1)]
        for name, values in zip(TARGET_COLUMNS, known.T, strict=True):
            if len(values) and values.min() == values.max():
                raise UserError(f"{self.file} has only one value, {values[0]:g}, in column {name}; add other rows.")


def parse_number(text: str) -> float | None:
    """Return a finite number; None if the text is none."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def load_dataset(data_dir: Path) -> Table:
    """Load the data set of this experiment. `data_dir` may be a pack, which tools/pack.py makes of it."""
    return open_data(data_dir, Table)
