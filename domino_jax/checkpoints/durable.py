"""Files and folders that a power cut cannot halve: written beside their place, flushed to the disk, then renamed.

A rename is on the disk only when the folder that holds the name has been flushed too. Knows no file formats.
"""

import errno
import os
import uuid
from collections.abc import Iterator
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
    finally:
        os.close(descriptor)


def flush_tree(path: Path) -> None:
    """Flush a file, or a folder with everything below it."""
    if path.is_dir():
        for child in path.iterdir():
            flush_tree(child)
    flush(path)
