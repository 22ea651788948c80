"""Files that are whole or not there, whenever the power goes."""

import errno
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from batteries.core.errors import UserError


class DiskFullError(UserError):
    """There is no room for the file at `path`, which needs about `size` bytes."""

    def __init__(self, path: Path, size: int) -> None:
        from rich.filesize import decimal

        self.path, self.size = path, size
        free = shutil.disk_usage(path.parent).free
        super().__init__(
            f"{path} cannot be written: it needs {decimal(size)} and {decimal(free)} are free there; make room."
        )

    def __reduce__(self) -> tuple[type, tuple[Path, int]]:
        """It is sent to the other ranks."""
        return DiskFullError, (self.path, self.size)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that a disk, or what one may have of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


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
    sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Put `text` into `path` in one step."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_output(path: Path, write: Callable[[BinaryIO], object], flag: str) -> None:
    """Put what `write` writes into `path` in one step, and make its folder.

    Raises BadInput, which asks for another `flag`, where that cannot be.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, write)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); use another {flag}.") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises BadInput where it was damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); put it back, or use another folder.") from None


def append_text(path: Path, text: str) -> None:
    """Add `text` to the end of a file, on disk when this is done; where that fails, the file is as it was."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        rest = memoryview(text.encode())
        try:
            while rest:  # a nearly full disk takes a part, and says so with the next
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, size)
            raise


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
    sync_directory(link.parent)


class DirectoryLock:
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

        try:
            file = self.path.open("a+")
        except OSError as error:
            raise UserError(f"--logdir {self.path.parent} cannot be written ({error.strerror}).") from None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip()
            file.close()
            raise UserError(f"--logdir {self.path.parent} is in use by {owner}; wait for it, or use another.") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self.file = file

    def release(self) -> None:
        """Let go of it; the file stays."""
        if self.file is not None:
            self.file.close()
            self.file = None


def sync_directory(folder: Path) -> None:
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
