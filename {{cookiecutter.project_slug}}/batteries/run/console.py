"""Console output of rank 0 and train.log, which has stdout, stderr and the log lines of all ranks."""

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

SECONDS_BETWEEN_LINES = 30  # of progress in a pipe or a batch job
SECONDS_BETWEEN_DRAWINGS = 0.5  # of the progress bar: drawing it takes some milliseconds
# ANSI escape sequences, and all other control characters.
CONTROL_CHARACTERS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07|[\x00-\x08\x0b-\x1f\x7f]")
# The columns that a line of progress needs besides the bar.
STATUS_WIDTH = 80
MIN_BAR_WIDTH = 4


class Console:
    """Console output of rank 0, and train.log with stdout, stderr and the log lines of all ranks.

    While it is open it replaces sys.stdout and sys.stderr. Ranks other than 0 write to train.log only, each line with
    its rank.

    Attributes:
        quiet: Whether only warnings are shown.
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
        self.log = _LogFileHandler(log_file)
        self.log.setLevel(logging.INFO if is_rank_zero() else logging.WARNING)
        self._replaced: tuple[Any, Any] | None = None  # stdout and stderr
        self._captured: tuple[_CapturedStream, _CapturedStream] | None = None

    def open(self) -> None:
        """Open the log file and capture stdout and stderr."""
        logger.setLevel(logging.INFO)
        logger.propagate = False
        _close_handlers()
        out = _UnbreakableStream(sys.stdout, "stdout")
        err = _UnbreakableStream(sys.stderr, "stderr")
        self.log.open()
        logger.addHandler(self.log)
        if is_rank_zero():
            self.screen = _make_screen(out)
            handler = _ScreenHandler(self.screen)
            handler.setLevel(logging.WARNING if self.quiet else logging.INFO)
            logger.addHandler(handler)
        self._replaced = (sys.stdout, sys.stderr)
        self._captured = (_CapturedStream(self, out, "OUT"), _CapturedStream(self, err, "ERR"))
        sys.stdout, sys.stderr = self._captured  # type: ignore[assignment]

    def close(self) -> None:
        """Restore stdout and stderr, and close the log file."""
        if self._captured is not None and self._replaced is not None:
            for stream in self._captured:
                stream.end_line()
            if (sys.stdout, sys.stderr) == self._captured:
                sys.stdout, sys.stderr = self._replaced
        _close_handlers()

    def note(self, text: str, level: int = logging.INFO) -> None:
        """Write lines to train.log only."""
        self.log.write(text, logging.getLevelName(level))

    def track(self, watch: Stopwatch, label: str, log_every: int) -> Iterator[Batch]:
        """Iterate over the batches of `watch` and show the progress: a bar on a terminal, lines in a pipe.

        Args:
            watch: The batches, their metrics and their timing.
            label: The stage and epoch.
            log_every: The steps between two reads of the metrics, each of which waits for the device.
        """
        if self.screen is None or self.quiet:
            yield from watch
        elif self.screen.is_terminal:
            yield from self._track_with_bar(watch, label, log_every)
        else:
            yield from self._track_with_lines(watch, label)

    def _track_with_bar(self, watch: Stopwatch, label: str, log_every: int) -> Iterator[Batch]:
        steps = len(watch.batches)
        step = watch.batches.first_step
        drawn_at = time.monotonic()
        with self._make_bar(label) as bar:
            self.has_bar = True
            task = bar.add_task(label, total=steps, status="")
            try:
                for batch in watch:
                    yield batch
                    step += batch.ends_step
                    if batch.ends_step and (step % log_every == 0 or step == steps):
                        bar.update(task, status=watch.status())
                    now = time.monotonic()
                    if now - drawn_at > SECONDS_BETWEEN_DRAWINGS:
                        drawn_at = now
                        bar.update(task, completed=step, refresh=True)
            finally:
                self.has_bar = False

    def _track_with_lines(self, watch: Stopwatch, label: str) -> Iterator[Batch]:
        step = watch.batches.first_step
        logged_at = time.monotonic()
        for batch in watch:
            yield batch
            step += batch.ends_step
            if batch.ends_step and time.monotonic() - logged_at > SECONDS_BETWEEN_LINES:
                logged_at = time.monotonic()
                logger.info(f"{label}  {step}/{len(watch.batches)}  {watch.status()}")

    def _make_bar(self, label: str) -> Any:
        """Return rich's progress bar. It is drawn on request: a thread that redraws would compete with the step."""
        from rich import progress

        width = self.screen.width - STATUS_WIDTH
        bar = [progress.BarColumn(bar_width=width)] if width >= MIN_BAR_WIDTH else []
        return progress.Progress(
            progress.TextColumn(label),
            *bar,
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[status]}"),
            progress.TimeRemainingColumn(compact=True),
            console=self.screen,
            transient=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )


class _ScreenHandler(logging.Handler):
    """Shows log lines above the progress bar, without wrapping or highlighting them."""

    def __init__(self, screen: Any) -> None:
        super().__init__()
        self.screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        self.screen.print(record.getMessage(), style=style, markup=False, highlight=False, soft_wrap=True)


class _LogFileHandler(logging.Handler):
    """Appends to train.log line by line, so that several ranks can share it.

    A disk that is full or not mounted does not end the run: the lines are dropped.
    """

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
        """Append each line of `text` with time, level and rank, without control characters."""
        if self._file is None:
            return
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        for line in text.splitlines() or [""]:
            try:
                self._file.write(f"{now} {level} {self._prefix}{CONTROL_CHARACTERS.sub('', line)}\n")
            except (OSError, ValueError):  # a full disk, or a closed file; the terminal still shows the line
                return

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                self._file = None
        super().close()


class _UnbreakableStream:
    """Wraps stdout or stderr. If its reader is gone, as after `| head`, output is discarded and the run continues."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream = stream
        self._name = name

    def write(self, text: str) -> int:
        """Write `text` to the stream."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._discard()

    def _discard(self) -> None:
        """Discard all output from now on."""
        discard_output(self._stream)
        logger.warning(f"{self._name} is closed (broken pipe). Training continues; see train.log.")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _CapturedStream:
    """Replaces stdout or stderr: copies lines to train.log, and shows them above the progress bar if there is one."""

    def __init__(self, console: Console, stream: Any, level: str) -> None:
        """Wrap a stream.

        Args:
            console: The console.
            stream: The stream that shows the output.
            level: The level in train.log: OUT or ERR.
        """
        self._console = console
        self._stream = stream
        self._level = level
        self._owner = os.getpid()  # a loader process has a copy of the bar, and must not draw it
        self._incomplete = ""  # the last line, if it has no end yet

    def write(self, text: str) -> int:
        """Write `text` to the log and the stream; ranks other than 0 to the log only."""
        *lines, self._incomplete = (self._incomplete + text).split("\n")
        for line in lines:
            self._log(line)
        if self._console.screen is None:
            return len(text)
        if not (self._console.has_bar and os.getpid() == self._owner):
            self._stream.write(text)
        elif lines:
            self._console.screen.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
        return len(text)

    def end_line(self) -> None:
        """Log the last line if it has no end."""
        if self._incomplete:
            self._log(self._incomplete)
            self._incomplete = ""

    def _log(self, line: str) -> None:
        """Log a line as it was last drawn: what follows its last carriage return."""
        self._console.log.write(line.rpartition("\r")[2], self._level)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _close_handlers() -> None:
    """Remove and close all handlers of the logger."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


def _make_screen(out: Any) -> Any:
    from rich.console import Console as Screen

    return Screen(file=out)
