"""Files that are whole or not there, whenever the power goes."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TextIO

from batteries.errors import BadInput


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Put what `write` writes into `path` in one step: readers see the old file or the whole new one.

    Temp file in the same folder, flush, fsync, rename, fsync of the folder: without the first fsync a crash can leave
    an empty file under the final name, without the second the old name (the order that LWN 457667 explains).
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Put `text` into `path` in one step."""
    write_atomically(path, lambda file: file.write(text.encode()))


def link_atomically(source: Path, link: Path) -> None:
    """Make `link` a second name of `source` in one step; a copy where the file system has no hard links."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        write_atomically(link, lambda file: _copy(source, file))
        return
    os.replace(temporary, link)  # a no-op on POSIX where both are the same file already: then `temporary` stays
    temporary.unlink(missing_ok=True)
    sync_folder(link.parent)


class Lock:
    """Keeps a second process out of a folder. The system lets go of it when its owner ends, however that comes.

    A record lock, which a loader's worker does not inherit: it would outlive its killed parent for some seconds.
    Windows has none; there two processes are not kept apart.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: TextIO | None = None

    def acquire(self) -> None:
        """Take the lock, once. Raises BadInput where another process has it."""
        if self.file is not None or os.name == "nt":
            return
        import fcntl

        file = self.path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip()
            file.close()
            raise BadInput(f"--logdir {self.path.parent} is in use by {owner}; wait for it, or use another.") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self.file = file

    def release(self) -> None:
        """Let go of it; the file stays."""
        if self.file is not None:
            self.file.close()
            self.file = None


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a crash. Windows has no such call and needs none for os.replace."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(source: Path, file: BinaryIO) -> None:
    with source.open("rb") as original:
        shutil.copyfileobj(original, file)
