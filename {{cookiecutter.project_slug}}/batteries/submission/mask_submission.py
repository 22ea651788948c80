"""Submission files of masks: run-length encoding in the columns, ids and order of a competition's sample submission."""

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from batteries.core.errors import UserError
from batteries.core.text import did_you_mean, summarize_names
from batteries.data.masks import encode_runs, read_mask
from batteries.evaluation.mask_table import MaskTable

if TYPE_CHECKING:
    import pandas as pd

CLASS_COLUMN = "class"


def make_mask_submission(masks: MaskTable, sample: "pd.DataFrame", column_class: str | None = None) -> "pd.DataFrame":
    """Fill the last column of a sample submission with the run-length encoding of masks.

    The rows of the sample have one of these forms; an id of the sample can lack the directory and suffix of that of the
    image:

    - `id, rle`: one row per image; the class is `column_class`, or the only one besides the first class;
    - `id, rle` with ids such as `image_class`: one row per image and class;
    - `id, class, rle`: one row per image and class.

    Args:
        masks: The predicted masks.
        sample: The output of `read_sample`.
        column_class: The class of the first form.

    Raises:
        UserError: If the sample has other columns, images or classes.
    """
    columns = [str(name) for name in sample.columns]
    if columns[1:-1] not in ([], [CLASS_COLUMN]):
        raise UserError(
            f"the sample has the columns {', '.join(columns)}; for masks it must have an id, optionally "
            f"{CLASS_COLUMN}, and the run-length encoding as the last one."
        )
    row_of = _find_rows(masks)
    wanted = _find_wanted(masks, row_of, sample, column_class)
    unknown = [name for name, (image, _) in zip(sample.iloc[:, 0], wanted, strict=True) if image is None]
    if unknown:
        raise UserError(
            f"{masks.path} does not fit the sample: {summarize_names('id', unknown)} not in the predictions."
        )
    cache: dict[int, np.ndarray] = {}
    cells = []
    for image, number in wanted:
        assert image is not None
        if image not in cache:
            cache = {image: read_mask(masks.path.parent / masks.masks[image])}  # rows of an image follow each other
        cells.append(encode_runs(cache[image] == number))
    submission = sample.copy()
    submission[columns[-1]] = cells
    return submission


def _find_rows(masks: MaskTable) -> dict[str, int]:
    """Return the row of each id, also without its directory, its suffix, or both, if these are unique."""
    forms: dict[str, set[int]] = {}
    for row, name in enumerate(masks.ids):
        path = PurePosixPath(name)
        for form in {name, path.name, path.stem, str(path.with_suffix(""))}:
            forms.setdefault(form, set()).add(row)
    return {form: next(iter(rows)) for form, rows in forms.items() if len(rows) == 1} | {
        name: row for row, name in enumerate(masks.ids)
    }


def _find_wanted(
    masks: MaskTable, row_of: dict[str, int], sample: "pd.DataFrame", column_class: str | None
) -> list[tuple[int | None, int]]:
    """Return the row in the table and the class of each row of the sample; None for an id that is not there."""
    ids = [str(name) for name in sample.iloc[:, 0]]
    if len(sample.columns) == 3:
        if column_class is not None:
            raise UserError(f"--column-class {column_class} has no effect: the sample has a column {CLASS_COLUMN}.")
        numbers = [_class_number(masks, name) for name in sample[CLASS_COLUMN]]
        return [(row_of.get(name), number) for name, number in zip(ids, numbers, strict=True)]
    if column_class is None and not any(name in row_of for name in ids):
        return [_split_id(masks, row_of, name) for name in ids]
    number = _class_number(masks, column_class) if column_class is not None else _only_class(masks)
    return [(row_of.get(name), number) for name in ids]


def _split_id(masks: MaskTable, row_of: dict[str, int], name: str) -> tuple[int | None, int]:
    """Return the row and class of an id such as `image_class`."""
    for number, one in enumerate(masks.classes):
        image = name.removesuffix(f"_{one}")
        if image != name and image in row_of:
            return row_of[image], number
    return None, 0


def _class_number(masks: MaskTable, name: str) -> int:
    """Return the index of a class, given as its name or its index."""
    if name in masks.classes:
        return masks.classes.index(name)
    if name.isdecimal() and int(name) < len(masks.classes):
        return int(name)
    hint = did_you_mean(name, masks.classes) or "."
    raise UserError(f"class {name!r} of the sample is not one of {', '.join(masks.classes)}{hint}")


def _only_class(masks: MaskTable) -> int:
    if len(masks.classes) != 2:
        raise UserError(
            f"the sample has one row per image, and {masks.path} has {len(masks.classes)} classes; choose one with "
            "--column-class."
        )
    return 1
