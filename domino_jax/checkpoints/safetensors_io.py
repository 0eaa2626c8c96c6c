"""Safetensors files: reading parts of their tensors, and writing them whole or in shards.

In: a directory with `model.safetensors`, an index with shards, or plain `*.safetensors` files.
Out: numpy arrays, a part of a tensor at a time. Nothing is unpickled, ever; nothing outside the directory is opened.
Files appear under their name only when complete. This module knows no tensor names and no model.

Source: the safetensors format (8 bytes of header length, JSON header, raw little-endian data) and
Hugging Face's `model.safetensors.index.json`.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from domino_jax.durable import write_atomically

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
"""Largest file written. Source: the size Hugging Face tools shard at."""

FLOAT_TYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""Types that weights may have, in files and in memory."""
_FILE_CODES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file or tensor, what is allowed and what to do."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what it looks like.

    Attributes:
        type_code: the type as the file writes it, such as `BF16`.
        offset: bytes of the file before its first value.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    type_code: str
    offset: int

    @property
    def dtype(self) -> np.dtype:
        """Its numpy type; of a tensor in a type of `FLOAT_TYPES`."""
        return FLOAT_TYPES[_FILE_CODES[self.type_code]]


def parse_float_type(name: str) -> np.dtype:
    """Return the numpy type of `name`.

    Raises:
        CheckpointError: `name` is not one of `FLOAT_TYPES`.
    """
    if name not in FLOAT_TYPES:
        raise CheckpointError(f"dtype is {name!r}; allowed: {', '.join(FLOAT_TYPES)}")
    return FLOAT_TYPES[name]


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises:
        CheckpointError: the file is missing, is not JSON or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; it must hold a JSON object")
    return value


class TensorFiles:
    """Where the tensors of one checkpoint directory lie.

    Attributes:
        stored: every tensor by name.

    Raises:
        CheckpointError: there is no safetensors file (pickled weights are named and refused), the index is not usable
            or points outside the directory, a file is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stored: dict[str, StoredTensor] = {}
        if not (directory / SINGLE_FILE).exists() and (directory / INDEX_FILE).exists():
            self._read_index(directory / INDEX_FILE)
        else:
            for file in self._plain_files():
                self._add_file(file)

    def _plain_files(self) -> list[Path]:
        if (self.directory / SINGLE_FILE).exists():
            return [self.directory / SINGLE_FILE]
        files = sorted(self.directory.glob("*.safetensors"))
        if files:
            return files
        pickled = sorted({f.name for pattern in _PICKLED for f in self.directory.glob(pattern)})
        if pickled:
            raise CheckpointError(
                f"{self.directory} holds pickled weights only ({', '.join(pickled)}); loading them can run any code. "
                "Convert them to safetensors (transformers: model.save_pretrained(DIR)) and load that directory"
            )
        raise CheckpointError(f"{self.directory} holds no *.safetensors file; give a directory with {SINGLE_FILE}")

    def _read_index(self, index: Path) -> None:
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map; it must map tensor names to file names")
        for name, file_name in weight_map.items():
            if not isinstance(file_name, str) or file_name in ("", ".", "..") or {"/", "\\", "\0"} & set(file_name):
                raise CheckpointError(
                    f"{index} sends {name!r} to {file_name!r}; only plain file names in the same directory are followed"
                )
        file_names = sorted(set(weight_map.values()))
        absent = [n for n in file_names if not (self.directory / n).is_file()]
        if absent:
            raise CheckpointError(
                f"{index} names {', '.join(absent)}, which is not in its directory; download it again"
            )
        for file_name in file_names:
            self._add_file(self.directory / file_name)
        lacking = [f"{n} ({f})" for n, f in weight_map.items() if n not in self.stored or self.stored[n].file.name != f]
        if lacking:
            raise CheckpointError(f"{index} does not agree with its files, which lack: {', '.join(lacking)}")

    def _add_file(self, file: Path) -> None:
        try:
            with safe_open(file, framework="numpy"):  # checks the header and the file's length
                header, data_start = _read_header(file)
        except (OSError, SafetensorError) as error:
            message = f"{file} is not a whole safetensors file ({error}); download or write it again"
            raise CheckpointError(message) from error
        for name, entry in header.items():
            if name in self.stored:
                raise CheckpointError(f"{name} is in {self.stored[name].file.name} and in {file.name}")
            offset = data_start + entry["data_offsets"][0]
            self.stored[name] = StoredTensor(name, file, tuple(entry["shape"]), entry["dtype"], offset)

    def unsupported_types(self, names: list[str]) -> dict[str, str]:
        """Return the file's type code of every tensor among `names` that is no float32, float16 or bfloat16."""
        return {n: self.stored[n].type_code for n in names if self.stored[n].type_code not in _FILE_CODES}

    def common_type(self) -> str:
        """Return the one type name all tensors are stored in.

        Raises:
            CheckpointError: they are stored in several types, or in one that is not supported.
        """
        codes = sorted({t.type_code for t in self.stored.values()})
        if len(codes) != 1 or codes[0] not in _FILE_CODES:
            raise CheckpointError(
                f"{self.directory} stores its tensors as {', '.join(codes)}; choose one of {', '.join(FLOAT_TYPES)}"
            )
        return _FILE_CODES[codes[0]]


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Return a checked file's entries by tensor name, and where its data begin."""
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


@contextmanager
def open_tensors(file: Path) -> Iterator[int]:
    """Open a file for `read_part`.

    Raises:
        CheckpointError: it can no longer be opened.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"cannot open {file}: {error}; download or write it again") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_part(
    descriptor: int, tensor: StoredTensor, rows: tuple[int, int], columns: tuple[int, int], out: np.ndarray
) -> None:
    """Read rows and columns (first, end) of a tensor, seen as a matrix of its first axis by the others, into `out`.

    `out` is contiguous and of the file's type. No other bytes are asked for; whole rows are read at once.

    Raises:
        CheckpointError: the file can no longer be read, or has become shorter.
    """
    row_bytes = int(np.prod(tensor.shape[1:], dtype=np.int64)) * tensor.dtype.itemsize
    start, end = (column * tensor.dtype.itemsize for column in columns)
    if not out.size:
        return
    raw = out.view(np.uint8)
    first = tensor.offset + rows[0] * row_bytes
    try:
        if end - start == row_bytes:
            _fill(descriptor, raw.reshape(-1), first)
        else:
            for i, row in enumerate(raw):
                _fill(descriptor, row, first + i * row_bytes + start)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {tensor.name} from {tensor.file}: {error}; download or write it again"
        ) from error


def _fill(descriptor: int, buffer: np.ndarray, offset: int) -> None:
    done = 0
    while done < buffer.size:
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError("the file has become shorter")
        done += count


def cast(array: np.ndarray, name: str, out: np.ndarray) -> None:
    """Copy values into an array of a float type, on the host, where subnormal numbers survive.

    Raises:
        CheckpointError: one is too large for float16.
    """
    with np.errstate(over="ignore"):
        np.copyto(out, array, casting="unsafe")
    if out.dtype == np.float16 and array.dtype != out.dtype and not np.isfinite(out).all():
        raise CheckpointError(f"{name} has values that float16 cannot hold; use bfloat16 or float32")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as indented JSON."""
    with write_atomically(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_tensors(
    directory: Path,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtype: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write tensors of one type into `directory`, in shards with an index when they exceed `max_shard_bytes`.

    `read` is asked for one tensor at a time, in the order of names. Weight files of an earlier save that are not part
    of this one are removed.

    Raises:
        CheckpointError: `dtype` is not supported, or `read` returns another shape or type than announced.
    """
    width = parse_float_type(dtype).itemsize
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name in sorted(shapes):
        num_bytes = int(np.prod(shapes[name], dtype=np.int64)) * width
        if shards[-1] and shard_bytes + num_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += num_bytes
    file_names = [SINGLE_FILE]
    if len(shards) > 1:
        file_names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file_name, names in zip(file_names, shards, strict=True):
        _write_file(directory / file_name, {n: shapes[n] for n in names}, read, dtype)
    if len(shards) > 1:
        weight_map = {n: f for f, names in zip(file_names, shards, strict=True) for n in names}
        total = sum(int(np.prod(s, dtype=np.int64)) for s in shapes.values()) * width
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        (directory / SINGLE_FILE).unlink(missing_ok=True)
    else:
        (directory / INDEX_FILE).unlink(missing_ok=True)
    for stale in directory.glob("model-*-of-*.safetensors"):
        if stale.name not in file_names:
            stale.unlink()


def _write_file(path: Path, shapes: dict[str, tuple[int, ...]], read: Callable[[str], np.ndarray], dtype: str) -> None:
    float_type = parse_float_type(dtype)
    code = next(c for c, name in _FILE_CODES.items() if name == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + int(np.prod(shape, dtype=np.int64)) * float_type.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with write_atomically(path) as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, shape in shapes.items():
            array = np.ascontiguousarray(read(name))
            if array.shape != shape or array.dtype != float_type:
                raise CheckpointError(
                    f"{name} is {array.dtype}{list(array.shape)} while {path.name} announces {dtype}{list(shape)}"
                )
            file.write(array.view(np.uint8).data if array.size else b"")
            del array  # before the next one is read
