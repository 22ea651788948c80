"""Blends of masks: the probabilities of several models, one image at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from batteries.core.errors import UserError
from batteries.evaluation.mask_table import MaskTable
from batteries.evaluation.predictions import check_same_names


def blend_masks(
    output: Path, tables: Sequence[MaskTable], blend_image: Callable[[np.ndarray], np.ndarray], *, overwrite: bool
) -> MaskTable:
    """Blend the masks of tables, matched by id, and write them with their probabilities.

    Args:
        output: The table of the result; its masks are written to a directory of the same name without suffix.
        tables: Tables with probabilities.
        blend_image: Blends the probabilities of the pixels of an image, shape (M, pixels, C), to (pixels, C).
        overwrite: Replace masks that exist and differ.

    Raises:
        UserError: If a table has no probabilities, or ids, classes or sizes differ.
    """
    import torch  # imported here, because blends of other predictions do not need it

    from batteries.evaluation.mask_inference import MaskWriter, PredictedMask

    first = tables[0]
    check_tables(tables)
    row_of = [{name: row for row, name in enumerate(table.ids)} for table in tables]
    writer = MaskWriter(output, first.ids, first.classes, probabilities=True, runs=False)
    for position, name in enumerate(first.ids):
        maps = [read_probabilities(table, rows[name]) for table, rows in zip(tables, row_of, strict=True)]
        check_sizes(name, tables, maps)
        classes, height, width = maps[0].shape
        pixels = np.stack([values.reshape(classes, -1).T for values in maps])
        blended = torch.from_numpy(blend_image(pixels).T.reshape(classes, height, width)).float()
        target = read_target(first, position)
        writer.add(position, PredictedMask(position, blended, None if target is None else torch.from_numpy(target)))
    return writer.publish(overwrite=overwrite)


def check_tables(tables: Sequence[MaskTable]) -> None:
    """Raise UserError if tables have other ids or classes than the first one, or no probabilities."""
    first = tables[0]
    for table in tables:
        check_same_names("class", str(first.path), first.classes, str(table.path), table.classes)
        check_same_names("id", str(first.path), first.ids, str(table.path), table.ids)
        if table.classes != first.classes:
            raise UserError(f"{first.path} and {table.path} have their classes in different orders; predict again.")
        if not table.probabilities:
            raise UserError(f"{table.path} has no probabilities; run tools/predict.py with --probabilities.")


def check_sizes(name: str, tables: Sequence[MaskTable], maps: Sequence[np.ndarray]) -> None:
    """Raise UserError if the probabilities of an image differ in size from those of the first table."""
    for table, values in zip(tables, maps, strict=True):
        if values.shape != maps[0].shape:
            raise UserError(f"{tables[0].path} and {table.path} have probabilities of different sizes for id {name}.")


def read_probabilities(table: MaskTable, row: int) -> np.ndarray:
    """Read the probabilities of an image, shape (C, H, W), float64."""
    return _read(table, row)["probabilities"].astype(np.float64)


def read_target(table: MaskTable, row: int) -> np.ndarray | None:
    """Read the mask of an image, shape (H, W), uint8, that was stored with its probabilities; None if not known."""
    return _read(table, row).get("target")


def _read(table: MaskTable, row: int) -> dict[str, np.ndarray]:
    path = table.path.parent / table.probabilities[row]
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except (OSError, ValueError):
        arrays = {}
    if "probabilities" not in arrays:
        raise UserError(f"{path} cannot be read; run tools/predict.py with --probabilities again.")
    return arrays
