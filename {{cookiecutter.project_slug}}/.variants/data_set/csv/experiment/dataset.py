"""The data set: image files listed in a table, `samples.csv` in `--data-dir`.

    path,label,group                `path` is relative to --data-dir, and is the id
    images/1.jpg,cat,owner7         `label` is the class; empty if not known: such a row can only be in the test split
    images/2.jpg,dog,owner8         `group` is optional: a group is never in two folds; a row without one is a group

If there is a column `fold` (0, 1, …, and -1 for test), it is the split; otherwise experiment/splits.py makes one.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from batteries.core.errors import UserError
from batteries.core.tables import read_table
from batteries.core.text import count_of
from batteries.data.classes import class_name, sort_classes
from batteries.data.dataset import UNKNOWN
from batteries.data.packs import open_data
from batteries.data.table_paths import strip_invisible, suggest_path
from experiment.images import SUFFIXES, file_size, find_invalid_files, read_image

TABLE = "samples.csv"
COLUMNS = ("path", "label", "group", "fold")  # those that are read
MAX_LISTED = 5  # files that an error message lists
FIX = "fix these rows"


class Table:
    """Images as uint8 tensors (3, H, W), 0 to 255, of any sizes; targets are indices into `classes`.

    batteries/data/dataset.py documents the attributes and methods that a data set can have.

    Args:
        data_dir: The directory of the table.

    Raises:
        UserError: If the table is invalid, or a file is missing or empty.
    """

    suffixes = SUFFIXES
    tables = (TABLE,)  # what tools/pack.py copies

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = Path(data_dir)
        rows = read_rows(self.data_dir / TABLE)
        self.ids = [row["path"] for row in rows]
        self.raw_labels = [strip_invisible(row["label"]) for row in rows]
        labels = [class_name(label) for label in self.raw_labels]
        self.classes = sort_classes(label for label in labels if label)
        target_of = {label: target for target, label in enumerate(self.classes)} | {"": UNKNOWN}
        self.targets = np.array([target_of[label] for label in labels])
        self.groups = [strip_invisible(row["group"]) or row["path"] for row in rows] if "group" in rows[0] else None
        self.lines = [int(row["line"]) for row in rows]
        self.folds = np.array([parse_fold(row) for row in rows]) if "fold" in rows[0] else None
        self.official_test = self.targets == UNKNOWN if (self.targets == UNKNOWN).any() else None
        self._check_classes()
        self._check_groups()
        self._check_paths()
        self.sizes = [file_size(self.data_dir / name) for name in self.ids]
        self._check_sizes()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return one image (3, H, W) and its target."""
        return self.read_image(self.data_dir / self.ids[index]), int(self.targets[index])

    def read_image(self, path: Path) -> torch.Tensor:
        """Return the image (3, H, W) of a file; tools/predict.py --images reads with it too."""
        return read_image(path)

    def check(self, indices: np.ndarray) -> None:
        """Raise UserError with the rows among `indices` whose files cannot be read."""
        errors = find_invalid_files([self.data_dir / self.ids[index] for index in indices], self.read_image)
        fix = f"{FIX}. The first error: {next(iter(errors.values()), '').rstrip('.')}"
        self._raise_for([int(indices[position]) for position in errors], "truncated or invalid file", fix)

    def fingerprint(self) -> str:
        """Return a hash of the rows and of the sizes of the files; no file is opened."""
        digest = hashlib.sha256()
        for name, target, size in zip(self.ids, self.targets.tolist(), self.sizes, strict=True):
            digest.update(f"{name}\0{target}\0{size}\n".encode())
        return digest.hexdigest()

    def _check_classes(self) -> None:
        """Raise UserError with fewer than two classes."""
        if not self.classes:
            raise UserError(f"{self.data_dir / TABLE} has no row with a label; write the class of each image.")
        if len(self.classes) == 1:
            raise UserError(
                f"{self.data_dir / TABLE} has only one class, {self.classes[0]}; add rows of other classes."
            )

    def _check_groups(self) -> None:
        """Raise UserError if a group is in two folds, or has rows with and without a label."""
        folds = self.official_test if self.folds is None else self.folds
        if folds is None or self.groups is None:
            return
        first: dict[str, int] = {}
        for index, group in enumerate(self.groups):
            other = first.setdefault(group, index)
            if folds[other] == folds[index]:
                continue
            describe = describe_labels if self.folds is None else describe_folds
            rows = sorted((int(folds[row]), self.lines[row]) for row in (other, index))
            raise UserError(f"{self.data_dir / TABLE} has group {group} {describe(rows)}.")

    def _check_paths(self) -> None:
        """Raise UserError if a file is listed under two paths, such as a.jpg and ./a.jpg."""
        first: dict[str, int] = {}
        for index, name in enumerate(self.ids):
            other = first.setdefault(os.path.normpath(name), index)
            if self.ids[other] != name:
                raise UserError(
                    f"{self.data_dir / TABLE} lists one file under two paths (lines {self.lines[other]} and "
                    f"{self.lines[index]}); keep one of them."
                )

    def _check_sizes(self) -> None:
        """Raise UserError with the rows whose files are missing or empty, and a correction of the first path."""
        missing = [name for name, size in zip(self.ids, self.sizes, strict=True) if size < 0]
        fix = suggest_path(self.data_dir, missing[0]) if missing else ""
        indices = [index for index, size in enumerate(self.sizes) if size <= 0]
        self._raise_for(indices, "missing or empty file", fix or FIX)

    def _raise_for(self, indices: list[int], noun: str, fix: str = FIX) -> None:
        """Raise UserError with the rows `indices`, if there are any.

        Args:
            indices: The rows.
            noun: What their files are, in the singular.
            fix: How to correct them.
        """
        if indices:
            listed = ", ".join(f"{self.ids[index]} (line {self.lines[index]})" for index in indices[:MAX_LISTED])
            raise UserError(f"{self.data_dir / TABLE} lists {count_of(len(indices), noun)}: {listed}; {fix}.")


def describe_folds(rows: list[tuple[int, int]]) -> str:
    """Describe two rows of one group in two folds, each given as (fold, line)."""
    (fold, line), (other_fold, other_line) = rows
    return f"in folds {fold} and {other_fold} (lines {line} and {other_line}); a group must be in one: fix these rows"


def describe_labels(rows: list[tuple[int, int]]) -> str:
    """Describe two rows of one group, given as (is test, line), of which the second has no label."""
    (_, labelled), (_, unlabelled) = rows
    return (
        f"with a label (line {labelled}) and without (line {unlabelled}); rows without a label are the test split, and "
        "a group must be in one split: label all of its rows or none, or change the group of some"
    )


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a table, with the number of each as `line`. Raises UserError if it is invalid."""
    if not path.exists():
        raise UserError(f"{path} cannot be read: it does not exist; make this table, with the columns path and label.")
    table = read_table(path)
    check_columns(path, table.columns)
    rows = [record | {"line": str(row.line)} for record, row in zip(table.records(), table.rows, strict=True)]
    for row in rows:
        if not strip_invisible(row["path"]):
            raise UserError(f"{path} line {row['line']} has no path; write the path of an image, or delete the line.")
    if not rows:
        raise UserError(f"{path} has no rows; add one for each image.")
    return rows


def check_columns(path: Path, columns: list[str]) -> None:
    """Raise UserError if a column is misspelt or missing."""
    for name in columns:
        meant = strip_invisible(name).lower()
        if meant in COLUMNS and name != meant:
            raise UserError(f"{path} has a column {name!r}, which is not read; rename it to {meant!r}, or remove it.")
    if missing := [name for name in ("path", "label") if name not in columns]:
        raise UserError(f"{path} has no column {' and '.join(missing)}; it has {', '.join(columns) or 'none'}.")


def parse_fold(row: dict[str, str]) -> int:
    """Return the fold of a row. Raises UserError if it is not an integer."""
    try:
        return int(row["fold"])
    except ValueError:
        raise UserError(
            f"{TABLE} line {row['line']} has fold {row['fold']!r}; use an integer from 0, or -1 for test."
        ) from None


def load_dataset(data_dir: Path) -> Table:
    """Load the data set of this experiment. `data_dir` may be a pack, which tools/pack.py makes of it."""
    return open_data(data_dir, Table)
