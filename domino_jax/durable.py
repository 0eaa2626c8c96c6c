"""What a run asks of a disk: files that a power cut cannot halve, one writer at a time, and how much room there is.

A file or folder is written beside its place, flushed to the disk, then renamed; a rename is on the disk only when the
folder that holds the name has been flushed too. Knows no file formats.
"""

import errno
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, a quota or a limit on file sizes that is used up."""


@contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears as `path`, for good, only when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def move(source: Path, destination: Path) -> None:
    """Rename a flushed file or folder, and flush the name; a file that is there already is replaced."""
    os.replace(source, destination)
    flush(destination.parent)
    if source.parent != destination.parent:
        flush(source.parent)


def flush(path: Path) -> None:
    """Have a file's content, or the names a folder holds, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (error.errno == errno.EINVAL and path.is_dir()):  # some file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def flush_tree(path: Path) -> None:
    """Flush a file, or a folder with everything below it."""
    if path.is_dir():
        for child in path.iterdir():
            flush_tree(child)
    flush(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with everything below it; do nothing where there is neither."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def hold_lock(path: Path, on_busy: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a file, made if missing; it ends with the block or the process, however that ends.

    Where another process has it `on_busy` is called with that process' name: it raises, or returns to wait for the
    lock. On Windows, which has no `flock`, nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            on_busy(file.read() or "another process")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        os.fsync(file.fileno())  # other hosts read it, and network file systems keep back what is only written
        yield


def find_room(path: Path) -> tuple[Path, int]:
    """Return the folder that is there of `path` and its parents, and the free bytes of its disk."""
    path = path.absolute()
    there = next(folder for folder in (path, *path.parents) if folder.is_dir())
    return there, shutil.disk_usage(there).free


def format_bytes(size: int) -> str:
    """Return a size in binary units, three digits."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1000 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.3g} {unit}"
