"""The data set: image files listed in a table, `samples.csv` in `--data-dir`.

    path,label,group                `path` is relative to --data-dir, and is the id
    images/1.jpg,cat,owner7         `label` is the class; empty if not known: such a row can only be in the test split
    images/2.jpg,dog,owner8         `group` is optional: a group is never in two folds; a row without one is a group

If there is a column `fold` (0, 1, …, and -1 for test), it is the split; otherwise experiment/splits.py makes one. A
table with other names is read after the constants below are set.
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
LABEL_COLUMN = "label"  # the class
GROUP_COLUMN = "group"  # optional
FOLD_COLUMN = "fold"  # optional


class Table(ImageTable):
    """Images as uint8 tensors (3, H, W), 0 to 255, of any sizes; targets are indices into `classes`.

    Args:
        data_dir: The directory of the table.

    Raises:
        UserError: If the table is invalid, or a file is missing or empty.
    """

    def __init__(self, data_dir: Path) -> None:
        table_format = TableFormat(TABLE, PATH_COLUMN, IMAGE_DIRECTORY, SUFFIX, GROUP_COLUMN, FOLD_COLUMN)
        super().__init__(data_dir, table_format, {LABEL_COLUMN: "LABEL_COLUMN"})
        self.raw_labels = self.column(LABEL_COLUMN)
        labels = [class_name(label) for label in self.raw_labels]
        self.classes = sort_classes(label for label in labels if label)
        target_of = {label: target for target, label in enumerate(self.classes)} | {"": UNKNOWN}
        self.targets = np.array([target_of[label] for label in labels])
        self._check_classes()
        self.set_official_test(self.targets == UNKNOWN)

    def _check_classes(self) -> None:
        """Raise UserError with fewer than two classes."""
        if not self.classes:
            raise UserError(f"{self.file} has no row with a label; write the class of each image.")
        if len(self.classes) == 1:
            raise UserError(f"{self.file} has only one class, {self.classes[0]}; add rows of other classes.")


def load_dataset(data_dir: Path) -> Table:
    """Load the data set of this experiment. `data_dir` may be a pack, which tools/pack.py makes of it."""
    return open_data(data_dir, Table)
