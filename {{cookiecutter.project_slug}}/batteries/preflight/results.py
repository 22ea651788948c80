"""What is tried before a long run: each check gives one row, said when it is known, and none stops the others."""

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from batteries.core.errors import RunError, UserError, is_out_of_memory
from batteries.core.project import ROOT

Outcome = Literal["pass", "warning", "fail"]
STYLES: dict[Outcome, str] = {"pass": "green", "warning": "yellow", "fail": "bold red"}


class CheckResult(NamedTuple):
    """What a check found: one sentence or two, and how to mend it."""

    outcome: Outcome
    details: str
    hint: str = ""


def run_checks(checks: Mapping[str, Callable[[], CheckResult]]) -> dict[str, CheckResult]:
    """Try each check and say its row; the rows by name. What a check raises becomes a row that fails."""
    table, rows, begin = ResultTable(max(map(len, checks))), {}, time.monotonic()
    for name, check in checks.items():
        with table.trying(name):
            rows[name] = run_one_check(check)
        table.say(name, rows[name])
    table.say_end(list(rows.values()), time.monotonic() - begin)
    return rows


def run_one_check(check: Callable[[], CheckResult]) -> CheckResult:
    """The row of a check, whatever happens in it."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 (the other checks are tried all the same)
        return CheckResult("fail", describe_error(error), hint_for(error))


def raise_if_failed(rows: Mapping[str, CheckResult]) -> None:
    """Raise RunFailed, which means exit code 1, where a check failed."""
    if failed := [name for name, row in rows.items() if row.outcome == "fail"]:
        raise RunError(f"{len(failed)} of {len(rows)} checks failed: {', '.join(failed)}.")


def describe_error(error: Exception) -> str:
    """An error in one sentence: for the user as it is, a bug with its type and the last of our lines it came through.

    Ours are the user's as well: what stands in this repository, not in a library.
    """
    said = " ".join(str(error).split())
    if isinstance(error, UserError):
        return said
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(ROOT)]
    yours = [frame for frame in lines if Path(frame.filename).parent != ROOT / "batteries"]
    place = f" ({Path(yours[-1].filename).relative_to(ROOT)}, line {yours[-1].lineno})" if yours else ""
    return f"{type(error).__name__}: {said[:200] or 'without a word'}{place}"


def hint_for(error: Exception) -> str:
    """What helps against an error that many runs meet."""
    return "more --accumulation-steps, or less --batch-size" if is_out_of_memory(error) else ""


class ResultTable:
    """Rows as they come: in columns on a terminal, one line each in a pipe or a file.

    Nothing is drawn by a thread: loaders fork meanwhile, and times are measured.
    """

    def __init__(self, width: int) -> None:
        from rich.console import Console

        self.width = width  # of the names of checks
        self.screen = Console(file=sys.stdout, highlight=False)
        if self.screen.is_terminal:
            self._print(self._grid(("result", "check", "what was seen"), "bold"))
            self.screen.rule(characters="-", style="dim")

    @contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """While a check is tried a terminal shows its name."""
        from rich.live import Live

        if not self.screen.is_terminal:
            yield
            return
        waiting = self._grid(("...", name, ""), "dim")
        with Live(waiting, console=self.screen, auto_refresh=False, transient=True, redirect_stdout=False):
            yield

    def say(self, name: str, row: CheckResult) -> None:
        """One row."""
        if not self.screen.is_terminal:
            hint = f" Mend: {row.hint}." if row.hint else ""
            self._print(f"{row.outcome:<8} {name:<{self.width}}  {row.details.rstrip('.')}.{hint}")
            return
        from rich.text import Text

        details = Text(row.details)
        if row.hint:
            details.append(f"\n-> {row.hint}", STYLES[row.outcome])
        self._print(self._grid((Text(row.outcome, STYLES[row.outcome]), Text(name), details)))

    def say_end(self, rows: Sequence[CheckResult], seconds: float) -> None:
        """How many of each there are."""
        if self.screen.is_terminal:
            self.screen.rule(characters="-", style="dim")
        counts = {outcome: sum(row.outcome == outcome for row in rows) for outcome in STYLES}
        said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        self._print(f"{len(rows)} checks in {seconds:.0f} s: {said}.")

    def _grid(self, cells: Sequence[Any], style: str = "") -> Any:
        from rich.table import Table as Grid

        grid = Grid.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(width=len("warning"), no_wrap=True)
        grid.add_column(width=self.width, no_wrap=True)
        grid.add_column(ratio=1, overflow="fold")
        grid.add_row(*cells, style=style)
        return grid

    def _print(self, what: Any) -> None:
        self.screen.print(what, markup=False, soft_wrap=True)
        self.screen.file.flush()
