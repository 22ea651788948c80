"""Images outside the data set: a directory of files, or a table of their paths."""

from pathlib import Path

import torch

from batteries.core.errors import UserError
from batteries.core.tables import read_table
from batteries.core.text import find_repeated, summarize_names
from batteries.data.dataset import UNKNOWN
from batteries.data.image_decoding import IMAGE_SUFFIXES, decode_file


class ImageFiles:
    """Images as uint8 tensors (C, H, W), 0 to 255, with the target UNKNOWN.

    Args:
        source: A directory, whose images have their relative paths as ids, in alphabetical order, without hidden ones;
            or a CSV file with a column `path`, relative to its directory, and optionally `id`.
        channels: 1 or 3.

    Raises:
        UserError: If no image is found, or the table is invalid.
    """

    def __init__(self, source: Path, channels: int) -> None:
        from torchvision.io import ImageReadMode  # imported here because most commands read no image file

        self.mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
        self.ids, self.paths = _read_table(source) if source.is_file() else _read_directory(source)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one image (C, H, W) and its target ()."""
        from torchvision.io import read_file

        path = self.paths[index]
        try:
            image = decode_file(read_file(str(path)), self.mode)
        except (RuntimeError, OSError):
            raise UserError(f"{path} cannot be read as an image: it is empty, damaged or not an image.") from None
        return image, torch.tensor(UNKNOWN)


def _read_directory(directory: Path) -> tuple[list[str], list[Path]]:
    """List the ids and paths of the images in a directory and below it."""
    paths = sorted(path for path in directory.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    names = [path.relative_to(directory) for path in paths]
    visible = [name for name in names if not any(part.startswith(".") for part in name.parts)]  # without .Trash
    if not visible:
        raise UserError(
            f"--images {directory} has no images ({', '.join(IMAGE_SUFFIXES)}); give a directory or a CSV file."
        )
    return [name.as_posix() for name in visible], [directory / name for name in visible]


def _read_table(file: Path) -> tuple[list[str], list[Path]]:
    """Read the ids and paths of the images from a table."""
    try:
        table = read_table(file)
    except ValueError as error:
        raise UserError(f"--images {file} cannot be read as a table ({str(error).strip()}).") from None
    if "path" not in table or not len(table):
        raise UserError(f"--images {file} needs a column path, and rows.")
    ids = list(table["id" if "id" in table else "path"])
    paths = [file.parent / path for path in table["path"]]
    if "" in ids:
        raise UserError(f"--images {file} has an empty id, in row {ids.index('') + 1}.")
    if repeated := find_repeated(ids):
        raise UserError(f"--images {file} has more than one row of {summarize_names('id', repeated)}.")
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise UserError(f"--images {file} lists files that do not exist: {summarize_names('file', missing)}.")
    return ids, paths
