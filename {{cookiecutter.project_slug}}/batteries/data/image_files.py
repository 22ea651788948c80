"""Image files: listing a directory, and images outside the data set, from a directory or a table of paths."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from batteries.core.errors import UserError
from batteries.core.tables import read_table
from batteries.core.text import count_of, find_repeated, list_first, summarize_names
from batteries.data.dataset import UNKNOWN
from batteries.data.image_decoding import IMAGE_SUFFIXES, decode_file
from batteries.data.table_paths import suggest_path

MAX_LISTED = 5  # files that a message lists


class ImageFiles:
    """Images as uint8 tensors (C, H, W), 0 to 255, with the target UNKNOWN.

    Args:
        source: A directory, whose images have their relative paths as ids, in alphabetical order; or a CSV file with a
            column `path`, relative to its directory, and optionally `id`.
        channels: 1 or 3, if `read` is None.
        read: The reader of the data set, from a path to an image (C, H, W).
        suffixes: The suffixes of images in a directory.

    Attributes:
        ids: A unique name for each image.
        paths: Their files.
        left_out: The files of a directory that are not read, with their number; empty if there are none.

    Raises:
        UserError: If no image is found, or the table is invalid.
    """

    def __init__(
        self,
        source: Path,
        channels: int,
        read: Callable[[Path], torch.Tensor] | None = None,
        suffixes: Sequence[str] = IMAGE_SUFFIXES,
    ) -> None:
        self.channels = channels
        self.read = self._decode if read is None else read
        self.left_out = ""
        if source.is_file():
            self.ids, self.paths = _read_table(source)
        else:
            self.ids, self.paths, self.left_out = _read_directory(source, suffixes)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one image (C, H, W) and its target ()."""
        return self.read(self.paths[index]), torch.tensor(UNKNOWN)

    def _decode(self, path: Path) -> torch.Tensor:
        try:
            return decode_file(path, "GRAY" if self.channels == 1 else "RGB")
        except (OSError, RuntimeError, ValueError):
            raise UserError(f"{path} cannot be read as an image: it is empty, damaged or not an image.") from None


def is_image(path: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> bool:
    """Return whether a file has the suffix of an image."""
    return path.suffix.lower() in suffixes


def find_files(directory: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[Path]:
    """List the files in `directory` and below it, sorted, without hidden files and directories.

    Symbolic links are followed; a directory that is reached twice is read once.
    """
    found: list[Path] = []
    visited: set[str] = set()
    for parent, directories, names in os.walk(directory, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            directories.clear()
            continue
        visited.add(real)
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        paths = [Path(parent, name) for name in (*names, *directories) if not name.startswith(".")]
        found += [path for path in paths if is_image(path, suffixes) or path.is_file()]
    return sorted(found)


def count_suffixes(paths: Iterable[Path]) -> str:
    """Count files by their suffix, or by their name if they have none: `2 .bmp, 1 .tif`."""
    counts = Counter(path.suffix.lower() or path.name for path in paths)
    return ", ".join(f"{count} {printable(kind)}" for kind, count in counts.items())


def check_names(source: str, names: Iterable[str]) -> None:
    """Raise UserError if a table cannot contain the name of a file, because it is not UTF-8 or has a carriage return.

    Args:
        source: What the error calls the directory, such as `--data-dir data`.
        names: The names.
    """
    for name in names:
        if printable(name) != name:
            raise UserError(
                f"{source} has a file named '{printable(name)}', which a table cannot contain because the name is not "
                "UTF-8; rename it, or convert all names, such as with convmv -r -f latin1 -t utf8 --notest."
            )
        if "\r" in name:
            raise UserError(f"{source} has a file named {name!r}, which a table cannot contain; rename it.")


def printable(name: str) -> str:
    """Return a file name with escapes in place of bytes that are not UTF-8."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _read_directory(directory: Path, suffixes: Sequence[str]) -> tuple[list[str], list[Path], str]:
    """List the ids and paths of the images in a directory and below it, and describe the other files."""
    files = find_files(directory, suffixes)
    paths = [path for path in files if is_image(path, suffixes)]
    others = [path for path in files if not is_image(path, suffixes)]
    left_out = ""
    if others:
        names = list_first((printable(path.relative_to(directory).as_posix()) for path in others), MAX_LISTED)
        left_out = f"{count_of(len(others), 'file')} ({count_suffixes(others)}): {names}"
    if not paths:
        found = f"; left out: {left_out}" if left_out else ""
        raise UserError(
            f"--images {directory} has no images ({', '.join(suffixes)}){found}; give a directory or a CSV file."
        )
    ids = [path.relative_to(directory).as_posix() for path in paths]
    check_names(f"--images {directory}", ids)
    return ids, paths, left_out


def _read_table(file: Path) -> tuple[list[str], list[Path]]:
    """Read the ids and paths of the images from a table."""
    name = f"--images {file}"
    if is_image(file):
        raise UserError(f"{name} is an image; give its directory, or a CSV file with a column path.")
    table = read_table(file, name)
    if "path" not in table.columns or not table.rows:
        raise UserError(f"{name} needs a column path, and rows.")
    ids = table.column("id" if "id" in table.columns else "path")
    paths = [file.parent / path for path in table.column("path")]
    if "" in ids:
        raise UserError(f"{name} has an empty id, in row {ids.index('') + 1}.")
    if repeated := find_repeated(ids):
        raise UserError(f"{name} has more than one row of {summarize_names('id', repeated)}.")
    missing = [path for path, file_path in zip(table.column("path"), paths, strict=True) if not file_path.is_file()]
    if missing:
        listed = summarize_names("file", [str(file.parent / path) for path in missing])
        fix = suggest_path(file.parent, missing[0]) or "correct these paths"
        raise UserError(f"{name} lists files that do not exist: {listed}; {fix}.")
    return ids, paths
