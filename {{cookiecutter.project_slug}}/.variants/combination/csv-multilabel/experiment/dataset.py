"""The data set: image files listed in a table, `samples.csv` in `--data-dir`, with any number of labels each.

    path,labels,group               `path` is relative to --data-dir, and is the id
    images/1.jpg,cat dog,owner7     `labels` are separated by spaces; empty if the image has none of them
    images/2.jpg,,owner8            `group` is optional: a group is never in two folds; a row without one is a group

Or one column of 0 and 1 for each label, which LABEL_COLUMNS lists; a row in which they are all empty is not known, and
can only be in the test split. If there is a column `fold` (0, 1, …, and -1 for test), it is the split; otherwise
experiment/splits.py makes one.
"""

from pathlib import Path

import numpy as np

from batteries.core.errors import UserError
from batteries.data.classes import class_name, sort_classes
from batteries.data.dataset import UNKNOWN
from batteries.data.packs import open_data
from experiment.table import ImageTable, TableFormat

TABLE = "samples.csv"  # the file in --data-dir
PATH_COLUMN = "path"  # the path of an image, or its name; it is the id
IMAGE_DIRECTORY = ""  # the directory of the images, relative to --data-dir, such as "train_images"
SUFFIX = ""  # appended to the path, such as ".jpg" if the table has names without it
LABEL_COLUMN = "labels"  # all labels of an image; used if LABEL_COLUMNS is empty
LABEL_SEPARATOR = " "  # between labels in one cell
LABEL_COLUMNS: tuple[str, ...] = ()  # columns of 0 and 1, such as ("cat", "dog")
GROUP_COLUMN = "group"  # optional
FOLD_COLUMN = "fold"  # optional
VALUES = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}  # of LABEL_COLUMNS, in lower case


class Table(ImageTable):
    """Images as uint8 tensors (3, H, W), 0 to 255, of any sizes; targets are labels, 0 and 1, shape (N, C).

    Args:
        data_dir: The directory of the table.

    Raises:
        UserError: If the table is invalid, or a file is missing or empty.
    """

    def __init__(self, data_dir: Path) -> None:
        table_format = TableFormat(TABLE, PATH_COLUMN, IMAGE_DIRECTORY, SUFFIX, GROUP_COLUMN, FOLD_COLUMN)
        columns = dict.fromkeys(LABEL_COLUMNS, "LABEL_COLUMNS") or {LABEL_COLUMN: "LABEL_COLUMN"}
        super().__init__(data_dir, table_format, columns)
        if LABEL_COLUMNS:
            self.classes = LABEL_COLUMNS
            self.targets = np.stack([self._parse_column(name) for name in LABEL_COLUMNS], axis=1)
        else:
            self.classes, self.targets = self._parse_cells()
        self._check_rows()
        self._check_labels()
        self.set_official_test((self.targets == UNKNOWN).all(1))

    def _parse_cells(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Return the labels in LABEL_COLUMN, and which of them each image has, shape (N, C)."""
        cells = [text.split(None if LABEL_SEPARATOR == " " else LABEL_SEPARATOR) for text in self.column(LABEL_COLUMN)]
        named = [[class_name(label.strip()) for label in labels if label.strip()] for labels in cells]
        classes = sort_classes(label for labels in named for label in labels)
        index_of = {label: index for index, label in enumerate(classes)}
        targets = np.zeros((len(named), len(classes)), dtype=np.int64)
        for row, labels in enumerate(named):
            targets[row, [index_of[label] for label in labels]] = 1
        return classes, targets

    def _parse_column(self, name: str) -> np.ndarray:
        """Return a column of LABEL_COLUMNS, shape (N,): 0, 1, or UNKNOWN if the cell is empty."""
        cells = self.column(name)
        for line, text in zip(self.lines, cells, strict=True):
            if text and text.lower() not in VALUES:
                raise UserError(f"{self.file} line {line} has {text!r} in column {name}; use 0 or 1.")
        return np.array([VALUES[text.lower()] if text else UNKNOWN for text in cells])

    def _check_rows(self) -> None:
        """Raise UserError if only some labels of a row are empty."""
        is_unknown = self.targets == UNKNOWN
        partly = np.flatnonzero(is_unknown.any(1) & ~is_unknown.all(1))
        if len(partly):
            raise UserError(
                f"{self.file} line {self.lines[partly[0]]} has some labels empty; fill in 0 or 1, or leave all of them "
                "empty if they are not known."
            )

    def _check_labels(self) -> None:
        """Raise UserError if there is no label, or if one is present in no row or in all rows."""
        if not self.targets.size or not (self.targets == 1).any():
            raise UserError(f"{self.file} has no row with a label; write the labels of each image.")
        known = self.targets[(self.targets != UNKNOWN).all(1)]
        for name, count in zip(self.classes, known.sum(0).tolist(), strict=True):
            if count in (0, len(known)):
                rows = "no row" if count == 0 else "every row"
                raise UserError(f"{self.file} has label {name} in {rows}; remove the label, or add other rows.")


def load_dataset(data_dir: Path) -> Table:
    """Load the data set of this experiment. `data_dir` may be a pack, which tools/pack.py makes of it."""
    return open_data(data_dir, Table)
