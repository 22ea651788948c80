"""Masks of images: PNG files and run-length encoding."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np

from batteries.core.errors import UserError
from batteries.core.text import list_first

INDEX_MODES = ("1", "L", "P", "I", "I;16")  # of Pillow: one value per pixel


def read_mask(path: Path, classes: Mapping[int, int] | None = None) -> np.ndarray:
    """Read a mask: the grey values or the indices of the palette of a PNG file.

    torchcodec returns the colours of a palette instead of its indices, therefore Pillow reads masks.

    Args:
        path: The file.
        classes: The class of each value in the file; by default the value itself.

    Returns:
        The class of each pixel, shape (H, W), uint8.

    Raises:
        UserError: If the file cannot be read, has colours, or has a value without a class.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            mode = image.mode
            values = np.asarray(image)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
        raise UserError(f"{path} cannot be read as a mask: it is missing, damaged or not an image.") from None
    if mode not in INDEX_MODES:
        raise UserError(f"{path} has the colour mode {mode}; a mask has one value per pixel: grey, or a palette.")
    values = values.astype(np.int64)
    found = np.unique(values)
    class_of = {value: value for value in range(256)} if classes is None else classes
    if unknown := [value for value in found.tolist() if value not in class_of]:
        raise UserError(f"{path} has values without a class: {list_first(unknown)}; see CLASS_OF_VALUE.")
    table = np.zeros(int(found.max()) + 1, dtype=np.uint8)
    table[found] = [class_of[value] for value in found.tolist()]
    return table[values]


def encode_mask(mask: np.ndarray) -> bytes:
    """Return a mask (H, W), uint8, as a PNG file with a palette: the indices are classes, the colours those of VOC."""
    from PIL import Image

    image = Image.fromarray(mask.astype(np.uint8)).convert("L")
    image.putpalette(palette().flatten().tolist())
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def palette() -> np.ndarray:
    """Return the colours of 256 classes, shape (256, 3), uint8: those of PASCAL VOC (Everingham et al. 2010).

    Bit b of the index contributes to channel b % 3, the lowest bits to the highest ones of the colour.
    """
    colours = np.zeros((256, 3), dtype=np.int64)
    for bit in range(8):
        colours[:, bit % 3] |= ((np.arange(256) >> bit) & 1) << (7 - bit // 3)
    return colours.astype(np.uint8)


def encode_runs(mask: np.ndarray) -> str:
    """Return the run-length encoding of a binary mask (H, W): `start length start length …`.

    As in the competitions of Kaggle: pixels are counted from 1, from top to bottom, then from left to right. A mask
    without a pixel is an empty text.
    """
    pixels = np.concatenate([[0], (mask.T > 0).flatten().astype(np.int8), [0]])
    changes = np.flatnonzero(np.diff(pixels)) + 1
    starts, ends = changes[::2], changes[1::2]
    return " ".join(f"{start} {end - start}" for start, end in zip(starts.tolist(), ends.tolist(), strict=True))


def decode_runs(text: str, height: int, width: int) -> np.ndarray:
    """Return the binary mask (H, W), bool, of a run-length encoding.

    Raises:
        UserError: If it is not a list of starts and lengths, or leaves the image.
    """
    cells = text.split()
    if len(cells) % 2 or not all(cell.isdecimal() for cell in cells):
        raise UserError(f"the run-length encoding {shorten(text)!r} must be pairs of start and length.")
    numbers = np.array(cells, dtype=np.int64).reshape(-1, 2)
    starts, lengths = numbers[:, 0] - 1, numbers[:, 1]
    size = height * width
    if ((starts < 0) | (lengths < 1) | (starts + lengths > size)).any():
        raise UserError(
            f"the run-length encoding {shorten(text)!r} leaves its image of {height} x {width} pixels, which are "
            f"counted from 1 to {size}."
        )
    changes = np.zeros(size + 1, dtype=np.int64)
    np.add.at(changes, starts, 1)
    np.add.at(changes, starts + lengths, -1)
    return (changes[:-1].cumsum() > 0).reshape(width, height).T


def shorten(text: str, most: int = 40) -> str:
    """Return the beginning of a long text."""
    return text if len(text) <= most else f"{text[:most]}…"
