"""Paths in tables of images: which file is meant by a path that does not exist."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from unicodedata import category, normalize

from batteries.data.image_decoding import IMAGE_SUFFIXES

MAX_FILES = 200_000  # files that are compared with a path, so that an error does not take minutes


def strip_invisible(text: str) -> str:
    """Return `text` without white space and invisible characters, such as a zero-width space, at its ends."""
    visible = [index for index, character in enumerate(text) if category(character)[0] not in "CZ"]
    return text[visible[0] : visible[-1] + 1] if visible else ""


def suggest_path(directory: Path, name: str) -> str:
    """Return the correction of a path that does not exist, such as `for a/1, write a/1.jpg (with its suffix)`.

    It is empty unless exactly one file can be meant.

    Args:
        directory: The directory that paths in the table are relative to.
        name: The path in the table.
    """
    wanted = _parts(strip_invisible(name).replace("\\", "/"))
    matches: dict[str, int] = {}
    for path in islice(directory.rglob("*"), MAX_FILES):
        file = path.relative_to(directory).as_posix()
        if (length := _common_end(wanted, _parts(file))) and path.is_file():
            matches[file] = length
    best = [file for file, length in matches.items() if length == max(matches.values())]
    if len(best) != 1:
        return ""
    return f"for {name}, write {best[0]} ({', '.join(_differences(directory, name, best[0]))})"


def _parts(path: str) -> list[str]:
    """Return the components of a path, without the differences between Unicode forms, or upper and lower case."""
    return [part for part in normalize("NFC", path).casefold().split("/") if part not in ("", ".")]


def _common_end(wanted: Sequence[str], file: Sequence[str]) -> int:
    """Return the number of components of the shorter path if the longer one ends in it, with or without a suffix."""
    count = min(len(wanted), len(file))
    if not count or wanted[-1] not in (file[-1], _without_suffix(file[-1])):
        return 0
    return count if list(wanted[-count:-1]) == list(file[-count:-1]) else 0


def _without_suffix(name: str) -> str:
    path = PurePosixPath(name)
    return path.stem if path.suffix in IMAGE_SUFFIXES else name


def _differences(directory: Path, name: str, file: str) -> list[str]:
    """List how `file` differs from the path in the table."""
    differences = []
    stripped = strip_invisible(name)
    if stripped != name:
        differences.append("without invisible characters at its ends")
    path = stripped.replace("\\", "/")
    if path != stripped:
        differences.append("with / for \\")
    wanted, found = _parts(path), _parts(file)
    if len(wanted) != len(found):
        differences.append(f"relative to {directory}")
    if wanted[-1] != found[-1]:
        differences.append("with its suffix")
    elif normalize("NFC", path) not in normalize("NFC", file) and normalize("NFC", file) not in normalize("NFC", path):
        differences.append("in the same upper and lower case")
    elif not path.endswith(file) and not file.endswith(path):
        differences.append("in the same Unicode form as the name of the file, or rename that")
    return differences
