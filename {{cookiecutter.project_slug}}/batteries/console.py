"""What a run says: lines and a progress bar on a terminal, plain lines elsewhere, and all lines in train.log."""

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batteries.data import Batch
from batteries.distributed import is_main
from batteries.timing import Stopwatch

logger = logging.getLogger("batteries")

SECONDS_BETWEEN_LINES = 30  # where there is no terminal, such as in a pipe or a batch job
SECONDS_BETWEEN_DRAWINGS = 0.25  # of the bar: each takes some milliseconds


class Console:
    """The voice of rank 0; the other ranks are silent."""

    def __init__(self, log_file: Path) -> None:
        logger.setLevel(logging.INFO)
        logger.propagate = False
        self.close()
        self.screen: Any = None
        if not is_main():
            logger.addHandler(logging.NullHandler())
            return
        self.screen = _screen()
        logger.addHandler(_ScreenHandler(self.screen))
        self.log = logging.FileHandler(log_file, encoding="utf-8")
        self.log.handleError = lambda record: None  # a full disk; the screen has it all the same
        self.log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(self.log)

    def close(self) -> None:
        """Let go of the log file."""
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()

    def note(self, text: str) -> None:
        """A line for train.log alone."""
        self.log.emit(logging.makeLogRecord({"msg": text, "levelname": "INFO"}))

    def track(self, watch: Stopwatch, label: str, log_every: int) -> Iterator[Batch]:
        """Give batches on and show how far they are; metrics are read, and waited for, every `log_every` steps."""
        if self.screen is None:
            yield from watch
        elif self.screen.is_terminal:
            yield from self._with_bar(watch, label, log_every)
        else:
            yield from self._with_lines(watch, label)

    def _with_bar(self, watch: Stopwatch, label: str, log_every: int) -> Iterator[Batch]:
        from rich import progress

        columns = [
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=max(4, self.screen.width - 72)),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[status]}"),
            progress.TimeRemainingColumn(compact=True),
        ]
        # The bar is drawn when it is told so: a thread that redraws would compete with the step.
        bar = progress.Progress(*columns, console=self.screen, transient=True, auto_refresh=False)
        with bar:
            total, step, drawn = len(watch.batches), watch.batches.first_step, time.monotonic()
            task = bar.add_task(label, total=total, status="")
            for batch in watch:
                yield batch
                step += batch.ends_step
                if batch.ends_step and (step % log_every == 0 or step == total):
                    bar.update(task, status=watch.status())
                if (now := time.monotonic()) - drawn > SECONDS_BETWEEN_DRAWINGS:
                    drawn = now
                    bar.update(task, completed=step, refresh=True)

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


def _screen() -> Any:
    from rich.console import Console as Screen

    return Screen(file=sys.stdout)
