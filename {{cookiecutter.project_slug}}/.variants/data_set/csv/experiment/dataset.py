"""An index becomes one sample: image files that a table lists, `samples.csv` in `--data-dir`.

    path,label,group                `path` counts from --data-dir, and is the id
    images/1.jpg,cat,owner7         `label` names the class; empty where it is not known: such a row can only be tested
    images/2.jpg,dog,owner8         `group` is optional: a group is never in two folds; a row without one is its own

A column `fold` (0, 1, …, and -1 for test) decides the split where there is one; else experiment/splits.py does.
"""

import csv
import hashlib
import io
import os
from pathlib import Path

import numpy as np
import torch

from batteries.core.errors import UserError
from experiment.images import check_files, file_size, read_image

TABLE = "samples.csv"
COLUMNS = ("path", "label", "group", "fold")  # those that are read
UNKNOWN = -1  # the target of a row without a label


class Table:
    """Images as uint8 tensors (3, H, W), 0 to 255, of any sizes; targets as whole numbers, indices into `classes`."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = Path(data_dir)
        rows = read_table(self.data_dir / TABLE)
        self.ids = [row["path"] for row in rows]
        labels = [row["label"].strip() for row in rows]
        self.classes = tuple(sorted(set(labels) - {""}, key=by_number))
        numbers = {label: number for number, label in enumerate(self.classes)} | {"": UNKNOWN}
        self.targets = np.array([numbers[label] for label in labels])
        self.groups = [row["group"].strip() or row["path"] for row in rows] if "group" in rows[0] else None
        self.lines = [int(row["line"]) for row in rows]
        self.folds = np.array([fold_of(row) for row in rows]) if "fold" in rows[0] else None
        self.official_test = self.targets == UNKNOWN if (self.targets == UNKNOWN).any() else None
        self._check_groups()
        self._check_paths()
        self.sizes = [file_size(self.data_dir / name) for name in self.ids]
        self._refuse([index for index, size in enumerate(self.sizes) if size <= 0], "missing or empty")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """One image (3, H, W) and its target."""
        return read_image(self.data_dir / self.ids[index]), int(self.targets[index])

    def check(self, indices: np.ndarray) -> None:
        """Raise ValueError with the rows among `indices` whose files are no images or cut short."""
        places = check_files([self.data_dir / self.ids[index] for index in indices])
        self._refuse([int(indices[place]) for place in places], "no images, or cut short")

    def fingerprint(self) -> str:
        """Tells these data from others, by rows and sizes of the files: none is opened."""
        digest = hashlib.sha256()
        for name, target, size in zip(self.ids, self.targets.tolist(), self.sizes, strict=True):
            digest.update(f"{name}\0{target}\0{size}\n".encode())
        return digest.hexdigest()

    def _check_groups(self) -> None:
        """Raise ValueError for a group in two folds, or with a label in some rows and none in others."""
        folds = self.official_test if self.folds is None else self.folds
        if folds is None or self.groups is None:
            return
        first: dict[str, int] = {}
        for index, group in enumerate(self.groups):
            other = first.setdefault(group, index)
            if folds[other] == folds[index]:
                continue
            torn = say_unlabelled if self.folds is None else say_folds
            rows = sorted((folds[place], self.lines[place]) for place in (other, index))
            raise UserError(f"{self.data_dir / TABLE} has group {group} {torn(rows)}.")

    def _check_paths(self) -> None:
        """Raise ValueError for a file that is there under two paths, such as a.jpg and ./a.jpg."""
        first: dict[str, int] = {}
        for index, name in enumerate(self.ids):
            other = first.setdefault(os.path.normpath(name), index)
            if self.ids[other] != name:
                lines = f"{self.lines[other]} and {self.lines[index]}"
                raise UserError(
                    f"{self.data_dir / TABLE} names one file twice, by other paths (lines {lines}); leave one."
                )

    def _refuse(self, indices: list[int], what: str) -> None:
        if indices:
            named = ", ".join(f"{self.ids[index]} (line {self.lines[index]})" for index in indices[:5])
            raise UserError(f"{len(indices)} files of {self.data_dir / TABLE} are {what}: {named}; mend these rows.")


def say_folds(rows: list[tuple[int, int]]) -> str:
    """That rows of one group, each by its fold and line, are in two folds."""
    (fold, line), (other_fold, other) = rows
    return f"in folds {fold} and {other_fold} (lines {line} and {other}); a group stays in one: mend these rows"


def say_unlabelled(rows: list[tuple[int, int]]) -> str:
    """That of two rows of one group, each by whether it is tested and its line, the second has no label."""
    (_, known), (_, unknown) = rows
    return (
        f"with a label (line {known}) and without (line {unknown}); rows without one are the test split, and a group "
        f"stays in one: label all of its rows or none, or give some another group"
    )


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table with `path` and `label`, and the `line` of each. Raises ValueError where it is not that."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); put a table with the columns path and label there."
        ) from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = list(reader.fieldnames or [])
    for number, name in enumerate(columns):
        meant = name.strip().lower()
        if name in columns[:number]:
            raise UserError(f"{path} has column {name} more than once; leave one.")
        if meant in COLUMNS and name != meant:
            raise UserError(f"{path} has a column {name!r}, which is not read; call it {meant!r}, or remove it.")
    if missing := [name for name in ("path", "label") if name not in columns]:
        raise UserError(f"{path} has no column {' and '.join(missing)}; it has {', '.join(columns) or 'none'}.")
    rows = []
    for row in reader:
        if None in row.values() or None in row or not row["path"]:
            raise UserError(f"{path} line {reader.line_num} does not have a value for each of {', '.join(columns)}.")
        rows.append(row | {"line": str(reader.line_num)})
    if not rows:
        raise UserError(f"{path} has no rows; give one for each image.")
    return rows


def by_number(label: str) -> tuple[float, str]:
    """Sorts 2 before 10, and words after numbers."""
    return (float(label), label) if label.isdecimal() else (float("inf"), label)


def fold_of(row: dict[str, str]) -> int:
    """The fold of a row. Raises ValueError where it is no whole number."""
    try:
        return int(row["fold"])
    except ValueError:
        raise UserError(
            f"{TABLE} line {row['line']} has fold {row['fold']!r}; give a whole number, -1 for test."
        ) from None


def load_dataset(data_dir: Path) -> Table:
    """The data set of this experiment."""
    return Table(data_dir)
