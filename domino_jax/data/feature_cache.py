"""Features of a frozen target on disk: ArrayRecord shards with random access to every row.

In: rows with their features, in the order of the data file. Out: the same rows, one at a time, each checked against
its checksum. A shard appears under its name only when it is whole and on the disk; `index.json` beside the shards says
what they were made from and where each begins. Damage is named, never read over. Knows no model and no tokenizer:
who computes features, and whether two caches are the same, is decided by the caller.

A record is a header (`_HEADER`, little-endian), token ids (int32), features, last hidden states where the cache has
them (float32 or bfloat16), and the loss mask (uint8).

Source: ArrayRecord (github.com/google/array_record) over Riegeli records: blocks of 64 KiB with a header of 24 bytes,
a chunk header of 40 bytes a record.
"""

import json
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from domino_jax.durable import flush, hold_lock, move, write_atomically
from domino_jax.records import ChatRow

INDEX_FILE, LOCK_FILE = "index.json", ".lock"
FORMAT = 1
SHARD_BYTES = 512 * 2**20
"""Size that shards are cut at: the most work that a kill can undo, and what filling holds in memory."""
FEATURE_TYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

_HEADER = struct.Struct("<4sIIIQQIIB7x")
"""Magic, CRC-32 of all that follows, hash of the identity, tokens, row, line, widths of both arrays, bytes a value."""
_MAGIC, _CHECKED_FROM = b"DJF1", 8
_BLOCK_BYTES, _BLOCK_HEADER, _CHUNK_HEADER, _FOOTER_PER_RECORD = 2**16, 24, 40, 16
_OPEN_SHARDS = 64
_WRITER_OPTIONS = "group_size:1,uncompressed"  # floats do not compress; one record a group is what random access needs


class FeatureCacheError(ValueError):
    """A cache that cannot be used or written; the message says why and what to do."""


class DamagedShardError(FeatureCacheError):
    """A shard, or one record of it, that cannot be trusted.

    Attributes:
        shard: number of the shard.
        is_whole_shard: no record of it can be read.
    """

    def __init__(self, path: Path, shard: int, reason: str, is_whole_shard: bool) -> None:
        """Build the message `path is damaged: reason`."""
        super().__init__(f"{path} is damaged: {reason}")
        self.shard, self.is_whole_shard = shard, is_whole_shard


@dataclass(frozen=True)
class FeatureShape:
    """What the arrays of every record look like.

    Attributes:
        feature_width: values a token of the captured layers together.
        hidden_width: values a token of the last hidden state; 0: not kept.
        dtype: one of `FEATURE_TYPES`.
    """

    feature_width: int
    hidden_width: int
    dtype: str

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in a record: arrays, id and loss mask."""
        return (self.feature_width + self.hidden_width) * FEATURE_TYPES[self.dtype].itemsize + 5


def plan_shards(lengths: Sequence[int], shape: FeatureShape, shard_bytes: int | None = None) -> list[int]:
    """Return the first row of every shard; a shard has at most `shard_bytes` (default: `SHARD_BYTES`) or one row."""
    limit, starts, size = shard_bytes or SHARD_BYTES, [0], 0
    for row, length in enumerate(lengths):
        num_bytes = length * shape.bytes_per_token
        if size and size + num_bytes > limit:
            starts.append(row)
            size = 0
        size += num_bytes
    return starts


def read_index(directory: Path) -> dict[str, Any] | None:
    """Return what `index.json` of a cache says, or None where there is none.

    Raises:
        FeatureCacheError: the file cannot be read or is not one of ours.
    """
    path = directory / INDEX_FILE
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        known = index["format"], index["identity"], index["shard_starts"], index["is_complete"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FeatureCacheError(
            f"{path} cannot be read ({type(error).__name__}: {error}); remove it: shards that are whole are kept"
        ) from error
    if known[0] != FORMAT:
        raise FeatureCacheError(f"{path} has format {known[0]!r}, this version reads {FORMAT}; use another directory")
    return index


class FeatureCache:
    """The shards of one directory, written and read by number.

    Attributes:
        directory: where they lie.
        shape: of the arrays of every record.
        shard_starts: first row of every shard.
        is_complete: every shard has been there; one that is missing was lost.
    """

    def __init__(
        self,
        directory: Path,
        lengths: Sequence[int],
        shape: FeatureShape,
        identity: dict[str, Any],
        shard_starts: Sequence[int],
        is_complete: bool = False,
    ) -> None:
        """Describe a cache of rows of `lengths` tokens; nothing is read or written. `identity` is ready for JSON."""
        self.directory, self.shape, self.is_complete = directory, shape, is_complete
        self.shard_starts = list(shard_starts)
        self._lengths, self._identity = lengths, identity
        self._identity_hash = zlib.crc32(json.dumps(identity, sort_keys=True).encode())
        self._readers: OrderedDict[int, Any] = OrderedDict()
        bounds = [*self.shard_starts, len(lengths)]
        if bounds[0] != 0 or any(a >= b for a, b in pairwise(bounds)):
            raise FeatureCacheError(
                f"{directory / INDEX_FILE} has shards that do not cover rows 0 .. {len(lengths) - 1}; remove it"
            )
        self._bounds = np.array(bounds)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.shard_starts)

    def shard_of(self, row: int) -> int:
        """Return the shard that holds a row."""
        return int(np.searchsorted(self._bounds, row, side="right")) - 1

    def rows_of(self, shard: int) -> range:
        """Return the rows of a shard."""
        return range(int(self._bounds[shard]), int(self._bounds[shard + 1]))

    def path(self, shard: int) -> Path:
        """Return the file of a shard."""
        return self.directory / f"features-{shard:05d}-of-{self.num_shards:05d}.arrayrecord"

    def num_tokens(self, shard: int) -> int:
        """Return the tokens of a shard."""
        return sum(self._lengths[row] for row in self.rows_of(shard))

    def expected_bytes(self, shard: int) -> int:
        """Return the size that the file of a shard has when it is whole."""
        num_bytes = _CHUNK_HEADER + _BLOCK_HEADER
        for row in self.rows_of(shard):
            size = _HEADER.size + self._lengths[row] * self.shape.bytes_per_token
            num_bytes += _CHUNK_HEADER + 2 + -(-size.bit_length() // 7) + size + _FOOTER_PER_RECORD
        num_blocks = -(-num_bytes // (_BLOCK_BYTES - _BLOCK_HEADER))
        return (num_blocks + 1) * _BLOCK_BYTES  # one block more holds the postscript

    def write_index(self, made_with: dict[str, Any], is_complete: bool) -> None:
        """Write what the shards are made from; `made_with` says how, no record depends on it."""
        self.is_complete = is_complete
        index = {
            "format": FORMAT,
            "identity": self._identity,
            "made_with": made_with,
            "is_complete": is_complete,
            "shard_starts": self.shard_starts,
        }
        with write_atomically(self.directory / INDEX_FILE) as file:
            file.write(json.dumps(index, indent=2).encode() + b"\n")

    def find_damage(self) -> dict[int, str]:
        """Return a reason for every shard that is missing (`missing`) or cannot be opened.

        Structure, number of records and the first record are checked; records are checked again when they are read.
        """
        damage = {}
        for shard in range(self.num_shards):
            try:
                self.read(self.rows_of(shard).start)
            except DamagedShardError as error:
                damage[shard] = "missing" if not self.path(shard).exists() else str(error)
        return damage

    def verify(self, shard: int) -> None:
        """Read every record of a shard.

        Raises:
            DamagedShardError: one is damaged.
        """
        for row in self.rows_of(shard):
            self.read(row)

    def read(self, row: int) -> ChatRow:
        """Return a row with its features; the arrays are read-only.

        Raises:
            DamagedShardError: the shard is missing or damaged, or the record's checksum does not fit.
            FeatureCacheError: ArrayRecord is not to be had here.
        """
        shard = self.shard_of(row)
        reader = self._open(shard)
        try:
            (record,) = reader.read([row - self.rows_of(shard).start])
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._damaged(shard, f"row {row}: {_one_line(error)}", is_whole_shard=False) from error
        return self._decode(record, shard, row)

    def write_shard(self, shard: int, rows: Iterable[ChatRow]) -> None:
        """Write a shard whole, or leave what was there.

        Raises:
            FeatureCacheError: the file cannot be written, or ArrayRecord is not to be had here.
            ValueError: a row does not have the arrays that this cache holds.
        """
        array_record = _import_array_record()
        path = self.path(shard)
        part = path.with_name(f".{path.name}.part")
        try:
            writer = array_record.ArrayRecordWriter(str(part), _WRITER_OPTIONS)
            try:
                for row, chat in zip(self.rows_of(shard), rows, strict=True):
                    writer.write(self._encode(chat, row))
            finally:
                writer.close()
            self.close(shard)
            flush(part)
            move(part, path)
        except (OSError, RuntimeError) as error:
            raise FeatureCacheError(
                f"{path} cannot be written: {_one_line(error)}; free disk space or give another data.feature_cache, "
                "then start the same command again: whole shards are kept"
            ) from error
        finally:
            part.unlink(missing_ok=True)

    def remove(self, shard: int) -> None:
        """Delete a damaged shard, so that it is missing from now on."""
        self.close(shard)
        self.path(shard).unlink(missing_ok=True)

    def remove_parts(self) -> None:
        """Delete what a killed process left unfinished; only for who holds the lock."""
        for pattern in (".*.part", f".{INDEX_FILE}.*.tmp"):
            for part in self.directory.glob(pattern):
                part.unlink(missing_ok=True)

    def close(self, shard: int | None = None) -> None:
        """Close the file of a shard, or of all of them; it is opened again when a row is read."""
        for number in [shard] if shard is not None else list(self._readers):
            if number in self._readers:
                _close(self._readers.pop(number))

    @contextmanager
    def lock(self, say: Callable[[str], None]) -> Iterator[None]:
        """Hold the right to write; wait while another process has it. It ends with the process, however that ends."""
        waiting = f"{self.directory}: {{}} is filling this feature cache; waiting for it"
        with hold_lock(self.directory / LOCK_FILE, lambda holder: say(waiting.format(holder))):
            yield

    def _open(self, shard: int) -> Any:
        if shard in self._readers:
            self._readers.move_to_end(shard)
            return self._readers[shard]
        array_record = _import_array_record()
        path, num_rows = self.path(shard), len(self.rows_of(shard))
        if not path.is_file():
            raise self._damaged(shard, "it is missing", is_whole_shard=True)
        try:
            reader = array_record.ArrayRecordReader(str(path), options="readahead_buffer_size:0")
            num_stored = reader.num_records()
        except (OSError, RuntimeError, ValueError) as error:
            raise self._damaged(shard, _one_line(error), is_whole_shard=True) from error
        if num_stored != num_rows:
            _close(reader)
            found = f"it holds {num_stored} records, not {num_rows}" if num_stored else "its end is not readable"
            raise self._damaged(shard, found, is_whole_shard=True)
        self._readers[shard] = reader
        if len(self._readers) > _OPEN_SHARDS:
            _close(self._readers.popitem(last=False)[1])
        return reader

    def _encode(self, chat: ChatRow, row: int) -> bytes:
        ids, mask = np.asarray(chat.ids, "<i4"), np.asarray(chat.loss_mask, np.uint8)
        dtype = FEATURE_TYPES[self.shape.dtype]
        parts = [ids.tobytes()]
        for name, width in (("features", self.shape.feature_width), ("last_hidden", self.shape.hidden_width)):
            values = getattr(chat, name)
            expected = (len(ids), width)
            if width and (values is None or values.shape != expected or values.dtype != dtype):
                found = None if values is None else f"{values.dtype} {values.shape}"
                raise ValueError(f"{name} of row {row}: {found}, the cache holds {dtype} {expected}")
            if width:
                parts.append(np.ascontiguousarray(values).tobytes())
        parts.append(mask.tobytes())
        widths = self.shape.feature_width, self.shape.hidden_width, dtype.itemsize
        header = _HEADER.pack(_MAGIC, 0, self._identity_hash, len(ids), row, chat.line_no, *widths)
        crc = zlib.crc32(header[_CHECKED_FROM:])
        for part in parts:
            crc = zlib.crc32(part, crc)
        return b"".join([_MAGIC, crc.to_bytes(4, "little"), header[_CHECKED_FROM:], *parts])

    def _decode(self, record: bytes, shard: int, row: int) -> ChatRow:
        def fail(reason: str) -> DamagedShardError:
            return self._damaged(shard, f"row {row}: {reason}", is_whole_shard=False)

        num_tokens = self._lengths[row]
        if len(record) != _HEADER.size + num_tokens * self.shape.bytes_per_token or record[:4] != _MAGIC:
            raise fail("not a record of this cache")
        _, crc, identity_hash, stored_tokens, stored_row, line_no, *widths = _HEADER.unpack_from(record)
        if zlib.crc32(memoryview(record)[_CHECKED_FROM:]) != crc:
            raise fail("its checksum does not fit")
        dtype = FEATURE_TYPES[self.shape.dtype]
        expected = [self.shape.feature_width, self.shape.hidden_width, dtype.itemsize]
        if (identity_hash, stored_tokens, stored_row, widths) != (self._identity_hash, num_tokens, row, expected):
            raise fail("it was made from something else")
        offset = _HEADER.size
        ids = np.frombuffer(record, "<i4", num_tokens, offset)
        offset += ids.nbytes
        arrays = []
        for width in widths[:2]:
            values = np.frombuffer(record, dtype, num_tokens * width, offset).reshape(num_tokens, width)
            offset += values.nbytes
            arrays.append(values if width else None)
        mask = np.frombuffer(record, np.uint8, num_tokens, offset)
        return ChatRow(ids.tolist(), mask.tolist(), line_no, *arrays)

    def _damaged(self, shard: int, reason: str, is_whole_shard: bool) -> DamagedShardError:
        return DamagedShardError(self.path(shard), shard, reason, is_whole_shard)


def check_array_record() -> None:
    """Refuse a platform without ArrayRecord.

    Raises:
        FeatureCacheError: it cannot be imported.
    """
    _import_array_record()


def _import_array_record() -> Any:
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise FeatureCacheError(
            f"data.feature_cache needs the package array_record ({error}); pip install array_record (Linux and macOS), "
            "or leave data.feature_cache empty"
        ) from error
    return array_record_module


def _close(reader: Any) -> None:
    with suppress(RuntimeError):  # what it complains of was told when it was read
        reader.close()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
