"""Tables of image files: reading, checking and finding the files. experiment/dataset.py defines the targets."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from batteries.core.errors import UserError
from batteries.core.tables import read_table
from batteries.core.text import count_of, did_you_mean
from batteries.data.table_paths import strip_invisible, suggest_path
from experiment.images import SUFFIXES, file_size, find_invalid_files, read_image

MAX_LISTED = 5  # files that an error message lists
FIX = "fix these rows"


class TableFormat(NamedTuple):
    """How a table is written.

    Attributes:
        file: The name of the table in --data-dir.
        path: The column with the path of an image, which is the id.
        directory: The directory of the images, relative to --data-dir.
        suffix: What is appended to the path, if the table has names without a suffix.
        group: The column of groups, which are never in two folds; it is optional.
        fold: The column of folds, -1 for the test split; it is optional.
    """

    file: str = "samples.csv"
    path: str = "path"
    directory: str = ""
    suffix: str = ""
    group: str = "group"
    fold: str = "fold"


class ImageTable:
    """Images as uint8 tensors (3, H, W), 0 to 255, of any sizes, that are listed in a table.

    A subclass has `classes` and `targets`, and calls `set_official_test`.
    batteries/data/dataset.py documents the attributes and methods that a data set can have.

    Args:
        data_dir: The directory of the table.
        table_format: How the table is written.
        columns: The columns of targets, with the constant in experiment/dataset.py that names each.
        repeats: An image can have several rows; the first one has its group and fold.

    Attributes:
        rows: The rows of the table.
        rows_of: The rows of each image.
        lines: The line of the first row of each image.
        paths: The path of each image, relative to `data_dir`.

    Raises:
        UserError: If the table is invalid, or a file is missing or empty.
    """

    suffixes = SUFFIXES
    targets: Any

    def __init__(
        self, data_dir: Path, table_format: TableFormat, columns: dict[str, str], *, repeats: bool = False
    ) -> None:
        self.data_dir = Path(data_dir)
        self.format = table_format
        self.file = self.data_dir / table_format.file
        self.tables = (table_format.file,)  # what tools/pack.py copies
        self.rows = read_rows(self.file, table_format, columns)
        self.rows_of = self._group_rows() if repeats else [[row] for row in range(len(self.rows))]
        first = [self.rows[rows[0]] for rows in self.rows_of]
        self.ids = [row[table_format.path] for row in first]
        self.lines = [int(row["line"]) for row in first]
        self.groups = [self._parse_group(row) for row in first] if self._has(table_format.group) else None
        self.folds = np.array([self._parse_fold(row) for row in first]) if self._has(table_format.fold) else None
        self.official_test: np.ndarray | None = None
        self._check_paths()
        self.paths = [os.path.join(table_format.directory, f"{name}{table_format.suffix}") for name in self.ids]
        self.sizes = [file_size(self.data_dir / path) for path in self.paths]
        self._check_sizes()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        """Return one image (3, H, W) and its target."""
        return self.read_image(self.data_dir / self.paths[index]), torch.as_tensor(self.targets[index])

    def read_image(self, path: Path) -> torch.Tensor:
        """Return the image (3, H, W) of a file; tools/predict.py --images reads with it too."""
        return read_image(path)

    def check(self, indices: np.ndarray) -> None:
        """Raise UserError with the rows among `indices` whose files cannot be read."""
        errors = find_invalid_files([self.data_dir / self.paths[index] for index in indices], self.read_image)
        fix = f"{FIX}. The first error: {next(iter(errors.values()), '').rstrip('.')}"
        self.raise_for([int(indices[position]) for position in errors], "truncated or invalid file", fix)

    def fingerprint(self) -> str:
        """Return a hash of the rows and of the sizes of the files; no file is opened."""
        digest = hashlib.sha256()
        for index, (name, size) in enumerate(zip(self.ids, self.sizes, strict=True)):
            digest.update(f"{name}\0{self.target_text(index)}\0{size}\n".encode())
        return digest.hexdigest()

    def target_text(self, index: int) -> str:
        """Return what the fingerprint has of a target."""
        return str(self.targets[index].tolist())

    def column(self, name: str) -> list[str]:
        """Return the cells of a column, without invisible characters at their ends."""
        return [strip_invisible(row[name]) for row in self.rows]

    def set_official_test(self, is_unknown: np.ndarray) -> None:
        """Make the rows without a target, shape (N,), the test split. Raises UserError if all rows are."""
        if is_unknown.all():
            raise UserError(f"{self.file} has no row with a label; write the target of each image.")
        self.official_test = is_unknown if is_unknown.any() else None
        self._check_groups()

    def _has(self, column: str) -> bool:
        return column in self.rows[0]

    def _group_rows(self) -> list[list[int]]:
        """Return the rows of each image, in the order of the first one."""
        rows_of: dict[str, list[int]] = {}
        for row, record in enumerate(self.rows):
            rows_of.setdefault(record[self.format.path], []).append(row)
        return list(rows_of.values())

    def _parse_group(self, row: dict[str, str]) -> str:
        return strip_invisible(row[self.format.group]) or row[self.format.path]

    def _parse_fold(self, row: dict[str, str]) -> int:
        """Return the fold of a row. Raises UserError if it is not an integer."""
        text = row[self.format.fold]
        try:
            return int(text)
        except ValueError:
            raise UserError(
                f"{self.format.file} line {row['line']} has fold {text!r}; use an integer from 0, or -1 for test."
            ) from None

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
            raise UserError(f"{self.file} has group {group} {describe(rows)}.")

    def _check_paths(self) -> None:
        """Raise UserError if a file is listed under two paths, such as a.jpg and ./a.jpg."""
        first: dict[str, int] = {}
        for index, name in enumerate(self.ids):
            other = first.setdefault(os.path.normpath(name), index)
            if self.ids[other] != name:
                raise UserError(
                    f"{self.file} lists one file under two paths (lines {self.lines[other]} and "
                    f"{self.lines[index]}); keep one of them."
                )

    def _check_sizes(self) -> None:
        """Raise UserError with the rows whose files are missing or empty, and a correction of the first path."""
        missing = [path for path, size in zip(self.paths, self.sizes, strict=True) if size < 0]
        fix = suggest_path(self.data_dir, missing[0]) if missing else ""
        indices = [index for index, size in enumerate(self.sizes) if size <= 0]
        self.raise_for(indices, "missing or empty file", fix or FIX)

    def raise_for(self, indices: list[int], noun: str, fix: str = FIX) -> None:
        """Raise UserError with the rows `indices`, if there are any.

        Args:
            indices: The rows.
            noun: What their files are, in the singular.
            fix: How to correct them.
        """
        if indices:
            listed = ", ".join(f"{self.ids[index]} (line {self.lines[index]})" for index in indices[:MAX_LISTED])
            raise UserError(f"{self.file} lists {count_of(len(indices), noun)}: {listed}; {fix}.")


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


def read_rows(path: Path, table_format: TableFormat, columns: dict[str, str]) -> list[dict[str, str]]:
    """Read the rows of a table, with the number of each as `line`. Raises UserError if it is invalid."""
    if not path.exists():
        needed = " and ".join([table_format.path, *columns])
        raise UserError(
            f"{path} cannot be read: it does not exist; make this table, with the columns {needed}, or set TABLE in "
            "experiment/dataset.py."
        )
    table = read_table(path)
    check_columns(path, table.columns, table_format, columns)
    rows = [record | {"line": str(row.line)} for record, row in zip(table.records(), table.rows, strict=True)]
    for row in rows:
        if not strip_invisible(row[table_format.path]):
            raise UserError(f"{path} line {row['line']} has no path; write the path of an image, or delete the line.")
    if not rows:
        raise UserError(f"{path} has no rows; add one for each image.")
    return rows


def check_columns(path: Path, found: Sequence[str], table_format: TableFormat, columns: dict[str, str]) -> None:
    """Raise UserError if a column is misspelt or missing."""
    constants = {table_format.path: "PATH_COLUMN", **columns}
    known = [*constants, table_format.group, table_format.fold]
    for name in found:
        meant = [one for one in known if strip_invisible(name).lower() == one.lower()]
        if meant and name not in known:
            raise UserError(
                f"{path} has a column {name!r}, which is not read; rename it to {meant[0]!r}, or remove it."
            )
    missing = [name for name in constants if name not in found]
    if missing:
        hint = did_you_mean(missing[0], [name for name in found if name not in known])
        raise UserError(
            f"{path} has no column {' and '.join(missing)}; it has {', '.join(found) or 'none'}{hint or '.'} Set "
            f"{' and '.join(list_unique(constants[name] for name in missing))} in experiment/dataset.py to the name of "
            "its column."
        )


def list_unique(names: Iterable[str]) -> list[str]:
    """Return the distinct names, in order."""
    return list(dict.fromkeys(names))
