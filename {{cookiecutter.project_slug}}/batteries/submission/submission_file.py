"""Submission files: predictions in the columns, ids and order of a competition's sample submission."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

import numpy as np

from batteries.core.errors import UserError
from batteries.core.tables import read_table
from batteries.core.text import find_repeated, summarize_names
from batteries.evaluation.predictions import KIND_NAMES, Kind, Predictions

if TYPE_CHECKING:
    import pandas as pd

Values = Literal["label", "index", "probability", "binary", "labels", "number", "rle"]
VALUES_OF: dict[Kind, tuple[Values, ...]] = {  # the values that predictions of a kind can be written as
    "class": ("label", "index", "probability", "binary", "labels"),
    "labels": ("labels", "binary", "probability"),
    "numbers": ("number",),
}
PER_ROW = ("label", "index", "labels")  # these describe the whole row; the others describe one class


def read_sample(path: Path, *, repeats: bool = False) -> "pd.DataFrame":
    """Read a sample submission as text; the first column is the id.

    Args:
        path: The file.
        repeats: Ids can be repeated, as with one row for each class of an image.

    Raises:
        UserError: If it is not a table, has only one column, or repeats an id.
    """
    import pandas as pd

    table = read_table(path, f"--sample {path}")
    if len(table.columns) < 2 or not table.rows:
        raise UserError(f"--sample {path} needs a column of ids, a column to fill in, and rows.")
    if not repeats and (repeated := find_repeated(row.cells[0] for row in table.rows)):
        raise UserError(f"--sample {path} has more than one row of {summarize_names('id', repeated)}.")
    return pd.DataFrame([row.cells for row in table.rows], columns=table.columns, dtype=str)


def match_ids(predictions: Predictions, sample: "pd.DataFrame") -> Predictions:
    """Return the predictions with the ids of the sample, if those are the same without directories or suffixes.

    Nothing changes unless each id of the sample is then that of one prediction, and none is left over: `images/t0.jpg`
    becomes `t0`.
    """
    ids = list(sample.iloc[:, 0])
    if set(ids) == set(predictions.ids):
        return predictions
    for shorten in (_without_suffix, _without_directory, _without_both):
        in_sample = {shorten(name): name for name in ids}
        shortened = [shorten(name) for name in predictions.ids]
        if len(in_sample) == len(ids) == len(shortened) and in_sample.keys() == set(shortened):
            return replace(predictions, ids=tuple(in_sample[name] for name in shortened))
    return predictions


def _without_suffix(name: str) -> str:
    return name.removesuffix(PurePosixPath(name).suffix)


def _without_directory(name: str) -> str:
    return name.rpartition("/")[2]


def _without_both(name: str) -> str:
    return _without_suffix(_without_directory(name))


def choose_values(predictions: Predictions, sample: "pd.DataFrame", values: Values | None) -> Values:
    """Return what the columns get: `values`, or the default of what is predicted.

    Raises:
        UserError: If the predictions cannot be written as `values`.
    """
    possible = VALUES_OF[predictions.kind]
    if values is None:
        is_per_class = predictions.kind == "labels" and len(sample.columns) > 2
        return "binary" if is_per_class else possible[0]
    if values not in possible:
        raise UserError(
            f"--values {values} does not fit {predictions.name}, which has {KIND_NAMES[predictions.kind]}; use "
            f"{' or '.join(possible)}."
        )
    return values


def make_submission(
    predictions: Predictions,
    sample: "pd.DataFrame",
    values: Values,
    threshold: float = 0.5,
    column_class: str | None = None,
    *,
    at_least_one: bool = True,
) -> "pd.DataFrame":
    """Fill a sample submission with predictions; its columns, ids and order stay.

    Args:
        predictions: The predictions.
        sample: The output of `read_sample`.
        values: What the columns after the id get. One column per row: "label", the most probable class; "index", its
            index from 0; "labels", all classes whose probability reaches the threshold, separated by spaces. One column
            per class: "probability"; "binary", whether it reaches the threshold (0, 1); "number", a predicted number.
        threshold: The threshold of "labels" and "binary".
        column_class: The class of the only column, if the column is not named after it.
        at_least_one: "labels" writes the most probable class if none reaches the threshold.

    Raises:
        UserError: If the predictions do not fit the sample; the message lists every difference.
    """
    columns = [str(name) for name in sample.columns[1:]]
    column_classes = _choose_classes(predictions, columns, values, column_class)
    row_of = {name: index for index, name in enumerate(predictions.ids)}
    ids = list(sample.iloc[:, 0])
    differences = _find_differences(predictions, ids, column_classes)
    if differences:
        raise UserError(f"{predictions.name} does not fit the sample: {'; '.join(differences)}.")
    probabilities = predictions.values[[row_of[name] for name in ids]]
    submission = sample.copy()
    if values in PER_ROW:
        cells = _describe_rows(probabilities, predictions.classes, values, threshold, at_least_one=at_least_one)
        submission[columns[0]] = cells
        return submission
    for column, name in zip(columns, column_classes, strict=True):
        numbers = probabilities[:, predictions.classes.index(name)]
        submission[column] = (numbers >= threshold).astype(np.int64) if values == "binary" else numbers
    return submission


def _choose_classes(
    predictions: Predictions, columns: Sequence[str], values: Values, column_class: str | None
) -> list[str]:
    """Return the class of each column of the sample; none if a column describes the whole row."""
    if values in PER_ROW:
        _check_options_per_row(predictions, columns, values, column_class)
        return []
    if values == "number" and column_class is None and len(columns) == len(predictions.classes) == 1:
        return list(predictions.classes)
    if column_class is None:
        if len(columns) == 1 and columns[0] not in predictions.classes:
            raise UserError(
                f"the sample's column {columns[0]} is not a class; choose its class with --column-class, or use "
                "--values label."
            )
        return list(columns)
    if len(columns) > 1:
        raise UserError(
            f"--column-class {column_class} is for a sample with one column after the id, but this one has "
            f"{len(columns)}: {', '.join(columns)}; leave --column-class out."
        )
    if column_class not in predictions.classes:
        raise UserError(f"--column-class {column_class} must be one of {', '.join(predictions.classes)}.")
    return [column_class]


def _check_options_per_row(
    predictions: Predictions, columns: Sequence[str], values: Values, column_class: str | None
) -> None:
    """Raise UserError if values that describe the whole row do not fit the sample or the other options."""
    if len(columns) > 1:
        raise UserError(
            f"--values {values} fills one column, but the sample has {len(columns)}: {', '.join(columns)}; use "
            "--values probability or binary."
        )
    if column_class is not None:
        raise UserError(f"--column-class is for --values probability and binary, not {values}.")
    if values == "labels":
        _check_names(predictions.classes)


def _check_names(classes: Sequence[str]) -> None:
    """Raise UserError for class names that would be ambiguous in one cell."""
    spaced = [name for name in classes if name.split() != [name]]
    if spaced:
        raise UserError(
            "--values labels joins class names with spaces, so a name cannot contain one: rename "
            f"{summarize_names('class', spaced)} in the predictions file, such as {'_'.join(spaced[0].split())}."
        )


def _find_differences(predictions: Predictions, ids: Sequence[str], column_classes: Sequence[str]) -> list[str]:
    """List the ids and columns that only the sample or only the predictions have."""
    predicted = set(predictions.ids)
    in_sample = set(ids)
    missing = [name for name in ids if name not in predicted]
    extra = [name for name in predictions.ids if name not in in_sample]
    unknown = [name for name in column_classes if name not in predictions.classes]
    unused = [name for name in predictions.classes if name not in column_classes]
    differences = []
    if missing:
        differences.append(f"{summarize_names('id', missing)} missing in the predictions")
    if extra:
        differences.append(f"{summarize_names('id', extra)} not in the sample")
    if unknown:
        differences.append(f"{summarize_names('column', unknown)} of the sample not in the predictions")
    if unused and len(column_classes) > 1:
        differences.append(f"{summarize_names('class', unused)} without a column in the sample")
    return differences


def _describe_rows(
    probabilities: np.ndarray, classes: Sequence[str], values: Values, threshold: float, *, at_least_one: bool
) -> list[str] | list[int]:
    """Return the cell of each row: the index, the label or the labels."""
    best: list[int] = probabilities.argmax(1).tolist()
    if values == "index":
        return best
    if values == "label":
        return [classes[index] for index in best]
    cells = []
    for row, top in zip(probabilities, best, strict=True):
        chosen = np.flatnonzero(row >= threshold).tolist() or ([top] if at_least_one else [])
        cells.append(" ".join(classes[index] for index in chosen))
    return cells
