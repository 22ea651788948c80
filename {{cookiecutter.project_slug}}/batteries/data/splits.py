"""Split files: which samples are for training, validation and test."""

import csv
import hashlib
import io
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from batteries.core.errors import UserError
from batteries.core.files import sync_directory, write_text
from batteries.core.project import source_of
from batteries.core.tables import KEYS, parse_table, read_table_text
from batteries.core.text import count_of, find_repeated, list_first
from batteries.data.dataset import UNKNOWN, Dataset, dataset_info, has_classes, has_labels
from batteries.data.get_batch import check_get_batch
from batteries.distributed.collectives import run_on_rank_zero

TEST = -1  # the fold of the held-out test split
LIBRARIES = ("scikit-learn", "numpy")  # that experiment/splits.py uses: other versions may make other splits
COLUMNS = ("id", "target", "fold", "group")  # of a split file
MAX_LISTED = 5  # samples that an error message lists


class Split(NamedTuple):
    """Indices into the data set, each split in ascending order."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray

    def sizes(self) -> dict[str, int]:
        """Return the number of samples of each split."""
        return {name: len(indices) for name, indices in self._asdict().items()}


class SplitFile:
    """The split in a file, or a new one that `write` stores there.

    Every rank makes the same calls; rank 0 reads the file for all.

    Args:
        path: The split file.
        dataset: The data set.
        make_folds: Returns the fold of each sample, shape (N,), integers; called if the file does not exist.

    Attributes:
        text: The contents of the file.
        folds: The fold of each sample, shape (N,), in the order of the data set.
        sha256: The hash of the file.
        num_folds: The number of folds.
        is_new: Whether the file did not exist, so that the split was made now.

    Raises:
        UserError: If the split does not fit the data set.
    """

    def __init__(self, path: Path, dataset: Dataset, make_folds: Callable[[Any], np.ndarray]) -> None:
        self.path = Path(path)
        self.dataset = dataset
        self.text, self.folds, self.is_new = run_on_rank_zero(lambda: self._open(make_folds))
        self.sha256 = hashlib.sha256(self.text.encode()).hexdigest()
        self.num_folds = int(self.folds.max()) + 1

    def select(self, fold: int) -> Split:
        """Return the split that validates on `fold` and trains on the other folds.

        Raises:
            UserError: If the fold does not exist, or a split has no sample of a class.
        """
        split = self.select_unchecked(fold)
        _check_classes(split, fold, self.dataset, str(self.path))
        return split

    def select_unchecked(self, fold: int) -> Split:
        """Return the same split as `select`, also if a class is missing in it."""
        if not 0 <= fold < self.num_folds:
            raise UserError(f"--fold {fold} does not exist; {self.path} has the folds 0 to {self.num_folds - 1}.")
        is_valid = self.folds == fold
        is_test = self.folds == TEST
        return Split(
            train=np.flatnonzero(~is_valid & ~is_test),
            valid=np.flatnonzero(is_valid),
            test=np.flatnonzero(is_test),
        )

    def write(self) -> None:
        """Write the file. An existing file is not changed; UserError if its contents differ."""
        run_on_rank_zero(lambda: write_once(self.path, self.text))

    def describe(self) -> dict[str, Any]:
        """Return what run.json records of the split; `made_with` are the libraries, if the split was made now."""
        made_with = {name: metadata.version(name) for name in LIBRARIES} if self.is_new else None
        return {"file": str(self.path), "sha256": self.sha256, "folds": self.num_folds, "made_with": made_with}

    def _open(self, make_folds: Callable[[Any], np.ndarray]) -> tuple[str, np.ndarray, bool]:
        _check_class_indices(self.dataset)
        is_new = not self.path.exists()
        text = to_csv(self.dataset, make_folds(self.dataset)) if is_new else read_split(self.path)
        return text, parse_folds(text, self.dataset, str(self.path)), is_new


def read_split(path: Path) -> str:
    """Return the text of a split file. Raises UserError if it cannot be read."""
    return read_table_text(path, str(path))


def write_once(path: Path, text: str) -> None:
    """Write a file atomically unless it exists; of two processes at the same time, the first one wins.

    Raises:
        UserError: If the file cannot be written, or exists with other contents.
    """
    if not path.exists():
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(draft, text)
            _publish(draft, path)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); use another --split-file.") from None
        finally:
            with suppress(OSError):  # if its directory could not be created
                draft.unlink()
    if read_split(path) != text:
        raise UserError(
            f"{path} already exists with a different split and is not overwritten; use another --split-file."
        )


def _publish(draft: Path, path: Path) -> None:
    """Rename `draft` to `path` unless that exists. A plain rename would replace the file of another process."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        os.replace(draft, path)
    sync_directory(path.parent)


def to_csv(dataset: Dataset, folds: np.ndarray) -> str:
    """Return the text of a split file.

    Args:
        dataset: The data set.
        folds: The fold of each sample, shape (N,), integers.
    """
    folds = np.asarray(folds)
    if folds.shape != (len(dataset),) or not np.issubdtype(folds.dtype, np.integer):
        raise UserError(
            f"make_folds in experiment/splits.py returned {folds.dtype} of shape {folds.shape}; return an integer for "
            f"each of the {count_of(len(dataset), 'sample')}."
        )
    columns = {
        "id": [str(name) for name in dataset.ids],
        "target": _target_texts(dataset),
        "fold": folds.tolist(),
        "group": _group_texts(dataset),
    }
    present = {name: values for name, values in columns.items() if values is not None}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(present)
    writer.writerows(zip(*present.values(), strict=True))
    return file.getvalue()


def parse_folds(text: str, dataset: Dataset, name: str) -> np.ndarray:
    """Read the folds from the text of a split file.

    Args:
        text: The contents of the file.
        dataset: The data set.
        name: What error messages call the file.

    Returns:
        The fold of each sample of the data set, shape (N,), int64.

    Raises:
        UserError: If ids are repeated or differ from those of the data set, targets or groups have changed, a group is
            in two folds, or the folds are not numbered from 0.
    """
    table = parse_table(text, name)
    _check_columns(table.columns, dataset, name)
    rows = table.records()
    order = _match_ids([row["id"] for row in rows], [str(sample) for sample in dataset.ids], name)
    rows = [rows[position] for position in order]
    folds = np.array([_parse_fold(row["fold"], row["id"], name) for row in rows], dtype=np.int64)
    _check_fold_numbers(folds, name)
    _check_column("target", _target_texts(dataset), rows, name)
    _check_column("group", _group_texts(dataset), rows, name)
    # If the data set has no groups, the file may have some; a sample with an empty cell is a group by itself.
    groups = _group_texts(dataset) or [row.get("group") or f"only {row['id']}" for row in rows]
    _check_groups(groups, folds, name)
    _check_targets(dataset, folds, name)
    _check_class_names(dataset)
    return folds


def check_files(dataset: Dataset, split: Split) -> None:
    """Check that the samples of the train and valid splits can be read, and are the same read singly and in batches.

    Raises:
        UserError: If `check` of the data set raises it, or if `get_batch` and `__getitem__` differ.
    """
    indices = np.concatenate([split.train, split.valid])

    def check() -> None:
        if check_samples := getattr(dataset, "check", None):
            check_samples(indices)
        check_get_batch(dataset, indices)

    run_on_rank_zero(check)


def _check_columns(columns: Sequence[str], dataset: Dataset, name: str) -> None:
    for column in columns:
        meant = column.strip().lower()
        if column not in COLUMNS and meant in COLUMNS:
            raise UserError(f"{name} has a column {column!r}, which is not read; rename it to {meant!r}, or remove it.")
    required = ["id", "fold"]
    if _target_texts(dataset) is not None:
        required.append("target")
    if _group_texts(dataset) is not None:
        required.append("group")
    if missing := [column for column in required if column not in columns]:
        raise UserError(f"{name} has no column {', '.join(missing)}; it has {', '.join(columns) or 'none'}.")


def _match_ids(file_ids: Sequence[str], ids: Sequence[str], name: str) -> list[int]:
    """Return the row in the file for each sample of the data set."""
    if repeated := find_repeated(ids):
        raise UserError(f"the data set has repeated ids: {list_first(repeated, MAX_LISTED)}; make each id unique.")
    if repeated := find_repeated(file_ids):
        raise UserError(f"{name} has repeated ids: {list_first(repeated, MAX_LISTED)}; keep one row of each.")
    row_of = {sample: row for row, sample in enumerate(file_ids)}
    missing = [sample for sample in ids if sample not in row_of]
    extra = sorted(row_of.keys() - set(ids))
    problems = []
    if missing:
        problems.append(f"{count_of(len(missing), 'sample')} not in the file ({list_first(missing, MAX_LISTED)})")
    if extra:
        problems.append(f"{count_of(len(extra), 'sample')} not in the data set ({list_first(extra, MAX_LISTED)})")
    if problems:
        raise UserError(f"{name} belongs to another data set: {', '.join(problems)}; use another --split-file.")
    return [row_of[sample] for sample in ids]


def _check_fold_numbers(folds: np.ndarray, name: str) -> None:
    numbers = set(folds.tolist()) - {TEST}
    if len(numbers) < 2 or numbers != set(range(len(numbers))):
        found = ", ".join(map(str, sorted(numbers))) or "none"
        raise UserError(f"{name} has the folds {found}; number two or more folds from 0 on, and the test split {TEST}.")


def _check_column(column: str, expected: Sequence[str] | None, rows: Sequence[dict[str, str]], name: str) -> None:
    if expected is None:
        return
    for row, value in zip(rows, expected, strict=True):
        if row[column] != value and not _are_equal_numbers(row[column], value):
            raise UserError(
                f"{name} has {column} {row[column]!r} for {row['id']}, but the data set has {value!r}: the data or "
                f"the file changed; use another --split-file."
            )


def _check_groups(groups: Sequence[str], folds: np.ndarray, name: str) -> None:
    fold_of: dict[str, int] = {}
    for group, fold in zip(groups, folds.tolist(), strict=True):
        if fold_of.setdefault(group, fold) != fold:
            raise UserError(f"{name} has group {group} in folds {fold_of[group]} and {fold}; a group must be in one.")


def _check_targets(dataset: Dataset, folds: np.ndarray, name: str) -> None:
    """Check that only test samples have an unknown target."""
    targets = dataset_info(dataset).targets
    if targets is None:
        return
    is_unknown = _is_unknown(dataset, np.asarray(targets))
    used = np.flatnonzero(is_unknown & (folds != TEST))
    if len(used):
        names = list_first((dataset.ids[int(index)] for index in used), MAX_LISTED)
        raise UserError(f"{name} has samples without a target in folds: {names}; set their fold to {TEST}, for test.")


def _is_unknown(dataset: Dataset, targets: Any) -> np.ndarray:
    """Return whether the target of each sample, shape (N, ...), is not known; shape (N,)."""
    values = np.asarray(targets).reshape(len(targets), -1)
    has_indices = has_classes(dataset) or has_labels(dataset)
    unknown = values == UNKNOWN if has_indices else np.isnan(values.astype(float))
    return np.any(unknown, axis=1)


def _check_class_indices(dataset: Dataset) -> None:
    """Check that targets are indices into the classes, or labels, before other checks that count samples by class."""
    if has_labels(dataset):
        _check_labels(dataset)
    if not has_classes(dataset):
        return
    values = np.asarray(dataset_info(dataset).targets)
    classes = len(dataset.classes)
    invalid = np.flatnonzero((values != np.round(values)) | (values < UNKNOWN) | (values >= classes))
    if len(invalid):
        raise UserError(
            f"sample {dataset.ids[int(invalid[0])]} has target {values[invalid[0]]}; with {classes} classes it must be "
            f"an integer from 0 to {classes - 1}: correct targets of {type(dataset).__name__} in "
            f"{source_of(type(dataset))}."
        )


def _check_labels(dataset: Dataset) -> None:
    """Check that each label is 0 or 1, and that a label of a sample is not known only if all are not."""
    info = dataset_info(dataset)
    labels = np.asarray(info.targets)
    wanted = (len(dataset), len(info.classes or labels[0]))
    source = f"correct targets of {type(dataset).__name__} in {source_of(type(dataset))}"
    if labels.shape != wanted:
        raise UserError(f"targets have the shape {labels.shape} instead of {wanted}, samples and labels: {source}.")
    is_invalid = ~np.isin(labels, (0, 1)).all(1) & ~(labels == UNKNOWN).all(1)
    if is_invalid.any():
        first = int(np.flatnonzero(is_invalid)[0])
        raise UserError(
            f"sample {dataset.ids[first]} has the labels {labels[first].tolist()}; each must be 0 or 1, or all "
            f"{UNKNOWN} if they are not known: {source}."
        )


def _check_class_names(dataset: Dataset) -> None:
    """Check that each class can be a column of predictions/*.csv."""
    names = [str(name) for name in dataset_info(dataset).classes or ()]
    keys = KEYS if has_classes(dataset) else ("id", "threshold")
    if reserved := [name for name in names if name in keys]:
        raise UserError(f"a class has the name {reserved[0]}, as a column of predictions/*.csv does; rename the class.")
    if repeated := find_repeated(names):
        raise UserError(f"more than one class has the name {list_first(repeated, MAX_LISTED)}; make each name unique.")


def _check_classes(split: Split, fold: int, dataset: Dataset, name: str) -> None:
    """Check that each split has a sample of each class, except an official test split."""
    if has_labels(dataset):
        _check_trained_labels(split, fold, dataset, name)
    if not has_classes(dataset):
        return
    info = dataset_info(dataset)
    targets = np.asarray(info.targets)
    classes = list(dataset.classes)
    for split_name, indices in split._asdict().items():
        if split_name == "test" and (info.official_test is not None or not len(indices)):
            continue
        counts = np.bincount(targets[indices], minlength=len(classes))
        if missing := [classes[index] for index in np.flatnonzero(counts == 0)]:
            total = int((targets == classes.index(missing[0])).sum())
            raise UserError(
                f"the {split_name} split of fold {fold} has no sample of class {list_first(missing, MAX_LISTED)} "
                f"({name} has {count_of(total, 'sample')} of {missing[0]}); add samples (of more groups, if there are "
                "groups), remove the class, or use fewer folds."
            )


def _check_trained_labels(split: Split, fold: int, dataset: Dataset, name: str) -> None:
    """Check that training has samples with and without each label; validation can do without a rare one."""
    info = dataset_info(dataset)
    labels = np.asarray(info.targets)[split.train]
    counts = labels.sum(0).tolist()
    for label, count in zip(info.classes or range(len(counts)), counts, strict=True):
        if count in (0, len(labels)):
            which = "no sample" if count == 0 else "only samples"
            raise UserError(
                f"the train split of fold {fold} has {which} with label {label} ({name}); add samples, remove the "
                "label, or use fewer folds."
            )


def _target_texts(dataset: Dataset) -> list[str] | None:
    """Return the column `target`, several values separated by spaces; None if there are no targets."""
    targets = dataset_info(dataset).targets
    if targets is None or np.ndim(targets) > 2:
        return None
    values = np.asarray(targets).reshape(len(dataset), -1)
    is_unknown = _is_unknown(dataset, values).tolist()
    texts = (" ".join(map(str, row)) for row in values.tolist())
    return ["" if unknown else text for unknown, text in zip(is_unknown, texts, strict=True)]


def _group_texts(dataset: Dataset) -> list[str] | None:
    groups = dataset_info(dataset).groups
    return None if groups is None else [str(group) for group in groups]


def _parse_fold(text: str, sample: str, name: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = TEST - 1
    if number < TEST:
        raise UserError(f"{name} has fold {text!r} for {sample}; use an integer from 0, or {TEST} for test.")
    return number


def _are_equal_numbers(text: str, other: str) -> bool:
    """Return whether two texts are the same number; a spreadsheet may have changed 3 to 3.0."""
    try:
        return float(text) == float(other)
    except ValueError:
        return False
