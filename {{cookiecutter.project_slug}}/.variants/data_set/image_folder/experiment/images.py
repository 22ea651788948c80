"""Reading image files, JPEG, PNG, WebP and GIF, of any colour type."""

import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torchvision.io import ImageReadMode, read_file

from batteries.core.errors import UserError
from batteries.data.image_decoding import PNG_SIGNATURE, decode_file

# The first and the last bytes of files. WebP files begin with RIFF and their length.
ENDINGS = {b"\xff\xd8\xff": b"\xff\xd9", PNG_SIGNATURE: b"IEND\xaeB`\x82", b"GIF87a": b";", b"GIF89a": b";"}
BEGINNINGS = (*ENDINGS, b"RIFF")


def read_image(path: str | Path) -> torch.Tensor:
    """Read an image and apply its EXIF orientation (not that of a WebP).

    Grey images get three channels, CMYK becomes RGB, alpha is dropped, 16 bits become 8, and the first frame of an
    animation is taken.

    Returns:
        The image, shape (3, H, W), uint8, 0 to 255.

    Raises:
        UserError: If the file is missing, empty, truncated or not an image. Changed bytes within a JPEG can go
            undetected.
    """
    try:
        return decode_file(read_file(str(path)), ImageReadMode.RGB)
    except RuntimeError as error:
        raise UserError(f"{path} cannot be read as an image ({explain(path, error)}).") from error


def explain(path: str | Path, error: RuntimeError) -> str:
    """Return what is wrong with a file; the errors of torchvision begin with a position in its source code."""
    if not os.path.isfile(path):
        return "it does not exist"
    if not os.path.getsize(path):
        return "it is empty"
    if not begins_like_an_image(path):
        return "it is not a JPEG, PNG, WebP or GIF file"
    return str(error).splitlines()[0].rsplit(", ", 1)[-1].strip(" .") or "it is damaged"


def find_invalid_files(paths: Sequence[str | Path]) -> list[int]:
    """Return the positions in `paths` of files that are missing, empty, truncated or not images.

    Only the first and last bytes of most files are read; a file with additional bytes at its end is decoded.
    """
    with ThreadPoolExecutor(8) as pool:
        return [position for position, valid in enumerate(pool.map(is_complete, paths)) if not valid]


def is_complete(path: str | Path) -> bool:
    """Return whether a file begins and ends like an image, or else can be decoded."""
    if not begins_like_an_image(path):
        return False
    with open(path, "rb") as file:
        first = file.read(8)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        last = file.read()
    if first.startswith(b"RIFF"):
        return size >= int.from_bytes(first[4:], "little") + 8
    if last.endswith(next(end for beginning, end in ENDINGS.items() if first.startswith(beginning))):
        return True
    try:
        read_image(path)
    except UserError:
        return False
    return True


def begins_like_an_image(path: str | Path) -> bool:
    """Return whether a file begins like one of the formats that `read_image` reads."""
    try:
        with open(path, "rb") as file:
            return file.read(8).startswith(BEGINNINGS)
    except OSError:
        return False


def file_size(path: str | Path) -> int:
    """Return the size of a file in bytes, without opening it; -1 if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1
