"""Reading image files, JPEG, PNG, WebP and GIF, of any colour type."""

import os
import re
import stat
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from batteries.core.errors import UserError
from batteries.data.image_decoding import IMAGE_SUFFIXES, PNG_SIGNATURE, decode_file

SUFFIXES = IMAGE_SUFFIXES  # of the files in a directory that are read, in training and prediction
BEGINNINGS = (b"\xff\xd8\xff", PNG_SIGNATURE, b"GIF87a", b"GIF89a", b"RIFF")  # the first bytes of files


def read_image(path: str | Path) -> torch.Tensor:
    """Read an image and apply its EXIF orientation.

    Grey images get three channels, CMYK becomes RGB, alpha is dropped, a value v of 16 bits becomes v / 257, and the
    first frame of an animation is taken. Training, the check before it, and tools/predict.py --images read with this
    function.

    Returns:
        The image, shape (3, H, W), uint8, 0 to 255.

    Raises:
        UserError: If the file is missing, empty, truncated or not an image. Changed bytes within a JPEG can go
            undetected.
    """
    try:
        return decode_file(path, "RGB")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an image ({explain(path, error)}).") from error


def explain(path: str | Path, error: Exception) -> str:
    """Return what is wrong with a file; the errors of torchcodec begin with a position in its source code."""
    if not os.path.isfile(path):
        return "it does not exist"
    if not os.path.getsize(path):
        return "it is empty"
    if not begins_like_an_image(path):
        return "it is not a JPEG, PNG, WebP or GIF file"
    if isinstance(error, OSError):
        return error.strerror or "it cannot be opened"
    reason = re.sub(r"^\w+, \S+:\d+, ", "", str(error).splitlines()[0])
    return f"it is damaged: {reason.rstrip('.')}"


def find_invalid_files(paths: Sequence[str | Path], read: Callable[[Any], torch.Tensor] = read_image) -> dict[int, str]:
    """Return the errors of the files that cannot be read, by their positions in `paths`.

    Each file is decoded, because no part of a file shows whether all of it can be decoded: 2 ms for a JPEG of 500x375
    pixels on one core.

    Args:
        paths: The files.
        read: The function that reads them.
    """

    def error_of(path: str | Path) -> str | None:
        try:
            read(path)
        except (UserError, OSError, RuntimeError, ValueError) as error:
            return str(error) or type(error).__name__
        return None

    from rich.progress import track

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # torchcodec decodes without the interpreter lock
        is_hidden = not sys.stdout.isatty()
        found = track(pool.map(error_of, paths), "images", total=len(paths), transient=True, disable=is_hidden)
        return {position: error for position, error in enumerate(found) if error is not None}


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
