"""Reading and writing CSV tables."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from batteries.core.errors import UserError
from batteries.core.files import write_output

if TYPE_CHECKING:
    import pandas as pd

KEYS = ("id", "target")  # columns of a table of predictions that are not classes


def write_new_file(path: Path, text: str, *, overwrite: bool) -> None:
    """Write `text` to `path` in one step. Raises UserError under the conditions of `check_new_file`."""
    check_new_file(path, text, overwrite=overwrite)
    write_output(path, lambda file: file.write(text.encode()), "--output")


def check_new_file(path: Path, text: str, *, overwrite: bool) -> None:
    """Raise UserError if `path` is a directory, or a file with other contents than `text` and without `overwrite`."""
    if path.is_dir():
        raise UserError(f"{path} is a directory; give the name of a file.")
    if path.exists() and not overwrite and path.read_bytes() != text.encode():
        raise UserError(f"{path} already exists with different contents; give --overwrite, or another --output.")


def read_table(path: Path) -> "pd.DataFrame":
    """Read a CSV file as strings.

    Raises:
        ValueError: If a row has more cells than the header, or pandas cannot parse the file.
    """
    import pandas as pd

    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # pandas would only warn, and truncate the row
        try:
            return pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig")
        except pd.errors.ParserWarning:
            raise ValueError("its rows are longer than its header") from None
