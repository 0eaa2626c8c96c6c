"""The list of a folder's files with their sizes and hashes: how damage is noticed before anything is read.

In: a folder that is written and will not change. Out: one sentence for every file that is no longer what it was.
The list ends with its own hash, so that a damaged list is told from a damaged file. Knows no file formats.

Source: SHA-256, FIPS 180-4.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from domino_jax.checkpoints.safetensors_io import CheckpointError
from domino_jax.durable import write_atomically

MANIFEST_FILE = "MANIFEST"
_READERS = 4


def write_manifest(folder: Path, name: str) -> None:
    """List every file below `folder` in it; `name` is what the folder is called when it is in its place."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(_READERS) as readers:  # hashing leaves the interpreter free
        entries = readers.map(lambda path: {"bytes": path.stat().st_size, "sha256": _hash(path)}, paths)
        files = {path.relative_to(folder).as_posix(): entry for path, entry in zip(paths, entries, strict=True)}
    body = json.dumps({"name": name, "files": files}, indent=1).encode()
    with write_atomically(folder / MANIFEST_FILE) as file:
        file.write(body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n")


def find_damage(folder: Path, below: str = "") -> list[str]:
    """Return what is wrong with the files of a folder, or of its part `below`; nothing for one that is as written.

    Raises:
        CheckpointError: the system refuses to read a file: that may pass, and says nothing of the file.
    """
    try:
        manifest = _read_manifest(folder)
    except OSError as error:
        return [f"{MANIFEST_FILE} {_name_damage(folder / MANIFEST_FILE, error)}"]
    if manifest is None:
        return [f"{MANIFEST_FILE} has changed"]
    if manifest["name"] != folder.name:
        return [f"{MANIFEST_FILE} is that of {manifest['name']}"]
    entries = {name: entry for name, entry in manifest["files"].items() if name.startswith(below)}
    with ThreadPoolExecutor(_READERS) as readers:
        found = readers.map(lambda item: _compare(folder / item[0], item[1]), entries.items())
    return [f"{name} {problem}" for name, problem in zip(entries, found, strict=True) if problem]


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the list, or None where it does not have the hash it ends with."""
    content = (folder / MANIFEST_FILE).read_bytes()
    body, _, _ = content.removesuffix(b"\n").rpartition(b"\n")
    return json.loads(body) if content == body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n" else None


def _compare(path: Path, entry: dict[str, Any]) -> str:
    """Return what is wrong with one file, or nothing."""
    try:
        missing = entry["bytes"] - path.stat().st_size
        if missing:
            return f"is {abs(missing)} bytes {'shorter' if missing > 0 else 'longer'} than it was"
        return "" if _hash(path) == entry["sha256"] else "has changed, at the same length"
    except OSError as error:
        return _name_damage(path, error)


def _name_damage(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "is missing"
    if isinstance(error, IsADirectoryError):
        return "is a folder"
    raise CheckpointError(
        f"{path} cannot be read now ({error.strerror}); nothing was changed: see to the disk or the permissions, then "
        "the same command goes on"
    ) from error


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
