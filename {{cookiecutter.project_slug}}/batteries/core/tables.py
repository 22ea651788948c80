"""Reading and writing CSV tables."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from batteries.core.errors import UserError
from batteries.core.files import write_output

if TYPE_CHECKING:
    import pandas as pd

KEYS = ("id", "target")


def write_new_file(path: Path, text: str, *, overwrite: bool) -> None:
    """Put `text` into `path` in one step. Raises BadInput where the file is there with other contents."""
    check_new_file(path, text, overwrite=overwrite)
    write_output(path, lambda file: file.write(text.encode()), "--output")


def check_new_file(path: Path, text: str, *, overwrite: bool) -> None:
    """Raise BadInput where `path` is a folder, or is there with other contents than `text`."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file.")
    if path.exists() and not overwrite and path.read_bytes() != text.encode():
        raise UserError(f"{path} is there already, with other contents; give --overwrite, or another --output.")


def read_table(path: Path) -> "pd.DataFrame":
    """The cells of a CSV file as texts. Raises ValueError for a row that is longer than the header."""
    import pandas as pd

    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # pandas would only warn, and cut the row
        try:
            return pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig")
        except pd.errors.ParserWarning:
            raise ValueError("its rows are longer than its header") from None
