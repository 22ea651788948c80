"""The ledger of scores: a CSV file in git, one line per run and submission, oldest first.

Git merges it by union (.gitattributes): lines of both branches stay, and the next line that is added puts them in
order again.
"""

import csv
import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from batteries.errors import BadInput
from batteries.files import write_text

SCORES = ("valid", "test", "public", "private")


@dataclass(frozen=True)
class Entry:
    """One line. A score is None where it is not known; `config` is a hash of what was asked for."""

    date: str  # UTC, to the second
    name: str  # of the submission
    logdir: str
    commit: str
    config: str
    metric: str
    valid: float | None = None
    test: float | None = None
    public: float | None = None  # on the leaderboard, while the competition runs
    private: float | None = None  # on the leaderboard, after its end
    note: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """What must not be entered twice."""
        return self.logdir, self.name


COLUMNS = [field.name for field in fields(Entry)]


def add_entry(path: Path, entry: Entry) -> None:
    """Enter one more line, in one step: two who add at once wait for each other.

    Raises BadInput where this submission of this run is there already.
    """
    with _alone(path.parent):
        entries = read_ledger(path)
        if earlier := next((old for old in entries if old.key == entry.key), None):
            raise BadInput(
                f"{path} has {entry.name} of {entry.logdir} already, of {earlier.date}; give another submission a "
                f"--name of its own, or --update to fill in that line."
            )
        _write(path, [*entries, entry])


def update_entry(path: Path, key: tuple[str, str], **values: float | str | None) -> Entry:
    """Fill in the line of `key`: what is None in `values` stays as it is. Raises BadInput where it is not there."""
    with _alone(path.parent):
        entries = read_ledger(path)
        old = next((entry for entry in entries if entry.key == key), None)
        if old is None:
            raise BadInput(f"--update: {path} has no {key[1]} of {key[0]}; leave --update out to enter it.")
        new = replace(old, **{name: value for name, value in values.items() if value is not None})  # type: ignore[arg-type]
        _write(path, [new if entry is old else entry for entry in entries])
    return new


def read_ledger(path: Path) -> list[Entry]:
    """The entries, oldest first; none where there is no file.

    Lines that a merge has doubled count once. Raises BadInput, with the line, for what is no entry, and where one
    submission has two lines that differ.
    """
    if not path.is_file():
        return []
    entries: dict[tuple[str, str], tuple[int, Entry]] = {}
    for number, row in _rows(path):
        entry = _read_entry(path, number, row)
        line, known = entries.setdefault(entry.key, (number, entry))
        if known != entry:
            raise BadInput(
                f"{path} has {entry.name} of {entry.logdir} twice, in lines {line} and {number}, with other values; "
                f"keep one."
            )
    return sorted((entry for _, entry in entries.values()), key=lambda entry: (entry.date, *entry.key))


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines but for the header, which a merge may have doubled, with their numbers."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        if next(reader, None) != COLUMNS:
            raise BadInput(f"{path} does not begin with {','.join(COLUMNS)}; put that line back.")
        for row in reader:
            if row and row != COLUMNS:
                yield reader.line_num, row


def _read_entry(path: Path, number: int, row: Sequence[str]) -> Entry:
    if len(row) != len(COLUMNS):
        raise BadInput(f"{path}, line {number}, has {len(row)} values for {len(COLUMNS)} columns.")
    values: dict[str, str | float | None] = dict(zip(COLUMNS, row, strict=True))
    for name in SCORES:
        values[name] = _read_score(path, number, name, str(values[name]))
    return Entry(**values)  # type: ignore[arg-type]


def _read_score(path: Path, number: int, name: str, text: str) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise BadInput(f"{path}, line {number}: {name} is {text!r}, which is no score.")
    return value


def _write(path: Path, entries: Sequence[Entry]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    ordered = sorted(entries, key=lambda entry: (entry.date, *entry.key))
    writer.writerows([["" if value is None else value for value in asdict(entry).values()] for entry in ordered])
    write_text(path, text.getvalue())


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is in here for `folder`; it leaves no file. Windows has no such lock."""
    if os.name == "nt":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Point(NamedTuple):
    """A submission with two scores that can be compared."""

    name: str
    first: float
    second: float


def disagreements(points: Sequence[Point]) -> list[tuple[str, str]]:
    """Pairs of names of which the first has more of `first` and less of `second`; the widest apart come first."""
    pairs = [(one, other) for one in points for other in points if one.first > other.first]
    wrong = [(one, other) for one, other in pairs if one.second < other.second]
    wrong.sort(key=lambda pair: pair[0].first - pair[1].first + pair[1].second - pair[0].second, reverse=True)
    return [(one.name, other.name) for one, other in wrong]
