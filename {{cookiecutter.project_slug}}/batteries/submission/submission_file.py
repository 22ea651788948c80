"""From predictions to the file that a competition wants: the columns, ids and order of its sample."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from batteries.core.errors import UserError
from batteries.core.tables import read_table
from batteries.core.text import find_repeated, summarize_names
from batteries.evaluation.predictions import Predictions

Values = Literal["label", "index", "probability", "binary", "labels"]
OF_A_ROW = ("label", "index", "labels")  # these say something of the whole row; the others of one class


def read_sample(path: Path) -> Any:
    """A sample submission as a DataFrame of texts, the id in its first column.

    Raises BadInput where it is no table, has no column beside the id, or a doubled id.
    """
    try:
        table = read_table(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--sample {path} cannot be read as a table ({str(error).strip()}).") from None
    if len(table.columns) == 1 and (other := next((mark for mark in ";\t|" if mark in table.columns[0]), None)):
        raise UserError(
            f"--sample {path} has one column, {table.columns[0]}, which looks like several with "
            f"{'tabs' if other == chr(9) else other} between them; save it with commas."
        )
    if len(table.columns) < 2 or not len(table):
        raise UserError(f"--sample {path} needs a column of ids, one to fill in, and rows.")
    if doubled := find_repeated(table.iloc[:, 0]):
        raise UserError(f"--sample {path} has more than one row of {summarize_names('id', doubled)}.")
    return table


def make_submission(
    predictions: Predictions, sample: Any, values: Values, threshold: float = 0.5, column_class: str | None = None
) -> Any:
    """A DataFrame with the columns, ids and order of `sample`.

    One column beside the id takes the name (`label`), the number (`index`) or the names over the threshold, the most
    probable one where there is none (`labels`) of a row's classes; or the `probability` of `column_class`, or 0 and 1
    by the threshold (`binary`). Several columns are classes, for `probability` and `binary`.
    Raises BadInput that names each difference from the sample.
    """
    columns = [str(name) for name in sample.columns[1:]]
    chosen = _choose_classes(predictions, columns, values, column_class)
    rows = {name: index for index, name in enumerate(predictions.ids)}
    wanted = list(sample.iloc[:, 0])
    differences = _differences(predictions, wanted, rows, chosen)
    if differences:
        raise UserError(f"{predictions.name} does not fit the sample: {'; '.join(differences)}.")
    probabilities = predictions.probabilities[[rows[name] for name in wanted]]
    submission = sample.copy()
    if values in OF_A_ROW:
        submission[columns[0]] = _describe_rows(probabilities, predictions.classes, values, threshold)
        return submission
    for column, name in zip(columns, chosen, strict=True):
        numbers = probabilities[:, predictions.classes.index(name)]
        submission[column] = numbers if values == "probability" else (numbers >= threshold).astype(np.int64)
    return submission


def _choose_classes(
    predictions: Predictions, columns: Sequence[str], values: Values, column_class: str | None
) -> list[str]:
    """The class that each column of the sample stands for; none where a column describes the whole row."""
    if values in OF_A_ROW:
        if len(columns) > 1:
            raise UserError(
                f"--values {values} fills one column, but the sample has {len(columns)}: {', '.join(columns)}; "
                f"use --values probability or binary."
            )
        if column_class is not None:
            raise UserError(f"--column-class is for --values probability and binary, not {values}.")
        if values == "labels":
            _check_names(predictions.classes)
        return []
    if column_class is None:
        if len(columns) == 1 and columns[0] not in predictions.classes:
            raise UserError(
                f"the sample's column {columns[0]} is no class; say by --column-class whose probability it takes, or "
                f"use --values label."
            )
        return list(columns)
    if len(columns) > 1 or column_class not in predictions.classes:
        raise UserError(
            f"--column-class {column_class} must be one of {', '.join(predictions.classes)}, and the sample's only "
            f"column beside the id."
        )
    return [column_class]


def _check_names(classes: Sequence[str]) -> None:
    """Raise BadInput for names that could not be told apart in one cell."""
    if spaced := [name for name in classes if name.split() != [name]]:
        raise UserError(
            f"--values labels sets names apart by spaces, which are in {summarize_names('class', spaced)} "
            f"{'themselves; call them' if len(spaced) > 1 else 'itself; call it'} otherwise in the predictions, such "
            f"as {'_'.join(spaced[0].split())}."
        )


def _differences(
    predictions: Predictions, wanted: Sequence[str], rows: dict[str, int], chosen: Sequence[str]
) -> list[str]:
    """What the sample has and the predictions do not, and the other way round."""
    found = []
    in_sample = set(wanted)
    if missing := [name for name in wanted if name not in rows]:
        found.append(f"{summarize_names('id', missing)} of the sample missing")
    if extra := [name for name in predictions.ids if name not in in_sample]:
        found.append(f"{summarize_names('id', extra)} not in the sample")
    if unknown := [name for name in chosen if name not in predictions.classes]:
        found.append(f"{summarize_names('column', unknown)} of the sample no class")
    if len(chosen) > 1 and (unused := [name for name in predictions.classes if name not in chosen]):
        found.append(f"{summarize_names('class', unused)} without a column in the sample")
    return found


def _describe_rows(
    probabilities: np.ndarray, classes: Sequence[str], values: Values, threshold: float
) -> list[str] | list[int]:
    best: list[int] = probabilities.argmax(1).tolist()
    if values == "index":
        return best
    if values == "label":
        return [classes[index] for index in best]
    over: list[list[int]] = [np.flatnonzero(row >= threshold).tolist() for row in probabilities]
    return [" ".join(classes[index] for index in found or [top]) for found, top in zip(over, best, strict=True)]
