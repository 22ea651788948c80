"""Tables of predictions."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from batteries.core.errors import UserError

if TYPE_CHECKING:
    pass
from batteries.core.tables import KEYS, check_new_file, read_table, write_new_file
from batteries.core.text import find_repeated, summarize_names

TOLERANCE = 1e-3  # how far from one a row may sum up: files with three decimals and ten classes still pass


@dataclass(frozen=True)
class Predictions:
    """Probabilities (N, C), float64, in the order of `ids` (N) and `classes` (C); targets (N) are indices of classes.

    `name` is what an error calls it: the file.
    """

    name: str
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    probabilities: np.ndarray
    targets: np.ndarray | None = None

    def sums_to_one(self) -> bool:
        """Whether every row is a distribution over the classes."""
        return bool(np.all(np.abs(self.probabilities.sum(1) - 1) <= TOLERANCE))


def write_predictions(path: Path, predictions: Predictions, *, overwrite: bool = False) -> None:
    """Write the table in one step.

    Raises BadInput, and writes nothing, for what `read_predictions` would refuse, and where the file is there with
    other bytes, unless `overwrite`.
    """
    write_new_file(path, _to_csv(predictions), overwrite=overwrite)


def write_all(tables: Sequence[Predictions], *, overwrite: bool = False) -> None:
    """Write each table to the path that it is named by; none where one of them is refused."""
    for write in (check_new_file, write_new_file):
        for table in tables:
            write(Path(table.name), _to_csv(table), overwrite=overwrite)


def _to_csv(predictions: Predictions) -> str:
    import pandas as pd

    check_predictions(predictions)
    columns: dict[str, object] = {"id": list(predictions.ids)}
    columns |= {name: predictions.probabilities[:, index] for index, name in enumerate(predictions.classes)}
    if predictions.targets is not None:
        columns["target"] = [predictions.classes[index] for index in predictions.targets]
    return pd.DataFrame(columns).to_csv(index=False, lineterminator="\n")


def read_predictions(path: Path) -> Predictions:
    """The table in `path`. Raises BadInput, with column, id and value, for whatever is not a table of predictions."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise UserError(f"{path} {what}; give a file of predictions, such as logs/baseline/predictions/test.csv.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel begins a file with a mark that is no text
            header = next(csv.reader(file), [])
        _check_header(path, header)
        table = read_table(path)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table ({str(error).strip()}).") from None
    classes = tuple(name for name in header if name not in KEYS)
    ids = tuple(table["id"])
    values = [_numbers(path, ids, name, list(table[name])) for name in classes]
    targets = _indices(path, ids, list(table["target"]), classes) if "target" in header else None
    found = Predictions(str(path), ids, classes, np.stack(values, axis=1), targets)
    check_predictions(found)
    return found


def check_predictions(predictions: Predictions) -> None:
    """Raise BadInput for names and ids that are empty or doubled, and for numbers that are no probabilities."""
    name, values = predictions.name, predictions.probabilities
    if taken := [key for key in KEYS if key in predictions.classes]:
        raise UserError(f"{name} has a class that is called {taken[0]}, as is a column of its own; call it otherwise.")
    _check_header(name, ["id", *predictions.classes])
    if not len(predictions.ids):
        raise UserError(f"{name} has no rows.")
    if "" in predictions.ids:
        raise UserError(f"{name} has an empty id, in row {predictions.ids.index('') + 1}.")
    if doubled := find_repeated(predictions.ids):
        raise UserError(f"{name} has more than one row of {summarize_names('id', doubled)}.")
    bad = np.argwhere(~((values >= 0) & (values <= 1)))  # NaN compares as false
    if len(bad):
        row, column = bad[0]
        raise UserError(
            f"{name} has {values[row, column]} for class {predictions.classes[column]} of id {predictions.ids[row]}; "
            f"a probability is 0 to 1."
        )


def check_sums(predictions: Predictions) -> None:
    """Raise BadInput, with the first such id, where the probabilities of a row do not sum to one."""
    sums = predictions.probabilities.sum(1)
    wrong = np.flatnonzero(np.abs(sums - 1) > TOLERANCE)
    if len(wrong):
        raise UserError(
            f"{predictions.name}: the probabilities of id {predictions.ids[wrong[0]]} sum to {sums[wrong[0]]:.6g}, not "
            f"to 1 (in {len(wrong)} of {len(sums)} rows); blend by --method rank, or say --independent where a sample "
            f"may be of several classes."
        )


def match_predictions(tables: Sequence[Predictions]) -> list[Predictions]:
    """The tables with their rows and columns in the order of the first, matched by id and class.

    Raises BadInput for a missing or extra id, other classes, and targets that contradict each other. Targets that one
    table knows are known to all.
    """
    matched = [_in_order(tables[0], table) for table in tables]
    known = next((table for table in matched if table.targets is not None), tables[0])
    targets = known.targets
    for table in matched:
        if table.targets is not None and (wrong := np.flatnonzero(table.targets != targets)).size:
            raise UserError(f"{table.name} has another target than {known.name} for id {table.ids[wrong[0]]}.")
    return [Predictions(table.name, table.ids, table.classes, table.probabilities, targets) for table in matched]


def average_by_id(name: str, tables: Sequence[Predictions], order: Sequence[str]) -> Predictions:
    """One row for each id in any of `tables`, in the order of `order`: the mean over the tables that have it.

    Over the folds of a cross-validation these are out-of-fold predictions, where each table has its own ids.
    """
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    targets: dict[str, int] = {}
    for table in tables:
        compare("class", tables[0].name, tables[0].classes, table.name, table.classes)
        for row, one in enumerate(table.ids):
            sums[one] = sums[one] + table.probabilities[row] if one in sums else table.probabilities[row]
            counts[one] = counts.get(one, 0) + 1
            if table.targets is not None:
                targets[one] = int(table.targets[row])
    ids = tuple(one for one in order if one in sums)
    assert len(ids) == len(sums), "an id is missing in the order"
    values = np.stack([sums[one] / counts[one] for one in ids])
    known = np.array([targets[one] for one in ids]) if len(targets) == len(ids) else None
    return Predictions(name, ids, tables[0].classes, values, known)


def _in_order(first: Predictions, table: Predictions) -> Predictions:
    """`table` in the order of `first`."""
    compare("class", first.name, first.classes, table.name, table.classes)
    compare("id", first.name, first.ids, table.name, table.ids)
    rows = {name: index for index, name in enumerate(table.ids)}
    order = np.array([rows[name] for name in first.ids])
    columns = [table.classes.index(name) for name in first.classes]
    targets = None
    if table.targets is not None:
        targets = np.argsort(columns)[table.targets[order]]
    return Predictions(table.name, first.ids, first.classes, table.probabilities[order][:, columns], targets)


def compare(kind: str, first: str, wanted: Sequence[str], second: str, given: Sequence[str]) -> None:
    """Raise BadInput where the names in `wanted`, of `first`, and `given`, of `second`, are not the same."""
    known, found = set(wanted), set(given)
    differences = []
    if missing := [name for name in wanted if name not in found]:
        differences.append(f"{summarize_names(kind, missing)} missing in {second}")
    if extra := [name for name in given if name not in known]:
        differences.append(f"{summarize_names(kind, extra)} only there")
    if differences:
        raise UserError(f"{first} and {second} do not match: {', '.join(differences)}.")


def _check_header(name: object, header: Sequence[str]) -> None:
    classes = [column for column in header if column not in KEYS]
    if "id" not in header or not classes:
        raise UserError(
            f"{name} needs a column id and one of probabilities for each class; it has {', '.join(header) or 'none'}."
        )
    if doubled := find_repeated(header):
        raise UserError(f"{name} has more than one column {', '.join(doubled)}.")
    if "" in header:
        raise UserError(f"{name} has a column without a name.")


def _numbers(path: Path, ids: Sequence[str], column: str, values: Sequence[str]) -> np.ndarray:
    """A column of numbers from texts."""
    try:
        return np.array([float(value) for value in values])
    except ValueError:
        for name, value in zip(ids, values, strict=True):
            if not _is_number(value):
                raise UserError(f"{path} has {value!r} for class {column} of id {name}, which is no number.") from None
        raise


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _indices(path: Path, ids: Sequence[str], targets: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Targets as indices of classes."""
    known = {name: index for index, name in enumerate(classes)}
    for name, target in zip(ids, targets, strict=True):
        if target not in known:
            raise UserError(f"{path} has the target {target!r} for id {name}, which is none of its classes.")
    return np.array([known[target] for target in targets], dtype=np.int64)
