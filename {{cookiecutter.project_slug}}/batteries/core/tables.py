"""Reading and writing CSV tables."""

import codecs
import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from batteries.core.errors import UserError
from batteries.core.files import write_output
from batteries.core.text import count_of, find_repeated

KEYS = ("id", "target")  # columns of a table of predictions that are not classes
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}  # that other programs write instead of commas
QUOTING_FIX = 'remove it, or enclose the whole cell and double the marks inside it, such as "5"" lens"'


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        line: The line of the file in which it begins, from 1.
        cells: The text of each cell.
    """

    line: int
    cells: list[str]


@dataclass(frozen=True)
class CsvTable:
    """The contents of a CSV file; each row has as many cells as there are columns.

    Attributes:
        columns: The names of the columns; none if the file is empty.
        rows: The rows below the header.
    """

    columns: list[str]
    rows: list[Row]

    def column(self, name: str) -> list[str]:
        """Return the cells of a column."""
        position = self.columns.index(name)
        return [row.cells[position] for row in self.rows]

    def records(self) -> list[dict[str, str]]:
        """Return each row as a mapping from the name of a column to its cell."""
        return [dict(zip(self.columns, row.cells, strict=True)) for row in self.rows]


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


def read_table(path: Path, name: str | None = None) -> CsvTable:
    """Read a CSV file strictly. Raises UserError, with the line and the fix, if anything in it is ambiguous.

    Args:
        path: The file.
        name: What error messages call the file; its path by default.
    """
    name = str(path) if name is None else name
    return parse_table(read_table_text(path, name), name)


def read_table_text(path: Path, name: str) -> str:
    """Return the text of a table, with its byte order mark. Raises UserError if the file is not text in UTF-8."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{name} cannot be read as a table ({error.strerror}).") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{name} is encoded as UTF-16; save it as UTF-8, such as with iconv -f UTF-16 -t UTF-8.")
    if b"\0" in content:
        line = _line_of(content, content.index(0))
        raise UserError(
            f"{name} line {line} has a NUL character, as in a damaged file or in UTF-16; "
            "write the file again, as UTF-8."
        )
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = _line_of(content, error.start)
        raise UserError(
            f"{name} line {line} has the byte {content[error.start]:#04x}, which is not UTF-8; save the file as UTF-8, "
            "such as with iconv -f WINDOWS-1252 -t UTF-8."
        ) from None


def parse_table(text: str, name: str) -> CsvTable:
    """Parse the text of a table. Raises UserError as `read_table` does.

    Args:
        text: The contents of the file.
        name: What error messages call the file.
    """
    header, *rows = parse_rows(text, name) or [Row(1, [])]
    _check_header(header.cells, name)
    for row in rows:
        if len(row.cells) != len(header.cells):
            raise UserError(
                f"{name} line {row.line} has {count_of(len(row.cells), 'cell')} for "
                f"{count_of(len(header.cells), 'column')} ({', '.join(header.cells)}); write one cell for each column, "
                "and enclose a cell that has a comma in quotation marks."
            )
    return CsvTable(header.cells, rows)


def parse_rows(text: str, name: str) -> list[Row]:
    """Parse the rows of a table, of any lengths, with its header. Rows of empty cells only are left out.

    Spreadsheets leave such rows at the end.

    Raises:
        UserError: If a quotation mark does not enclose a cell: a reader that is not strict would take all lines up to
            the next quotation mark, or to the end of the file, for one cell.
    """
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    rows: list[Row] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{name} line {line} {_describe_csv_error(error)}.") from None
        if cells is None:
            return rows
        if reader.line_num > line and _joins_rows(cells):
            raise UserError(
                f"{name} line {line} has a quotation mark that is closed in line {reader.line_num} only, with whole "
                f"rows between them; {QUOTING_FIX}."
            )
        if any(cells):
            rows.append(Row(line, cells))


def _describe_csv_error(error: csv.Error) -> str:
    if "field limit" in str(error):
        return f"has a cell of more than {csv.field_size_limit():,} characters; close its quotation mark, or shorten it"
    return f"has a quotation mark that does not enclose a whole cell; {QUOTING_FIX}"


def _joins_rows(cells: Sequence[str]) -> bool:
    """Return whether a cell with line breaks would be the end of a row, whole rows, and the beginning of a row.

    This is so if a quotation mark was not closed and a later row has one, too. Other cells may have line breaks.
    """
    commas = len(cells) - 1
    for position, cell in enumerate(cells):
        first, *others = [line.count(",") for line in re.split("\r\n|\r|\n", cell)]
        if not others or first != commas - position:
            continue
        *whole, last = others
        if last == position and (not whole or commas in whole):
            return True
    return False


def _check_header(columns: Sequence[str], name: str) -> None:
    """Raise UserError if columns are repeated, or the only one seems to be several with another separator."""
    if repeated := find_repeated(columns):
        raise UserError(f"{name} has more than one column {repeated[0] or 'without a name'}; keep one.")
    for separator, word in SEPARATORS.items():
        if len(columns) == 1 and separator in columns[0]:
            raise UserError(
                f"{name} has one column, {columns[0]!r}, which looks like several columns separated by {word}; save it "
                "with commas."
            )


def _line_of(content: bytes, position: int) -> int:
    """Return the line of a byte, from 1."""
    return len(re.findall(b"\r\n|\r|\n", content[:position])) + 1
