"""The score log: a CSV file in git, one line per submission of a run, oldest first.

Git merges it by union (.gitattributes): the lines of both branches stay, and the next write sorts them again. Lines of
one submission are merged if they do not conflict, for example if one branch added the public score and the other one
the private score. Otherwise all of them stay, and `find_conflicts` reports them.
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
from batteries.core.files import warn_of_missing_lock, write_output
from batteries.core.tables import Row, parse_rows, read_table_text

SCORE_COLUMNS = ("valid", "test", "public", "private")


@dataclass(frozen=True)
class ScoreEntry:
    """One line of the score log. A score is None if it is not known."""

    date: str  # UTC, to the second
    name: str  # of the submission
    logdir: str
    commit: str
    config: str  # hash of the options
    metric: str
    valid: float | None = None
    test: float | None = None
    public: float | None = None  # on the leaderboard during the competition
    private: float | None = None  # on the leaderboard after its end
    note: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """The submission: its logdir and name."""
        return self.logdir, self.name


COLUMNS = [field.name for field in fields(ScoreEntry)]


def add_entry(path: Path, entry: ScoreEntry) -> None:
    """Add a line atomically; processes that add at the same time wait for each other.

    Raises:
        UserError: If the submission is already in the score log, or the file cannot be read or written.
    """
    with _locked(path):
        entries = read_score_log(path)
        earlier = _find(entries, entry.key)
        if earlier is not None:
            raise UserError(
                f"{path} already has {entry.name} of {entry.logdir}, from {earlier.date}; give another submission a "
                "different --name, or use --update to change that line."
            )
        _write(path, [*entries, entry])


def update_entry(path: Path, key: tuple[str, str], **values: float | str | None) -> tuple[ScoreEntry, ScoreEntry]:
    """Change the line of a submission; if it has several lines, change all of them.

    Args:
        path: The score log.
        key: The key of the submission.
        values: The new values by column; those that are None or empty are ignored.

    Returns:
        The entry before and after.

    Raises:
        UserError: If the submission is not in the score log, or the file cannot be read or written.
    """
    changes: dict[str, Any] = {name: value for name, value in values.items() if value not in (None, "")}
    with _locked(path):
        entries = read_score_log(path)
        before = _find(entries, key)
        if before is None:
            raise UserError(f"--update: {path} does not have {key[1]} of {key[0]}; add it without --update.")
        entries = merge_entries(replace(entry, **changes) if entry.key == key else entry for entry in entries)
        _write(path, entries)
    after = _find(entries, key)
    assert after is not None
    return before, after


def _find(entries: Iterable[ScoreEntry], key: tuple[str, str]) -> ScoreEntry | None:
    return next((entry for entry in entries if entry.key == key), None)


def read_score_log(path: Path) -> list[ScoreEntry]:
    """Read the entries, oldest first; none if the file does not exist.

    Raises:
        UserError: If a line is not an entry.
    """
    if path.is_dir():
        raise UserError(f"--score-log {path} is a directory; give the path of a file, such as scores.csv.")
    if not path.is_file():
        return []
    return merge_entries(_parse_entry(path, number, row) for number, row in _read_rows(path))


def merge_entries(entries: Iterable[ScoreEntry]) -> list[ScoreEntry]:
    """Sort entries by date, and merge entries of one submission that do not conflict."""
    merged: dict[tuple[str, str], list[ScoreEntry]] = {}
    for entry in entries:
        _merge_into(merged.setdefault(entry.key, []), entry)
    flat = [entry for same_key in merged.values() for entry in same_key]
    return sorted(flat, key=lambda entry: (entry.date, *entry.key))


def _merge_into(same_key: list[ScoreEntry], entry: ScoreEntry) -> None:
    """Merge an entry into the first of `same_key` that it does not conflict with; append it if there is none."""
    for index, existing in enumerate(same_key):
        both = _merge_two(existing, entry)
        if both is not None:
            same_key[index] = both
            return
    same_key.append(entry)


def _merge_two(a: ScoreEntry, b: ScoreEntry) -> ScoreEntry | None:
    """Merge two entries of one submission, with the earlier date; None if they conflict."""
    values: dict[str, Any] = {"date": min(a.date, b.date)}
    for name in COLUMNS[1:]:
        known = {value for value in (getattr(a, name), getattr(b, name)) if value not in (None, "")}
        if len(known) > 1:
            return None
        values[name] = known.pop() if known else getattr(a, name)
    return ScoreEntry(**values)


def find_conflicts(entries: Sequence[ScoreEntry]) -> list[str]:
    """Describe the conflict of each submission that has several lines."""
    by_key: dict[tuple[str, str], list[ScoreEntry]] = {}
    for entry in entries:
        by_key.setdefault(entry.key, []).append(entry)
    return [
        f"{name} of {logdir} has {len(same_key)} conflicting lines: {', '.join(_conflicting_values(same_key))}; set "
        f"the correct value with tools/scores.py add {logdir} --update, or delete the wrong line."
        for (logdir, name), same_key in by_key.items()
        if len(same_key) > 1
    ]


def _conflicting_values(entries: Sequence[ScoreEntry]) -> list[str]:
    """List the columns with several values, such as `public 0.5 or 0.6`."""
    conflicts = []
    for column in COLUMNS[1:]:
        values = {getattr(entry, column) for entry in entries} - {None, ""}
        if len(values) > 1:
            conflicts.append(f"{column} {' or '.join(sorted(map(str, values)))}")
    return conflicts


def _read_rows(path: Path) -> list[Row]:
    """List the lines without the header, which a merge may have repeated."""
    rows = parse_rows(read_table_text(path, str(path)), str(path))
    if not rows or rows[0].cells != COLUMNS:
        raise UserError(f"{path} does not begin with {','.join(COLUMNS)}; restore that line.")
    return [row for row in rows if row.cells != COLUMNS]


def _parse_entry(path: Path, number: int, row: Sequence[str]) -> ScoreEntry:
    if len(row) != len(COLUMNS):
        raise UserError(
            f"{path}, line {number}: {len(row)} values for {len(COLUMNS)} columns; complete the line, or delete it."
        )
    values: dict[str, str | float | None] = dict(zip(COLUMNS, row, strict=True))
    for name in SCORE_COLUMNS:
        values[name] = _parse_score(path, number, name, str(values[name]))
    return ScoreEntry(**values)  # type: ignore[arg-type]


def _parse_score(path: Path, number: int, name: str, text: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{path}, line {number}: {name} is {text!r}, but must be a finite number or empty.")
    return value


def _write(path: Path, entries: Sequence[ScoreEntry]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in merge_entries(entries):
        writer.writerow(["" if value is None else value for value in asdict(entry).values()])
    write_output(path, lambda file: file.write(text.getvalue().encode()), "--score-log")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on the directory of `path`; it creates no file. Windows and some file systems have no such lock.

    Raises:
        UserError: If the directory does not exist.
    """
    if not path.parent.is_dir():
        raise UserError(f"--score-log {path} cannot be written: {path.parent} is not a directory; use another one.")
    if os.name == "nt":
        yield
        return
    import fcntl

    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            warn_of_missing_lock(path.parent, error)
        yield
    finally:
        os.close(descriptor)


class ScorePair(NamedTuple):
    """A submission with two scores of the same metric: on valid, and the one it is compared with."""

    name: str
    valid: float
    reference: float


def find_rank_disagreements(pairs: Sequence[ScorePair]) -> list[tuple[str, str]]:
    """List pairs of submissions that the two scores rank differently, the largest differences first.

    Returns:
        Pairs of names: the first has the higher score on valid and the lower reference score.
    """
    found = [(a, b) for a in pairs for b in pairs if a.valid > b.valid and a.reference < b.reference]
    found.sort(key=lambda pair: pair[0].valid - pair[1].valid + pair[1].reference - pair[0].reference, reverse=True)
    return [(a.name, b.name) for a, b in found]
