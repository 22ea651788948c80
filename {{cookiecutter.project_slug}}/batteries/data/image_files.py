"""Images that are no part of a data set: a folder of files, or a table that names them."""

import zlib
from pathlib import Path

import torch

from batteries.core.errors import UserError
from batteries.core.tables import read_table
from batteries.core.text import find_repeated, summarize_names
from batteries.data.dataset import UNKNOWN

PNG = b"\x89PNG\r\n\x1a\n"  # how these files begin
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")


class ImageFiles:
    """Images as uint8 tensors (C, H, W), 0 to 255, with the target -1, which is not known.

    `source` is a folder, whose images are called by their paths in it, in alphabetical order, hidden ones left out; or
    a CSV file with a column `path`, counted from its own folder, and `id` where they are called otherwise. `channels`
    is 1 or 3.
    """

    def __init__(self, source: Path, channels: int) -> None:
        from torchvision.io import ImageReadMode

        self.mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
        self.ids, self.paths = _read_table(source) if source.is_file() else _read_folder(source)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One image (C, H, W) and ()."""
        from torchvision.io import decode_image, read_file

        try:
            data = read_file(str(self.paths[index]))
            image = decode_image(data, self.mode, apply_exif_orientation=True) if _may_be_decoded(data) else None
        except (RuntimeError, OSError):
            image = None
        if image is None:
            raise UserError(f"{self.paths[index]} cannot be read as an image: it is empty, damaged or none.")
        image = image[0] if image.ndim == 4 else image  # the first picture of an animation
        return image if image.dtype == torch.uint8 else (image.int() >> 8).to(torch.uint8), torch.tensor(UNKNOWN)


def _may_be_decoded(file: torch.Tensor) -> bool:
    """Whether the bytes (N,) of a file are no PNG, or a whole one: torchvision (0.29) crashes on some damaged ones.

    experiment/images.py, where there is one, has the same for itself: neither package imports the other.
    """
    data = file.numpy().data
    return bytes(data[: len(PNG)]) != PNG or _is_whole_png(data)


def _is_whole_png(data: memoryview) -> bool:
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


def _read_folder(folder: Path) -> tuple[list[str], list[Path]]:
    there = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    names = [path.relative_to(folder) for path in there]
    shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]  # not .Trash, for one
    if not shown:
        raise UserError(f"--images {folder} has no images ({', '.join(SUFFIXES)}); give a folder or a CSV file.")
    return [name.as_posix() for name in shown], [folder / name for name in shown]


def _read_table(file: Path) -> tuple[list[str], list[Path]]:

    try:
        table = read_table(file)
    except ValueError as error:
        raise UserError(f"--images {file} cannot be read as a table ({str(error).strip()}).") from None
    if "path" not in table or not len(table):
        raise UserError(f"--images {file} needs a column path, and rows.")
    ids, paths = list(table["id" if "id" in table else "path"]), [file.parent / path for path in table["path"]]
    if "" in ids:
        raise UserError(f"--images {file} has an empty id, in row {ids.index('') + 1}.")
    if doubled := find_repeated(ids):
        raise UserError(f"--images {file} has more than one row of {summarize_names('id', doubled)}.")
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise UserError(f"--images {file} names what is not there: {summarize_names('file', missing)}.")
    return ids, paths
