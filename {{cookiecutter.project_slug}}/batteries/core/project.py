"""The generated repository: its root directory and its settings in pyproject.toml."""

import inspect
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def project_settings() -> dict[str, Any]:
    """Read the table [tool.batteries] of pyproject.toml."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["tool"]["batteries"]


def source_of(definition: Any) -> str:
    """Return the path of the file that defines a class or a function, relative to ROOT if it is there."""
    try:
        path = Path(inspect.getfile(inspect.unwrap(definition))).resolve()
    except TypeError:  # such as functools.partial, or a class of a notebook
        return "experiment/"
    return path.relative_to(ROOT.resolve()).as_posix() if path.is_relative_to(ROOT.resolve()) else str(path)


def is_user_code(file: Path) -> bool:
    """Return whether a file belongs to this repository, but not to batteries/ or a virtual environment in it."""
    is_library = file.is_relative_to(ROOT / "batteries") or "site-packages" in file.parts
    return file.is_relative_to(ROOT) and not is_library
