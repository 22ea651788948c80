"""The generated repository: its root directory and its settings in pyproject.toml."""

import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def project_settings() -> dict[str, Any]:
    """Read the table [tool.batteries] of pyproject.toml."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["tool"]["batteries"]
