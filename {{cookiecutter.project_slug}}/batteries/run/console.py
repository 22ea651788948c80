"""What a run says: lines and a progress bar on a terminal, plain lines elsewhere, and all of it in train.log."""

import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from batteries.core.command_line import discard_output
from batteries.core.ranks import is_rank_zero, rank
from batteries.data.loaders import Batch
from batteries.run.timing import Stopwatch

logger = logging.getLogger("batteries")
SECONDS_BETWEEN_LINES = 30  # where there is no terminal, such as in a pipe or a batch job
SECONDS_BETWEEN_DRAWINGS = 0.5  # of the bar: each takes some milliseconds
CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07|[\x00-\x08\x0b-\x1f\x7f]")  # ANSI, and the rest


class Console:
    """Console output of rank 0, and train.log with stdout, stderr and the log lines of all ranks.

    While it is open it replaces sys.stdout and sys.stderr. Ranks other than 0 write to train.log only, each line with
    its rank.

    Attributes:
        log: The log file.
        screen: rich's console on rank 0 while open; otherwise None.
        has_bar: Whether a progress bar is shown now.
    """

    def __init__(self, log_file: Path, quiet: bool = False) -> None:
        """Create a console that is not open yet.

        Args:
            log_file: train.log.
            quiet: Show only warnings and what the user prints.
        """
        self.quiet = quiet
        self.screen: Any = None
        self.has_bar = False
        self.log = _LogFile(log_file)
        self.log.setLevel(logging.INFO if is_rank_zero() else logging.WARNING)
        self._replaced: tuple[Any, ...] = ()
        self._tees: tuple[_Tee, ...] = ()

    def open(self) -> None:
        """Open the log file and capture stdout and stderr."""
        logger.setLevel(logging.INFO)
        logger.propagate = False
        _close_handlers()
        out = _Outlet(sys.stdout)
        err = _Outlet(sys.stderr)
        self.log.open()
        logger.addHandler(self.log)
        if is_rank_zero():
            self.screen = _make_screen(out)
            handler = _ScreenHandler(self.screen)
            handler.setLevel(logging.WARNING if self.quiet else logging.INFO)
            logger.addHandler(handler)
        self._replaced = sys.stdout, sys.stderr
        self._tees = _Tee(self, out, "OUT"), _Tee(self, err, "ERR")
        sys.stdout, sys.stderr = self._tees  # type: ignore[assignment]

    def close(self) -> None:
        """Restore stdout and stderr, and close the log file."""
        for tee in self._tees:
            tee.end_line()
        if self._tees == (sys.stdout, sys.stderr):
            sys.stdout, sys.stderr = self._replaced
        _close_handlers()

    def note(self, text: str, level: int = logging.INFO) -> None:
        """Write lines to train.log only."""
        self.log.write(text, logging.getLevelName(level))

    def track(self, watch: Stopwatch, label: str, log_every: int) -> Iterator[Batch]:
        """Give batches on and show how far they are; metrics are read, and waited for, every `log_every` steps."""
        if self.screen is None or self.quiet:
            yield from watch
        elif self.screen.is_terminal:
            yield from self._with_bar(watch, label, log_every)
        else:
            yield from self._with_lines(watch, label)

    def _with_bar(self, watch: Stopwatch, label: str, log_every: int) -> Iterator[Batch]:
        from rich import progress

        columns = [
            progress.TextColumn(label),
            progress.BarColumn(bar_width=max(4, self.screen.width - 76)),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[status]}"),
            progress.TimeRemainingColumn(compact=True),
        ]
        # The bar is drawn when it is told so: a thread that redraws would compete with the step.
        quiet: dict[str, Any] = {"auto_refresh": False, "redirect_stdout": False, "redirect_stderr": False}
        with progress.Progress(*columns, console=self.screen, transient=True, **quiet) as bar:
            self.has_bar = True
            total, step, drawn = len(watch.batches), watch.batches.first_step, time.monotonic()
            task = bar.add_task(label, total=total, status="")
            try:
                for batch in watch:
                    yield batch
                    step += batch.ends_step
                    if batch.ends_step and (step % log_every == 0 or step == total):
                        bar.update(task, status=watch.status())
                    if (now := time.monotonic()) - drawn > SECONDS_BETWEEN_DRAWINGS:
                        drawn = now
                        bar.update(task, completed=step, refresh=True)
            finally:
                self.has_bar = False

    def _with_lines(self, watch: Stopwatch, label: str) -> Iterator[Batch]:
        said, step = time.monotonic(), watch.batches.first_step
        for batch in watch:
            yield batch
            step += batch.ends_step
            if batch.ends_step and time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                logger.info(f"{label}  {step}/{len(watch.batches)}  {watch.status()}")


class _ScreenHandler(logging.Handler):
    """Lines above the progress bar, neither wrapped nor coloured by chance."""

    def __init__(self, screen: Any) -> None:
        super().__init__()
        self.screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        self.screen.print(record.getMessage(), style=style, markup=False, highlight=False, soft_wrap=True)


class _LogFile(logging.Handler):
    """Appends to train.log, line by line, so that ranks may share it. A full or missing disk is no reason to end."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._prefix = "" if is_rank_zero() else f"[rank {rank()}] "
        self._file: TextIO | None = None

    def open(self) -> None:
        """Open the file for appending."""
        try:
            self._file = self._path.open("a", encoding="utf-8", errors="replace", buffering=1)
        except OSError:  # the logdir is on another machine
            self._file = None

    def emit(self, record: logging.LogRecord) -> None:
        self.write(record.getMessage(), record.levelname)

    def write(self, text: str, level: str) -> None:
        """One line for each of `text`, with time, level and rank, without control characters."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        for line in text.splitlines() or [""]:
            try:
                if self._file is not None:
                    self._file.write(f"{now} {level} {self._prefix}{CONTROL.sub('', line)}\n")
            except (OSError, ValueError):  # a full disk; the terminal has it all the same
                return

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                self._file = None
        super().close()


class _Outlet:
    """Stands for stdout or stderr: where its reader has gone, as `| head` has, it falls silent and the run goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Pass on `text`."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            return self._fall_silent(len(text))

    def flush(self) -> None:
        """Pass on what is buffered."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._fall_silent(0)

    def _fall_silent(self, written: int) -> int:
        discard_output(self._stream)
        logger.warning("Nobody reads the output any more: the run goes on, and train.log has what it says.")
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Tee:
    """Stands for stdout or stderr: what is written goes where it went, above a progress bar, and into train.log."""

    def __init__(self, console: Console, stream: Any, level: str) -> None:
        self._console, self._stream, self._level = console, stream, level
        self._owner = os.getpid()  # a loader's worker has a copy of the bar, and must not draw it
        self._line = ""  # the end of what was written, not yet a whole line

    def write(self, text: str) -> int:
        """Pass on `text`."""
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._console.log.write(line.rpartition("\r")[2], self._level)
        if self._console.screen is None:
            return len(text)  # another rank
        if not (self._console.has_bar and os.getpid() == self._owner):
            self._stream.write(text)
        elif lines:
            self._console.screen.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
        return len(text)

    def end_line(self) -> None:
        """Log what has no line's end."""
        if self._line:
            self._console.log.write(self._line.rpartition("\r")[2], self._level)
            self._line = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _close_handlers() -> None:
    """Close what the logger writes to."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


def _make_screen(out: Any) -> Any:
    from rich.console import Console as Screen

    return Screen(file=out)
