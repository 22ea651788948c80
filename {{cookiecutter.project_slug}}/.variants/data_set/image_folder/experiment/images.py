"""Image files become tensors: JPEG, PNG, WebP and GIF, whatever is in them."""

import os
import stat
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torchvision.io import ImageReadMode, decode_image, read_file

from batteries.core.errors import UserError

PNG = b"\x89PNG\r\n\x1a\n"  # how these files begin
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
# How files begin and end; of WebP, which begins with RIFF, the length stands in its first bytes.
ENDINGS = {b"\xff\xd8\xff": b"\xff\xd9", PNG: b"IEND\xaeB`\x82", b"GIF87a": b";", b"GIF89a": b";"}
BEGINNINGS = (*ENDINGS, b"RIFF")


def read_image(path: str | Path) -> torch.Tensor:
    """The image in `path`, uint8 (3, H, W), 0 to 255, turned as its EXIF orientation says (not that of a WebP).

    Grey gets three channels, CMYK becomes RGB, alpha is left out, 16 bits become 8, of an animation the first picture
    is taken. Raises ValueError with the name of a file that is missing, empty, cut short or no image. Bytes that a disk
    has changed within a JPEG can go unnoticed.
    """
    try:
        data = read_file(str(path))
        if not may_be_decoded(data):
            raise UserError(f"{path} cannot be read as an image (it is cut short or damaged).")
        image = decode_image(data, ImageReadMode.RGB, apply_exif_orientation=True)
    except RuntimeError as error:
        raise UserError(f"{path} cannot be read as an image ({reason(path, error)}).") from error
    if image.ndim == 4:
        image = image[0]
    return image if image.dtype == torch.uint8 else (image.int() >> 8).to(torch.uint8)


def may_be_decoded(file: torch.Tensor) -> bool:
    """Whether the bytes (N,) of a file are no PNG, or a whole one: torchvision (0.29) crashes on some damaged ones."""
    data = file.numpy().data
    return bytes(data[: len(PNG)]) != PNG or is_whole_png(data)


def is_whole_png(data: memoryview) -> bool:
    """Whether all chunks are there and have their checksums (PNG Specification, third edition, section 5.3)."""
    place = len(PNG)
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if zlib.crc32(data[place + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        if data[place + 4 : place + 8] == b"IEND":
            return True
        place = end + 4
    return False


def reason(path: str | Path, error: RuntimeError) -> str:
    """What is wrong with a file, in few words; torchvision begins with the place in its own source."""
    if not os.path.isfile(path):
        return "it is not there"
    if not os.path.getsize(path):
        return "it is empty"
    if not begins_like_an_image(path):
        return "it is neither JPEG, PNG, WebP nor GIF"
    return str(error).splitlines()[0].rsplit(", ", 1)[-1].strip(" .") or "it is damaged"


def check_files(paths: Sequence[str | Path]) -> list[int]:
    """The places in `paths` of files that are missing, empty, cut short or no images.

    Of most only the first and last bytes are read; what has something after its end is decoded.
    """
    with ThreadPoolExecutor(8) as pool:
        return [place for place, whole in enumerate(pool.map(is_whole, paths)) if not whole]


def is_whole(path: str | Path) -> bool:
    """Whether a file begins like an image and ends like one, or can be decoded all the same."""
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
    except ValueError:
        return False
    return True


def begins_like_an_image(path: str | Path) -> bool:
    """Whether the first bytes of a file are those of a format that `read_image` reads."""
    try:
        with open(path, "rb") as file:
            return file.read(8).startswith(BEGINNINGS)
    except OSError:
        return False


def file_size(path: str | Path) -> int:
    """The bytes of a file, without opening it; -1 where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1
