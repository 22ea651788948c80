"""The ledger of scores: a CSV file in git, one line per run and submission, oldest first.

Git merges it by union (.gitattributes): lines of both branches stay, and the next line that is added puts them in
order again. Lines of one submission become one where they do not contradict each other, such as where one branch filled
in the public score and the other the private; else all stay, and `contradictions` names them.
"""

import csv
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from batteries.core.errors import UserError
from batteries.core.files import write_output

SCORES = ("valid", "test", "public", "private")


@dataclass(frozen=True)
class ScoreEntry:
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


COLUMNS = [field.name for field in fields(ScoreEntry)]


def add_entry(path: Path, entry: ScoreEntry) -> None:
    """Enter one more line, in one step: two who add at once wait for each other.

    Raises BadInput where this submission of this run is there already.
    """
    with _alone(path):
        entries = read_score_log(path)
        if earlier := next((old for old in entries if old.key == entry.key), None):
            raise UserError(
                f"{path} has {entry.name} of {entry.logdir} already, of {earlier.date}; give another submission a "
                f"--name of its own, or --update to fill in that line."
            )
        _write(path, [*entries, entry])


def update_entry(path: Path, key: tuple[str, str], **values: float | str | None) -> tuple[ScoreEntry, ScoreEntry]:
    """Fill in the line of `key`, or all of them: what is None or empty in `values` stays. Gives what it was and is.

    Raises BadInput where it is not there.
    """
    given: dict[str, Any] = {name: value for name, value in values.items() if value not in (None, "")}
    with _alone(path):
        entries = read_score_log(path)
        old = next((entry for entry in entries if entry.key == key), None)
        if old is None:
            raise UserError(f"--update: {path} has no {key[1]} of {key[0]}; leave --update out to enter it.")
        entries = merge_entries(replace(entry, **given) if entry.key == key else entry for entry in entries)
        _write(path, entries)
    return old, next(entry for entry in entries if entry.key == key)


def read_score_log(path: Path) -> list[ScoreEntry]:
    """The entries, oldest first; none where there is no file. Raises BadInput, with the line, for what is no entry."""
    if path.is_dir():
        raise UserError(f"--ledger {path} is a folder; give the name of a file, such as scores.csv.")
    if not path.is_file():
        return []
    return merge_entries(_read_entry(path, number, row) for number, row in _rows(path))


def merge_entries(entries: Iterable[ScoreEntry]) -> list[ScoreEntry]:
    """The entries, oldest first; those of one submission that do not contradict each other as one."""
    joined: dict[tuple[str, str], list[ScoreEntry]] = {}
    for entry in entries:
        lines = joined.setdefault(entry.key, [])
        for place, line in enumerate(lines):
            if (both := _join_two(line, entry)) is not None:
                lines[place] = both
                break
        else:
            lines.append(entry)
    return sorted((line for lines in joined.values() for line in lines), key=lambda line: (line.date, *line.key))


def _join_two(one: ScoreEntry, other: ScoreEntry) -> ScoreEntry | None:
    """What either says, with the earlier date; None where they contradict each other."""
    values: dict[str, Any] = {"date": min(one.date, other.date)}
    for name in COLUMNS[1:]:
        there = {value for value in (getattr(one, name), getattr(other, name)) if value not in (None, "")}
        if len(there) > 1:
            return None
        values[name] = there.pop() if there else getattr(one, name)
    return ScoreEntry(**values)


def contradictions(entries: Sequence[ScoreEntry]) -> list[str]:
    """A sentence for each submission that has lines which do not agree."""
    lines: dict[tuple[str, str], list[ScoreEntry]] = {}
    for entry in entries:
        lines.setdefault(entry.key, []).append(entry)
    found = []
    for (logdir, name), same in lines.items():
        values = {column: {str(value) for line in same if (value := getattr(line, column))} for column in COLUMNS[1:]}
        said = [f"{column} {' or '.join(sorted(texts))}" for column, texts in values.items() if len(texts) > 1]
        if len(same) > 1:
            found.append(
                f"{name} of {logdir} has {len(same)} lines that do not agree: {', '.join(said)}; say what is right by "
                f"scores.py add {logdir} --update, or leave one of them."
            )
    return found


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines but for the header, which a merge may have doubled, with their numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a ledger of scores ({error}).") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    if next(reader, None) != COLUMNS:
        raise UserError(f"{path} does not begin with {','.join(COLUMNS)}; put that line back.")
    for row in reader:
        if row and row != COLUMNS:
            yield reader.line_num, row


def _read_entry(path: Path, number: int, row: Sequence[str]) -> ScoreEntry:
    if len(row) != len(COLUMNS):
        raise UserError(f"{path}, line {number}, has {len(row)} values for {len(COLUMNS)} columns.")
    values: dict[str, str | float | None] = dict(zip(COLUMNS, row, strict=True))
    for name in SCORES:
        values[name] = _read_score(path, number, name, str(values[name]))
    return ScoreEntry(**values)  # type: ignore[arg-type]


def _read_score(path: Path, number: int, name: str, text: str) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise UserError(f"{path}, line {number}: {name} is {text!r}, which is no score; empty the cell.")
    return value


def _write(path: Path, entries: Sequence[ScoreEntry]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(
        [["" if value is None else value for value in asdict(entry).values()] for entry in merge_entries(entries)]
    )
    write_output(path, lambda file: file.write(text.getvalue().encode()), "--ledger")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process is in here for a file in the folder of `path`; it leaves none. Not on Windows.

    Raises BadInput where there is no such folder.
    """
    if not path.parent.is_dir():
        raise UserError(f"--ledger {path} cannot be: {path.parent} is no folder; use another.")
    if os.name == "nt":
        yield
        return
    import fcntl

    descriptor = os.open(path.parent, os.O_RDONLY)
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
