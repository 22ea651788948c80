"""Atomic file writes, appends, hard links and a directory lock."""

import errno
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from batteries.core.errors import UserError

logger = logging.getLogger("batteries")

# What a file system (network mounts, FUSE) answers to an operation that it does not have.
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_reported_missing: set[str] = set()  # operations


class DiskFullError(UserError):
    """The disk has no space for a file.

    Attributes:
        path: The file.
        size: The bytes it needs, approximately.
    """

    def __init__(self, path: Path, size: int) -> None:
        from rich.filesize import decimal

        self.path = path
        self.size = size
        free = shutil.disk_usage(path.parent).free
        super().__init__(
            f"{path} cannot be written: it needs {decimal(size)}, and the disk has {decimal(free)} free; make space."
        )

    def __reduce__(self) -> tuple[type, tuple[Path, int]]:
        """Support pickling, because the error is sent to the other ranks."""
        return DiskFullError, (self.path, self.size)


def is_disk_full(error: BaseException) -> bool:
    """Return whether `error` means that the disk is full or the user's quota is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file in one step: readers see the old file or the complete new one.

    Temporary file in the same directory, flush, fsync, rename, fsync of the directory. Without the first fsync a crash
    can leave an empty file under the final name; without the second one, the old file (https://lwn.net/Articles/457667).

    Args:
        path: The file.
        write: Writes the contents to the open file that it gets.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            flush_to_disk(file.fileno(), path)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_output(path: Path, write: Callable[[BinaryIO], object], flag: str) -> None:
    """Write a file in one step, and create its directory.

    Args:
        path: The file.
        write: Writes the contents to the open file that it gets.
        flag: The option that names the file, for the error.

    Raises:
        UserError: If the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, write)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); use another {flag}.") from None


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or use another directory.") from None


def append_text(path: Path, text: str) -> None:
    """Append `text` to a file and flush it to the disk; if that fails, the file is left unchanged."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        rest = memoryview(text.encode())
        try:
            while rest:  # a nearly full disk accepts a part, and raises at the next write
                rest = rest[file.write(rest) :]
            flush_to_disk(file.fileno(), path)
        except OSError:
            os.truncate(path, size)
            raise


def link_atomically(source: Path, link: Path) -> None:
    """Make `link` a hard link to `source` in one step; a copy if the file system does not support hard links."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        write_atomically(link, lambda file: _copy(source, file))
        return
    os.replace(temporary, link)
    temporary.unlink(missing_ok=True)  # on POSIX, replacing a link to the same file does nothing and leaves `temporary`
    sync_directory(link.parent)


def describe_missing_run(directory: Path) -> str:
    """Describe a directory that is not that of a run, with the closest one that is."""
    fix = "give a run directory, such as logs/baseline"
    if runs := sorted(path.parent for path in directory.glob("*/config.json")):
        fix = f"give one of its runs, such as {runs[0]}"
    elif (directory.parent / "config.json").is_file():
        fix = f"give the run, {directory.parent}"
    return f"{directory} does not hold a run (config.json is missing); {fix}."


class DirectoryLock:
    """Keeps a second process out of a directory. The system releases the lock when its process ends, for any reason.

    It is a record lock, which DataLoader workers do not inherit: they outlive a killed parent by some seconds. Windows
    and some file systems have no record locks, so two processes can use the same directory there.

    Attributes:
        path: The lock file.
        file: The open lock file while this process holds the lock, else None.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: TextIO | None = None

    def acquire(self) -> None:
        """Acquire the lock if this process does not hold it yet. Raises UserError if another process holds it."""
        if self.file is not None or os.name == "nt":
            return
        import fcntl

        try:
            file = self.path.open("a+")
        except OSError as error:
            raise UserError(f"--logdir {self.path.parent} cannot be written ({error.strerror}).") from None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if is_locked_by_another(error):
                file.seek(0)
                owner = file.read().strip() or "another process"
                file.close()
                raise UserError(
                    f"--logdir {self.path.parent} is in use by {owner}; wait for it, or use another."
                ) from None
            warn_of_missing_lock(self.path.parent, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self.file = file

    def release(self) -> None:
        """Release the lock; the file stays."""
        if self.file is not None:
            self.file.close()
            self.file = None


def is_locked_by_another(error: OSError) -> bool:
    """Return whether another process has the lock; any other error means that the file system has no locks."""
    return error.errno in (errno.EACCES, errno.EAGAIN)


def warn_of_missing_lock(directory: Path, error: OSError) -> None:
    """Warn once that nothing keeps a second process out of `directory`."""
    _warn_once(
        "locks",
        f"The file system of {directory} has no locks ({error.strerror}): use it from one process at a time.",
    )


def flush_to_disk(descriptor: int, path: Path) -> None:
    """Flush a file or directory to the disk. Warns once if the file system of `path` cannot do that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn_once(
            "fsync",
            f"The file system of {path} has no fsync ({error.strerror}): the last files can be lost if the machine "
            "crashes.",
        )


def sync_directory(directory: Path) -> None:
    """Flush the names in `directory` to the disk. Windows cannot, and does not need it after os.replace."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        flush_to_disk(descriptor, directory)
    finally:
        os.close(descriptor)


def _warn_once(missing: str, message: str) -> None:
    """Log `message` as a warning if no message about `missing` was logged yet."""
    if missing not in _reported_missing:
        _reported_missing.add(missing)
        logger.warning(message)


def _copy(source: Path, file: BinaryIO) -> None:
    with source.open("rb") as original:
        shutil.copyfileobj(original, file)


@contextmanager
def without_empty_directories(path: Path) -> Iterator[None]:
    """Remove the directories in `path` that an error leaves empty, unless they existed before."""
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    try:
        yield
    except BaseException:
        for directory in missing:
            with suppress(OSError):  # it was not created, or is not empty
                directory.rmdir()
        raise
