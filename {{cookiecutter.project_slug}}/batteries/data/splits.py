"""Split files."""

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from batteries.core.errors import UserError
from batteries.core.files import sync_directory, write_text
from batteries.core.tables import KEYS
from batteries.core.text import find_repeated, list_first
from batteries.data.dataset import UNKNOWN, Dataset, has_classes
from batteries.distributed.collectives import run_on_rank_zero

TEST = -1  # the fold of the held-out test split
COLUMNS = ("id", "target", "fold", "group")  # of a split file


class Split(NamedTuple):
    """Indices into the data set, each part in ascending order."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray

    def sizes(self) -> dict[str, int]:
        """Return the number of samples of each split."""
        return {name: len(indices) for name, indices in self._asdict().items()}


class SplitFile:
    """The split in `path`; where there is none, the one that `make_folds` gives, to be kept with `write`.

    `folds` (N,) are in the order of the data set, `sha256` is that of the file. Every rank makes the same calls; rank 0
    reads and makes for all. Raises BadInput, in words of the file, where it does not fit the data set.
    """

    def __init__(self, path: Path, dataset: Dataset, make_folds: Callable[[Any], np.ndarray]) -> None:
        self.path = Path(path)
        self.dataset = dataset
        self.text, self.folds = run_on_rank_zero(lambda: self._open(make_folds))
        self.sha256 = hashlib.sha256(self.text.encode()).hexdigest()
        self.num_folds = int(self.folds.max()) + 1

    def select(self, fold: int) -> Split:
        """The split in which `fold` validates and the others train.

        Raises BadInput where it is not there, or a part has no sample of a class.
        """
        split = self.cut(fold)
        _check_classes(split, fold, self.dataset, str(self.path))
        return split

    def cut(self, fold: int) -> Split:
        """The same, whatever classes are in its parts."""
        if not 0 <= fold < self.num_folds:
            raise UserError(f"--fold {fold} is not there; use 0 to {self.num_folds - 1}. ({self.path} has these.)")
        valid, test = self.folds == fold, self.folds == TEST
        return Split(*(np.flatnonzero(part) for part in (~valid & ~test, valid, test)))

    def write(self) -> None:
        """Keep the split in its file. What is there already is left as it is, and has to be the same."""
        run_on_rank_zero(lambda: write_once(self.path, self.text))

    def describe(self) -> dict[str, Any]:
        """What a run notes of it."""
        return {"file": str(self.path), "sha256": self.sha256, "folds": self.num_folds}

    def _open(self, make_folds: Callable[[Any], np.ndarray]) -> tuple[str, np.ndarray]:
        text = read_split(self.path) if self.path.exists() else to_csv(self.dataset, make_folds(self.dataset))
        return text, parse_folds(text, self.dataset, str(self.path))


def read_split(path: Path) -> str:
    """The text of a split file. Raises BadInput where it cannot be read."""
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a split file ({error}).") from None


def write_once(path: Path, text: str) -> None:
    """Put `text` into `path`, whole or not at all; where two processes do so at once, the first one wins.

    Raises BadInput where something else is there already.
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
            with suppress(OSError):  # its folder is none, perhaps
                draft.unlink()
    if read_split(path) != text:
        raise UserError(f"{path} is another split by now, and no file is changed; use another --split-file.")


def _publish(draft: Path, path: Path) -> None:
    """Give `draft` the name `path`, unless that is taken: a rename would take it from the other."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        os.replace(draft, path)
    sync_directory(path.parent)


def to_csv(dataset: Dataset, folds: np.ndarray) -> str:
    """The text of a split file for `dataset`; `folds` (N,) are whole numbers."""
    folds = np.asarray(folds)
    if folds.shape != (len(dataset),) or not np.issubdtype(folds.dtype, np.integer):
        raise UserError(
            f"make_folds in experiment/splits.py gave {folds.dtype} of shape {folds.shape}; "
            f"give a whole number for each of {len(dataset)} samples."
        )
    columns = {"id": [str(name) for name in dataset.ids], "target": _target_texts(dataset), "fold": folds.tolist()}
    columns["group"] = _group_texts(dataset)
    there = {name: values for name, values in columns.items() if values is not None}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(there)
    writer.writerows(zip(*there.values(), strict=True))
    return file.getvalue()


def parse_folds(text: str, dataset: Dataset, name: str) -> np.ndarray:
    """The fold of each sample of `dataset`, shape (N,), from the text of a split file that errors call `name`.

    Raises BadInput where ids repeat or are not those of the data set, targets or groups have changed, a group is in two
    folds, or folds are not numbered from 0.
    """
    reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""))
    columns = list(reader.fieldnames or [])
    _check_columns(columns, dataset, name)
    rows = [row for row in reader if any(value for value in row.values())]  # spreadsheets leave empty ones at the end
    order = _match_ids([row["id"] for row in rows], [str(sample) for sample in dataset.ids], name)
    rows = [rows[place] for place in order]
    folds = np.array([_whole_number(row["fold"], row["id"], name) for row in rows], dtype=np.int64)
    _check_numbers(folds, name)
    _check_column("target", _target_texts(dataset), rows, name)
    _check_column("group", _group_texts(dataset), rows, name)
    # Where the data set has no groups, those that were written into the file; an empty cell is of none.
    groups = _group_texts(dataset) or [row.get("group") or f"only {row['id']}" for row in rows]
    _check_groups(groups, folds, name)
    _check_unknown(dataset, folds, name)
    _check_class_names(dataset)
    return folds


def check_files(dataset: Dataset, split: Split) -> None:
    """Let a data set that has `check(indices)` look at the files that training reads; the test split is left alone."""
    if check := getattr(dataset, "check", None):
        run_on_rank_zero(lambda: check(np.concatenate([split.train, split.valid])))


def _check_columns(columns: Sequence[str], dataset: Dataset, name: str) -> None:
    if repeated := [column for column, count in Counter(columns).items() if count > 1]:
        raise UserError(f"{name} has column {repeated[0]} more than once; leave one.")
    for column in columns:
        if column not in COLUMNS and (meant := column.strip().lower()) in COLUMNS:
            raise UserError(f"{name} has a column {column!r}, which is not read; call it {meant!r}, or remove it.")
    wanted = ["id", "fold"]
    wanted += ["target"] if _target_texts(dataset) is not None else []
    wanted += ["group"] if _group_texts(dataset) is not None else []
    if missing := [column for column in wanted if column not in columns]:
        raise UserError(f"{name} has no column {', '.join(missing)}; it has {', '.join(columns) or 'none'}.")


def _match_ids(there: Sequence[str], wanted: Sequence[str], name: str) -> list[int]:
    """For each sample of the data set its row in the file."""
    if repeated := [sample for sample, count in Counter(wanted).items() if count > 1]:
        raise UserError(f"the data set's ids repeat: {list_first(repeated, most=5)}; each sample needs one of its own.")
    if repeated := [sample for sample, count in Counter(there).items() if count > 1]:
        raise UserError(f"{name} has ids more than once: {list_first(repeated, most=5)}; leave one row of each.")
    place = {sample: row for row, sample in enumerate(there)}
    missing = [sample for sample in wanted if sample not in place]
    extra = sorted(place.keys() - set(wanted))
    if missing or extra:
        parts = [f"without {len(missing)} samples of it ({list_first(missing, most=5)})"] if missing else []
        parts += [f"with {len(extra)} that it does not have ({list_first(extra, most=5)})"] if extra else []
        raise UserError(f"{name} is of another data set: {', and '.join(parts)}; use another --split-file.")
    return [place[sample] for sample in wanted]


def _check_numbers(folds: np.ndarray, name: str) -> None:
    there = set(folds.tolist()) - {TEST}
    if len(there) < 2 or there != set(range(len(there))):
        found = ", ".join(map(str, sorted(there))) or "none"
        raise UserError(f"{name} has the folds {found}; number two or more from 0 on, and the test split {TEST}.")


def _check_column(column: str, wanted: Sequence[str] | None, rows: Sequence[dict[str, str]], name: str) -> None:
    for row, value in zip(rows, wanted or [], strict=wanted is not None):
        if row[column] != value and not _same_number(row[column] or "", value):
            raise UserError(
                f"{name} has {column} {row[column]!r} for {row['id']}, and the data set {value!r}: the data or "
                f"the file have changed; use another --split-file."
            )


def _check_groups(groups: Sequence[str], folds: np.ndarray, name: str) -> None:
    first: dict[str, int] = {}
    for group, fold in zip(groups, folds.tolist(), strict=True):
        if first.setdefault(group, fold) != fold:
            raise UserError(f"{name} has group {group} in folds {first[group]} and {fold}; a group stays in one.")


def _check_unknown(dataset: Dataset, folds: np.ndarray, name: str) -> None:
    """A sample without a target can only be tested; others are indices into the classes."""
    targets = getattr(dataset, "targets", None)
    if targets is None or np.ndim(targets) != 1:
        return
    values = np.asarray(targets)
    unknown = values == UNKNOWN if has_classes(dataset) else np.isnan(values.astype(float))
    if len(places := np.flatnonzero(unknown & (folds != TEST))):
        raise UserError(
            f"{name} trains on samples without a target: "
            f"{list_first((dataset.ids[int(place)] for place in places), most=5)}."
        )
    if not has_classes(dataset):
        return
    classes = len(dataset.classes)  # type: ignore[attr-defined]
    wrong = (values != np.round(values)) | (values < UNKNOWN) | (values >= classes)
    if len(places := np.flatnonzero(wrong)):
        raise UserError(
            f"sample {dataset.ids[int(places[0])]} has target {values[places[0]]}; with {classes} classes a target is "
            f"a whole number from 0 to {classes - 1}."
        )


def _check_class_names(dataset: Dataset) -> None:
    """In predictions/*.csv each class is a column."""
    names = [str(name) for name in getattr(dataset, "classes", None) or ()]
    if taken := [name for name in names if name in KEYS]:
        raise UserError(f"a class is called {taken[0]}, as is a column of predictions/*.csv; call it otherwise.")
    if doubled := find_repeated(names):
        raise UserError(f"more than one class is called {list_first(doubled, most=5)}; each needs a name of its own.")


def _check_classes(split: Split, fold: int, dataset: Dataset, name: str) -> None:
    """Each part needs a sample of each class; an official test split is as it is."""
    if not has_classes(dataset):
        return
    targets, classes = np.asarray(dataset.targets), list(dataset.classes)  # type: ignore[attr-defined]
    official = getattr(dataset, "official_test", None) is not None
    for part, indices in split._asdict().items():
        if part == "test" and (official or not len(indices)):
            continue
        counts = np.bincount(targets[indices], minlength=len(classes))
        if missing := [classes[index] for index in np.flatnonzero(counts == 0)]:
            everywhere = int((targets == classes.index(missing[0])).sum())
            raise UserError(
                f"the {part} split of fold {fold} has no sample of class {list_first(missing, most=5)} ({everywhere} "
                f"of {missing[0]} in all, {name}); bring more of it (of more groups, where there are any), leave it "
                "out, or use fewer folds."
            )


def _target_texts(dataset: Dataset) -> list[str] | None:
    """What the column `target` holds; None where no single number fits."""
    targets = getattr(dataset, "targets", None)
    if targets is None or np.ndim(targets) != 1:
        return None
    unknown = UNKNOWN if has_classes(dataset) else None
    return ["" if value == unknown or value != value else str(value) for value in np.asarray(targets).tolist()]


def _group_texts(dataset: Dataset) -> list[str] | None:
    groups = getattr(dataset, "groups", None)
    return None if groups is None else [str(group) for group in groups]


def _whole_number(text: str | None, sample: str, name: str) -> int:
    try:
        number = int(text or "")
    except ValueError:
        number = TEST - 1
    if number < TEST:
        raise UserError(f"{name} has fold {text!r} for {sample}; give a whole number from 0, or {TEST} for test.")
    return number


def _same_number(text: str, other: str) -> bool:
    """Whether two texts are the same number, as 3 and 3.0, which a spreadsheet makes of it."""
    try:
        return float(text) == float(other)
    except ValueError:
        return False
