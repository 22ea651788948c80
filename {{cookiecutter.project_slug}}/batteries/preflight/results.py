"""Run checks and print one line for each result. A check that fails does not stop the others."""

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from batteries.core.code_errors import explain_code_error
from batteries.core.errors import RunError, UserError, explain_nondeterministic, is_out_of_memory
from batteries.core.project import ROOT, is_user_code

Outcome = Literal["pass", "warning", "fail"]
STYLES: dict[Outcome, str] = {"pass": "green", "warning": "yellow", "fail": "bold red"}
MAX_MESSAGE_LENGTH = 200  # characters of the message of an unexpected error


class CheckResult(NamedTuple):
    """The result of a check.

    Attributes:
        outcome: Whether the check passed.
        details: What was found, in one line.
        hint: How to fix it; empty if there is nothing to fix.
    """

    outcome: Outcome
    details: str
    hint: str = ""


def run_checks(checks: Mapping[str, Callable[[], CheckResult]]) -> dict[str, CheckResult]:
    """Run each check and print its result as soon as it is known.

    Args:
        checks: A function for each name. An exception in it becomes a result that fails.

    Returns:
        A result for each name.
    """
    table = ResultTable(name_width=max(len(name) for name in checks))
    results: dict[str, CheckResult] = {}
    begin = time.monotonic()
    for name, check in checks.items():
        with table.show_running(name):
            results[name] = run_one_check(check)
        table.print_result(name, results[name])
    table.print_summary(list(results.values()), time.monotonic() - begin)
    return results


def run_one_check(check: Callable[[], CheckResult]) -> CheckResult:
    """Run a check and return its result; an exception becomes a result that fails."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 (the other checks must run too)
        return CheckResult("fail", describe_error(error), suggest_fix(error))


def raise_if_failed(results: Mapping[str, CheckResult]) -> None:
    """Raise RunError, which means exit code 1, if a check failed."""
    failed = [name for name, result in results.items() if result.outcome == "fail"]
    if failed:
        raise RunError(f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}.")


def describe_error(error: Exception) -> str:
    """Describe an error in one line: the message of a UserError, or the type, message and place of another error.

    The place is the last line of user code in the traceback: the repository without batteries/ and without libraries.
    """
    message = " ".join(str(error).split())
    if isinstance(error, UserError):
        return message
    if explanation := explain_code_error(error):
        return explanation
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_user_code(Path(frame.filename))]
    place = ""
    if frames:
        place = f" ({Path(frames[-1].filename).relative_to(ROOT)}, line {frames[-1].lineno})"
    return f"{type(error).__name__}: {message[:MAX_MESSAGE_LENGTH] or '(no error message)'}{place}"


def suggest_fix(error: Exception) -> str:
    """Return a hint for an error with a known fix, otherwise an empty string."""
    if is_out_of_memory(error):
        return "use more --accumulation-steps, or a smaller --batch-size"
    return "use --no-deterministic, or replace the operation" if explain_nondeterministic(error) else ""


class ResultTable:
    """Prints results as they come: in columns on a terminal, one line for each in a pipe or a file.

    No thread draws anything, because loaders fork in the meantime and times are measured.
    """

    def __init__(self, name_width: int) -> None:
        """Print the header on a terminal.

        Args:
            name_width: The width of the column with the names of the checks, in characters.
        """
        from rich.console import Console

        self._name_width = name_width
        self._screen = Console(file=sys.stdout, highlight=False)
        if self._screen.is_terminal:
            self._print(self._make_row("result", "check", "details", style="bold"))
            self._screen.rule(characters="-", style="dim")

    @contextmanager
    def show_running(self, name: str) -> Iterator[None]:
        """Show the name of a check on a terminal while it runs."""
        from rich.live import Live

        if not self._screen.is_terminal:
            yield
            return
        row = self._make_row("...", name, "", style="dim")
        with Live(row, console=self._screen, auto_refresh=False, transient=True, redirect_stdout=False):
            yield

    def print_result(self, name: str, result: CheckResult) -> None:
        """Print the result of one check."""
        if self._screen.is_terminal:
            self._print_columns(name, result)
            return
        hint = f" Fix: {result.hint}." if result.hint else ""
        self._print(f"{result.outcome:<8} {name:<{self._name_width}}  {result.details.rstrip('.')}.{hint}")

    def print_summary(self, results: Sequence[CheckResult], seconds: float) -> None:
        """Print the number of checks with each outcome, and the time."""
        if self._screen.is_terminal:
            self._screen.rule(characters="-", style="dim")
        counts = {outcome: sum(result.outcome == outcome for result in results) for outcome in STYLES}
        summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        self._print(f"{len(results)} checks in {seconds:.0f} s: {summary}.")

    def _print_columns(self, name: str, result: CheckResult) -> None:
        from rich.text import Text

        style = STYLES[result.outcome]
        details = Text(result.details)
        if result.hint:
            details.append(f"\n-> {result.hint}", style)
        self._print(self._make_row(Text(result.outcome, style), Text(name), details))

    def _make_row(self, outcome: Any, name: Any, details: Any, style: str = "") -> Any:
        from rich.table import Table

        row = Table.grid(padding=(0, 2, 0, 0), expand=True)
        row.add_column(width=len("warning"), no_wrap=True)
        row.add_column(width=self._name_width, no_wrap=True)
        row.add_column(ratio=1, overflow="fold")
        row.add_row(outcome, name, details, style=style)
        return row

    def _print(self, content: Any) -> None:
        self._screen.print(content, markup=False, soft_wrap=True)
        self._screen.file.flush()
