"""Tables of predicted masks: one row per image, with the PNG file of its mask and counts of its pixels.

The columns are `id`, `mask` (the path of the file, relative to the table), `probabilities` if they were written, and
for each class `correct_NAME`, `pixels_NAME` and `predicted_NAME`: the pixels of the class that are predicted as it, all
of the class in the target, and all that are predicted as it. The first two are empty if targets are not known; ignored
pixels are not counted. Metrics of a split follow from the sums, without reading a mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from batteries.core.errors import UserError
from batteries.core.metric_names import name_values
from batteries.core.tables import read_table
from batteries.core.text import find_repeated, summarize_names
from batteries.metrics.masks import PixelCounts, mean_of_known

MASK = "mask"  # the column by which a table is one of masks
PROBABILITIES = "probabilities"
PREFIXES = ("correct_", "pixels_", "predicted_")


@dataclass(frozen=True)
class MaskTable:
    """Predicted masks of N images over C classes.

    Attributes:
        path: The file of the table.
        ids: The ids of the images (N).
        classes: The names of the classes (C).
        masks: The files of the masks (N), relative to the directory of the table.
        predicted: The pixels that are predicted as each class (N, C), int64.
        counts: All counts of pixels (N, C); None if targets are not known.
        probabilities: The files of the probabilities (N), relative to the directory of the table; empty if there are
            none.
    """

    path: Path
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    masks: tuple[str, ...]
    predicted: np.ndarray
    counts: PixelCounts | None = None
    probabilities: tuple[str, ...] = ()

    def scores(self) -> dict[str, float]:
        """Return the metrics of all pixels together; empty if targets are not known."""
        return {} if self.counts is None else name_values(self.counts.total().metrics(), self.classes)

    def image_scores(self) -> dict[str, np.ndarray]:
        """Return the mean IoU and the accuracy of each image, (N,), which are means over images, not over pixels."""
        if self.counts is None:
            return {}
        return {"image_iou": mean_of_known(self.counts.iou()), "image_accuracy": self.counts.accuracy()}

    def to_csv(self) -> str:
        """Return the text of the table."""
        import pandas as pd

        columns: dict[str, object] = {"id": list(self.ids), MASK: list(self.masks)}
        if self.probabilities:
            columns[PROBABILITIES] = list(self.probabilities)
        empty = [""] * len(self.ids)
        for index, name in enumerate(self.classes):
            known = [empty, empty] if self.counts is None else [part[:, index] for part in self.counts[:2]]
            for prefix, values in zip(PREFIXES, [*known, self.predicted[:, index]], strict=True):
                columns[f"{prefix}{name}"] = values
        return pd.DataFrame(columns).to_csv(index=False, lineterminator="\n")


def is_mask_table(path: Path) -> bool:
    """Return whether a file is a table of masks, by its header; it may not exist."""
    try:
        with path.open(encoding="utf-8") as file:
            return MASK in file.readline().strip().split(",")
    except (OSError, UnicodeDecodeError):
        return False


def read_mask_table(path: Path) -> MaskTable:
    """Read a table. Raises UserError if it is not a valid table of masks, or a mask does not exist."""
    table = read_table(path)
    classes = tuple(name.removeprefix(PREFIXES[2]) for name in table.columns if name.startswith(PREFIXES[2]))
    expected = ["id", MASK, *(f"{prefix}{name}" for prefix in PREFIXES for name in classes or ("CLASS",))]
    if missing := [name for name in expected if name not in table.columns]:
        raise UserError(
            f"{path} is not a table of predicted masks: it has no {summarize_names('column', missing)}; write it with "
            "tools/predict.py."
        )
    ids, masks = tuple(table.column("id")), tuple(table.column(MASK))
    if not ids:
        raise UserError(f"{path} has no rows.")
    if repeated := find_repeated(ids):
        raise UserError(f"{path} has more than one row of {summarize_names('id', repeated)}.")
    if absent := [name for name in masks if not (path.parent / name).is_file()]:
        raise UserError(f"{path} lists {summarize_names('mask', absent)} that does not exist; predict again.")
    columns = [[table.column(f"{prefix}{name}") for name in classes] for prefix in PREFIXES]
    is_known = all(cell for part in columns[:2] for column in part for cell in column)
    correct, pixels = (_numbers(path, part) for part in columns[:2]) if is_known else (None, None)
    predicted = _numbers(path, columns[2])
    counts = None if correct is None or pixels is None else PixelCounts(correct, pixels, predicted)
    probabilities = tuple(table.column(PROBABILITIES)) if PROBABILITIES in table.columns else ()
    return MaskTable(path, ids, classes, masks, predicted, counts, probabilities)


def _numbers(path: Path, columns: Sequence[Sequence[str]]) -> np.ndarray:
    """Convert columns of pixels to numbers (N, C), int64."""
    try:
        return np.array([[int(cell) for cell in column] for column in columns], dtype=np.int64).T
    except ValueError:
        raise UserError(f"{path} has counts of pixels that are not integers; predict again.") from None
