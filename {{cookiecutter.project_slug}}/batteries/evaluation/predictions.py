"""Tables of predictions: reading, writing, validation and matching by id.

The columns are `id`, one for each output of the model, and the targets, by which a table shows what was predicted:

- one class per sample: probabilities, and a column `target` with the class, if it is known;
- several labels per sample: probabilities, and a column `label_NAME` with 0 or 1 for each output, empty if not known;
  also a column `threshold` with the probability from which on a label counts as present, if it was chosen;
- numbers: values, and a column `target_NAME` with the number for each output, empty if not known.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from batteries.core.errors import UserError
from batteries.core.tables import KEYS, CsvTable, check_new_file, read_table, write_new_file
from batteries.core.text import count_of, find_repeated, summarize_names

TOLERANCE = 1e-3  # of the sum of a row: files with three decimals and ten classes still pass


Kind = Literal["class", "labels", "numbers"]
KIND_NAMES: dict[Kind, str] = {"class": "one class per sample", "labels": "several labels", "numbers": "numbers"}
THRESHOLD = "threshold"  # the column of the threshold of labels
PREFIXES: dict[str, Kind] = {"label_": "labels", "target_": "numbers"}  # of the columns of targets


@dataclass(frozen=True)
class Predictions:
    """Predictions of N samples by a model with C outputs.

    Attributes:
        name: What error messages call the table: the path of its file.
        ids: The ids of the samples (N).
        classes: The names of the outputs (C).
        values: Probabilities or numbers (N, C), float64.
        targets: Class indices (N), int64; labels, 0 and 1, (N, C), int64; or numbers (N, C), float64. None if they are
            not known.
        kind: What is predicted: one class, several labels, or numbers.
        threshold: The probability from which on a label counts as present, chosen on validation; None if not known.
    """

    name: str
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    values: np.ndarray
    targets: np.ndarray | None = None
    kind: Kind = "class"
    threshold: float | None = None

    def sums_to_one(self) -> bool:
        """Return whether every row is a distribution over the classes."""
        return bool(np.all(np.abs(self.values.sum(1) - 1) <= TOLERANCE))


def write_predictions(path: Path, predictions: Predictions, *, overwrite: bool = False) -> None:
    """Write a table atomically.

    Raises:
        UserError: If `read_predictions` would reject the table, or if the file exists with different contents and
            `overwrite` is false. Nothing is written.
    """
    write_new_file(path, _to_csv(predictions), overwrite=overwrite)


def write_all(tables: Sequence[Predictions], *, overwrite: bool = False) -> None:
    """Write each table to the path that is its name. Raises UserError, and writes nothing, if one is rejected."""
    texts = {Path(table.name): _to_csv(table) for table in tables}
    for path, text in texts.items():
        check_new_file(path, text, overwrite=overwrite)
    for path, text in texts.items():
        write_new_file(path, text, overwrite=overwrite)


def _to_csv(predictions: Predictions) -> str:
    import pandas as pd

    check_predictions(predictions)
    columns: dict[str, object] = {"id": list(predictions.ids)}
    for index, name in enumerate(predictions.classes):
        columns[name] = predictions.values[:, index]
    return pd.DataFrame(columns | _target_columns(predictions)).to_csv(index=False, lineterminator="\n")


def _target_columns(predictions: Predictions) -> dict[str, object]:
    """Return the columns of targets; those of labels and numbers are empty if they are not known."""
    targets = predictions.targets
    if predictions.kind == "class":
        return {} if targets is None else {"target": [predictions.classes[index] for index in targets]}
    prefix = next(prefix for prefix, kind in PREFIXES.items() if kind == predictions.kind)
    empty = [""] * len(predictions.ids)
    columns: dict[str, object] = {
        f"{prefix}{name}": empty if targets is None else targets[:, index]
        for index, name in enumerate(predictions.classes)
    }
    if predictions.threshold is not None:
        columns[THRESHOLD] = [predictions.threshold] * len(predictions.ids)
    return columns


def read_predictions(path: Path) -> Predictions:
    """Read a table. Raises UserError, with column, id and value, if it is not a valid table of predictions."""
    if not path.is_file():
        problem = "is a directory" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {problem}; give a file of predictions, such as logs/baseline/predictions/test.csv.")
    table = read_table(path)
    _check_header(path, table.columns)
    kind, prefix = _find_kind(table.columns)
    classes = tuple(_outputs(table.columns, prefix) if prefix else [name for name in table.columns if name not in KEYS])
    ids = tuple(table.column("id"))
    columns = [_parse_numbers(path, ids, name, table.column(name)) for name in classes]
    targets = None
    if prefix:
        targets = _parse_numeric_targets(path, table, [f"{prefix}{name}" for name in classes], kind)
    elif "target" in table.columns:
        targets = _parse_targets(path, ids, table.column("target"), classes)
    threshold = None
    if kind == "labels" and THRESHOLD in table.columns:
        threshold = float(_parse_numbers(path, ids[:1], THRESHOLD, table.column(THRESHOLD)[:1])[0])
    predictions = Predictions(str(path), ids, classes, np.stack(columns, axis=1), targets, kind, threshold)
    check_predictions(predictions)
    return predictions


def _find_kind(columns: Sequence[str]) -> tuple[Kind, str]:
    """Return what a table predicts, and the prefix of its columns of targets; the prefix is empty for classes."""
    for prefix, kind in PREFIXES.items():
        targets = {name.removeprefix(prefix) for name in columns if name.startswith(prefix)}
        if targets and targets == set(_outputs(columns, prefix)):
            return kind, prefix
    return "class", ""


def _outputs(columns: Sequence[str], prefix: str) -> list[str]:
    """Return the columns of predictions in a table whose columns of targets have a prefix."""
    reserved = {*KEYS, THRESHOLD} - {name for name in KEYS if f"{prefix}{name}" in columns}  # a number named target
    return [name for name in columns if name not in reserved and not name.startswith(prefix)]


def check_predictions(predictions: Predictions) -> None:
    """Raise UserError for names and ids that are empty or repeated, and for values that are not possible."""
    name = predictions.name
    values = predictions.values
    keys = KEYS if predictions.kind == "class" else ("id", THRESHOLD)
    reserved = [key for key in keys if key in predictions.classes]
    if reserved:
        raise UserError(f"{name} has a class named {reserved[0]}, which is a reserved column name; rename the class.")
    _check_header(name, ["id", *(f"output {one}" if one == "target" else one for one in predictions.classes)])
    if not len(predictions.ids):
        raise UserError(f"{name} has no rows.")
    if "" in predictions.ids:
        raise UserError(f"{name} has an empty id in row {predictions.ids.index('') + 1}.")
    if repeated := find_repeated(predictions.ids):
        raise UserError(f"{name} has more than one row of {summarize_names('id', repeated)}.")
    is_number = predictions.kind == "numbers"
    invalid = np.argwhere(~np.isfinite(values) if is_number else ~((values >= 0) & (values <= 1)))  # NaN is neither
    if len(invalid):
        row, column = invalid[0]
        raise UserError(
            f"{name} has {values[row, column]} for {'output' if is_number else 'class'} {predictions.classes[column]} "
            f"of id {predictions.ids[row]}; a {'value is finite' if is_number else 'probability is 0 to 1'}."
        )


def check_sums(predictions: Predictions) -> None:
    """Raise UserError, with the first id, if the probabilities of a row do not sum to one."""
    sums = predictions.values.sum(1)
    wrong = np.flatnonzero(np.abs(sums - 1) > TOLERANCE)
    if len(wrong):
        first = wrong[0]
        raise UserError(
            f"{predictions.name}: the probabilities of id {predictions.ids[first]} sum to {sums[first]:.6g}, not to 1 "
            f"(in {len(wrong)} of {count_of(len(sums), 'row')}); use --method rank, or --independent if a sample can "
            "belong to several classes."
        )


def match_predictions(tables: Sequence[Predictions]) -> list[Predictions]:
    """Bring the rows and columns of all tables into the order of the first one, matched by id and class.

    Targets that one table has are set in all of them.

    Raises:
        UserError: If ids, classes or what is predicted differ, or targets conflict.
    """
    for table in tables:
        if table.kind != tables[0].kind:
            raise UserError(
                f"{tables[0].name} and {table.name} do not match: one predicts {KIND_NAMES[tables[0].kind]}, the other "
                f"{KIND_NAMES[table.kind]}."
            )
    matched = [_reorder(tables[0], table) for table in tables]
    with_targets = [table for table in matched if table.targets is not None]
    targets = with_targets[0].targets if with_targets else None
    for table in with_targets:
        differing = np.flatnonzero((table.targets != targets).reshape(len(table.ids), -1).any(1))
        if len(differing):
            raise UserError(
                f"{with_targets[0].name} and {table.name} have different targets for id {table.ids[differing[0]]}."
            )
    return [replace(table, targets=targets) for table in matched]


def average_by_id(name: str, tables: Sequence[Predictions], order: Sequence[str]) -> Predictions:
    """Average the rows of each id over the tables that have it.

    If each table holds a different fold of a cross-validation, the result is the out-of-fold predictions.

    Args:
        name: The name of the result.
        tables: Tables of the same classes.
        order: All ids, in the order of the result; ids in no table are ignored.
    """
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    targets: dict[str, np.ndarray] = {}
    for table in tables:
        check_same_names("class", tables[0].name, tables[0].classes, table.name, table.classes)
        for row, sample in enumerate(table.ids):
            values = table.values[row]
            sums[sample] = sums[sample] + values if sample in sums else values
            counts[sample] = counts.get(sample, 0) + 1
            if table.targets is not None:
                targets[sample] = table.targets[row]
    ids = tuple(sample for sample in order if sample in sums)
    assert len(ids) == len(sums), "an id is missing in the order"
    means = np.stack([sums[sample] / counts[sample] for sample in ids])
    known_targets = np.array([targets[sample] for sample in ids]) if len(targets) == len(ids) else None
    thresholds = [table.threshold for table in tables if table.threshold is not None]
    threshold = float(np.mean(thresholds)) if thresholds else None
    return Predictions(name, ids, tables[0].classes, means, known_targets, tables[0].kind, threshold)


def _reorder(first: Predictions, table: Predictions) -> Predictions:
    """Bring the rows and columns of `table` into the order of `first`."""
    check_same_names("class", first.name, first.classes, table.name, table.classes)
    check_same_names("id", first.name, first.ids, table.name, table.ids)
    row_of = {name: index for index, name in enumerate(table.ids)}
    rows = np.array([row_of[name] for name in first.ids])
    columns = [table.classes.index(name) for name in first.classes]
    targets = None
    if table.targets is not None:
        targets = table.targets[rows]
        targets = np.argsort(columns)[targets] if table.kind == "class" else targets[:, columns]
    return replace(table, ids=first.ids, classes=first.classes, values=table.values[rows][:, columns], targets=targets)


def check_same_names(
    kind: str, first: str, first_names: Sequence[str], second: str, second_names: Sequence[str]
) -> None:
    """Raise UserError, with the differences, unless two tables have the same names of a kind, such as ids."""
    in_first = set(first_names)
    in_second = set(second_names)
    missing = [name for name in first_names if name not in in_second]
    extra = [name for name in second_names if name not in in_first]
    differences = []
    if missing:
        differences.append(f"{summarize_names(kind, missing)} missing in {second}")
    if extra:
        differences.append(f"{summarize_names(kind, extra)} only in {second}")
    if differences:
        raise UserError(f"{first} and {second} do not match: {', '.join(differences)}.")


def _check_header(name: object, header: Sequence[str]) -> None:
    classes = [column for column in header if column not in KEYS]
    if "id" not in header or not classes:
        raise UserError(
            f"{name} needs a column id and one column for each output; it has {', '.join(header) or 'none'}."
        )
    if repeated := find_repeated(header):
        raise UserError(f"{name} has more than one column {', '.join(repeated)}.")
    if "" in header:
        raise UserError(f"{name} has a column without a name.")


def _parse_numbers(path: Path, ids: Sequence[str], column: str, values: Sequence[str]) -> np.ndarray:
    """Convert the cells of a column to numbers (N,), float64."""
    try:
        return np.array([float(value) for value in values])
    except ValueError:
        for name, value in zip(ids, values, strict=True):
            if not _is_number(value):
                raise UserError(f"{path} has {value!r} in column {column} of id {name}; use a number.") from None
        raise


def _parse_numeric_targets(path: Path, table: CsvTable, names: Sequence[str], kind: Kind) -> np.ndarray | None:
    """Convert the columns `names` to labels (N, C), int64, or numbers (N, C), float64; None if all are empty."""
    ids = table.column("id")
    columns = [table.column(name) for name in names]
    if not any(cell for column in columns for cell in column):
        return None
    numbers = [_parse_numbers(path, ids, name, column) for name, column in zip(names, columns, strict=True)]
    targets = np.stack(numbers, axis=1)
    invalid = np.argwhere(~np.isfinite(targets) if kind == "numbers" else (targets != 0) & (targets != 1))
    if len(invalid):
        row, column = invalid[0]
        rule = "use a finite number" if kind == "numbers" else "a label is 0 or 1"
        raise UserError(f"{path} has {targets[row, column]} in column {names[column]} of id {ids[row]}; {rule}.")
    return targets if kind == "numbers" else targets.astype(np.int64)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parse_targets(path: Path, ids: Sequence[str], targets: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Convert the names of targets to class indices (N,), int64."""
    index_of = {name: index for index, name in enumerate(classes)}
    for name, target in zip(ids, targets, strict=True):
        if target not in index_of:
            raise UserError(f"{path} has the target {target!r} for id {name}, which is not one of its classes.")
    return np.array([index_of[target] for target in targets], dtype=np.int64)
