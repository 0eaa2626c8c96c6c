"""Tensors of a checkpoint, each read straight to where it will live.

In: the files of a checkpoint, the names of tensors with their place in a parameter tree, and a layout. Out: arrays, one
at a time, in the order of the files. Of every tensor a process reads what its own devices hold and nothing else, in
pieces of some rows, cast on the way.

Accelerators: a piece goes through one host buffer a device. A device's part that is larger than a piece is put together
on the device; turning happens there too. The next piece is read while one is put in place, so the host holds three
pieces, or what its devices hold of one tensor that is turned, however large a file or the checkpoint is.

CPU devices, whose memory is the host's: a device's part is read, cast and turned into new memory which the device takes
over as it is, so that beside the parameters the host holds blocks only. Such an array does not own its memory: what it
is donated to makes a copy. Knows no model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from operator import itemgetter
from threading import Lock
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from domino_jax.checkpoints.safetensors_io import StoredTensor, TensorFiles, cast, open_tensors, read_part
from domino_jax.shapes import Array
from domino_jax.sharding import Layout

_T = TypeVar("_T")
_Box = tuple[tuple[int, int], tuple[int, int]]
"""First and end row, first and end column of a tensor as the file has it, seen as a matrix."""

_BLOCK_BYTES = 1 << 20
"""Read at once where values are cast or turned: what a core's own cache holds; the system reads ahead of it."""

_PIECE_BYTES = 128 << 20
"""Held by the host of one tensor, all devices together, unless a single row is larger."""

_TURNED_ROWS = 32
"""Turned at once: as many values of two bytes as a cache line of a CPU holds, so that each is written once."""

_ALIGNMENT = 64
"""Bytes. Source: XLA's CPU client takes a host buffer over without a copy where it is aligned to this."""


@dataclass(frozen=True)
class TensorName:
    """One row of a name table.

    Attributes:
        public: name in the file.
        path: keys from the root of the parameter tree.
        shape: shape in the file.
        is_turned: the file holds `[out, in]`, the tree `[in, out]`.
    """

    public: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    is_turned: bool = False

    @property
    def tree_shape(self) -> tuple[int, ...]:
        """Shape in the parameter tree."""
        return self.shape[::-1] if self.is_turned else self.shape


@dataclass(frozen=True)
class _Piece:
    """Rows of one tensor that are read at once.

    Attributes:
        rows: first and end.
        boxes: what of those rows is wanted.
        is_last: of this tensor.
    """

    tensor: StoredTensor
    rows: tuple[int, int]
    boxes: tuple[_Box, ...]
    is_last: bool


def _new_array(shape: tuple[int, ...], float_type: np.dtype) -> np.ndarray:
    """Return new memory, aligned for devices to take it over as it is; numpy asks for huge pages."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * float_type.itemsize
    return _align(np.empty(num_bytes + _ALIGNMENT, np.uint8), shape, float_type)


def _align(raw: np.ndarray, shape: tuple[int, ...], float_type: np.dtype) -> np.ndarray:
    start = -raw.ctypes.data % _ALIGNMENT
    num_bytes = int(np.prod(shape, dtype=np.int64)) * float_type.itemsize
    return raw[start : start + num_bytes].view(float_type).reshape(shape)


class _Buffers:
    """Host buffers that are used again: new memory costs the system about as much as reading does."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lock = Lock()

    def take(self, shape: tuple[int, int], float_type: np.dtype) -> np.ndarray:
        """Return an array of any content, aligned for devices to take it over as it is."""
        num_bytes = shape[0] * shape[1] * float_type.itemsize
        with self._lock:
            fitting = [i for i, raw in enumerate(self._free) if raw.size >= num_bytes + _ALIGNMENT]
            raw = self._free.pop(fitting[0]) if fitting else None
        return _new_array(shape, float_type) if raw is None else _align(raw, shape, float_type)

    def give_back(self, arrays: Iterable[np.ndarray]) -> None:
        """Take arrays of `take` back that no device reads any more; the largest are kept, up to a piece in all."""
        with self._lock:
            free = sorted((*self._free, *(array.base for array in arrays)), key=len)
            while sum(map(len, free)) > _PIECE_BYTES + _ALIGNMENT:
                free.pop(0)
            self._free = free


class _Places:
    """Where the tensors of a table go.

    Attributes:
        rows: rows of the table by public name.
        types: the type each comes in.
        boxes: by public name, what each device of this process holds.
    """

    def __init__(
        self, table: Iterable[TensorName], float_type: np.dtype, layout: Layout | None, types: Mapping[str, np.dtype]
    ) -> None:
        self.rows = {row.public: row for row in table}
        self.types = dict.fromkeys(self.rows, float_type) | dict(types)
        self._shardings: dict[str, NamedSharding] = {}
        if layout:
            shapes = {
                "/".join(row.path): jax.ShapeDtypeStruct(row.tree_shape, self.types[name])
                for name, row in self.rows.items()
            }
            self._shardings = layout.shardings(shapes)
        self.boxes = {name: _find_boxes(row, self.sharding(row)) for name, row in self.rows.items()}

    def sharding(self, row: TensorName) -> NamedSharding | None:
        """Return how the tree has a tensor; without a layout it is whole on the default device."""
        return self._shardings.get("/".join(row.path))


def iterate_placed(
    files: TensorFiles,
    table: Iterable[TensorName],
    float_type: np.dtype,
    layout: Layout | None = None,
    types: Mapping[str, np.dtype] = MappingProxyType({}),
) -> Iterator[tuple[TensorName, jax.Array]]:
    """Yield every tensor of a table, all of which the files hold; without a layout on the default device.

    They come in `float_type`, those that `types` names by their public names in another.

    Raises:
        CheckpointError: a file can no longer be read, or a value does not fit its type.
        ValueError: the layout knows no place for a path.
    """
    platforms = {device.platform for device in layout.mesh.devices.flat} if layout else {jax.default_backend()}
    iterate = _iterate_taken_over if platforms == {"cpu"} else iterate_staged
    return iterate(files, table, float_type, layout, types)


def iterate_staged(
    files: TensorFiles,
    table: Iterable[TensorName],
    float_type: np.dtype,
    layout: Layout | None = None,
    types: Mapping[str, np.dtype] = MappingProxyType({}),
) -> Iterator[tuple[TensorName, jax.Array]]:
    """Yield what `iterate_placed` does for accelerators, on devices of any kind."""
    places, buffers = _Places(table, float_type, layout, types), _Buffers()
    on_devices: dict[Any, jax.Array] = {}
    in_use: list[np.ndarray] = []

    def read(piece: _Piece) -> dict[_Box, np.ndarray]:
        height = piece.rows[1] - piece.rows[0]
        parts = {box: buffers.take((height, _width(box)), places.types[piece.tensor.name]) for box in piece.boxes}
        _read_piece(piece, parts, buffers)
        return parts

    for piece, parts in _one_ahead(read, _plan_pieces(files, places)):
        row = places.rows[piece.tensor.name]
        for device, box in places.boxes[row.public].items():
            if box in parts:
                on_devices[device] = _put(parts[box], piece.rows[0], box, device, on_devices.get(device), row)
        in_use += parts.values()
        array = _join(row, places.sharding(row), on_devices) if piece.is_last else None
        if piece.is_last or not _may_be_used_as_it_is(parts, row):
            buffers.give_back(in_use)
            in_use.clear()
        if array is not None:
            yield row, array


def _iterate_taken_over(
    files: TensorFiles,
    table: Iterable[TensorName],
    float_type: np.dtype,
    layout: Layout | None,
    types: Mapping[str, np.dtype],
) -> Iterator[tuple[TensorName, jax.Array]]:
    places, buffers = _Places(table, float_type, layout, types), _Buffers()
    held: dict[str, dict[_Box, np.ndarray]] = {}

    def plan() -> Iterator[_Piece]:
        for piece in _plan_pieces(files, places):
            name = piece.tensor.name
            if name not in held:
                row, boxes = places.rows[name], set(places.boxes[name].values())
                held[name] = {box: _new_part(row, box, places.types[name]) for box in boxes}
            yield piece

    def read(piece: _Piece) -> None:
        row = places.rows[piece.tensor.name]
        parts = {}
        for box in piece.boxes:
            whole = held[row.public][box]
            matrix = whole.T if row.is_turned else whole.reshape(-1, _width(box))
            parts[box] = matrix[piece.rows[0] - box[0][0] : piece.rows[1] - box[0][0]]
        _read_piece(piece, parts, buffers)

    for piece, _ in _one_ahead(read, plan()):
        if piece.is_last:
            row = places.rows[piece.tensor.name]
            parts = held.pop(row.public)
            by_device = {device: jax.device_put(parts[box], device) for device, box in places.boxes[row.public].items()}
            del parts
            sharding = places.sharding(row)
            if sharding is None:
                yield row, by_device.pop(None)
            else:
                arrays = [by_device.pop(device) for device in list(by_device)]
                yield row, jax.make_array_from_single_device_arrays(row.tree_shape, sharding, arrays)


def _new_part(row: TensorName, box: _Box, float_type: np.dtype) -> np.ndarray:
    """Return memory for what a device holds of a tensor, as the tree has it."""
    (first, end), _ = box
    shape = (end - first, _width(box)) if len(row.shape) > 1 else (end - first,)
    return _new_array(shape[::-1] if row.is_turned else shape, float_type)


def _width(box: _Box) -> int:
    return box[1][1] - box[1][0]


def _as_stored(row: TensorName, sharding: NamedSharding) -> NamedSharding:
    spec = reversed(sharding.spec) if row.is_turned else sharding.spec
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _find_boxes(row: TensorName, sharding: NamedSharding | None) -> dict[Any, _Box]:
    """Return what each device of this process holds; a tensor of one axis is a column."""
    if sharding is None:
        indices = {None: (slice(None),) * len(row.shape)}
    else:
        indices = _as_stored(row, sharding).addressable_devices_indices_map(row.shape)
    boxes = {}
    for device, index in indices.items():
        ranges = [part.indices(size)[:2] for part, size in zip(index, row.shape, strict=True)]
        boxes[device] = (ranges[0], ranges[1] if len(ranges) > 1 else (0, 1))
    return boxes


def _plan_pieces(files: TensorFiles, places: _Places) -> Iterator[_Piece]:
    """Yield the pieces of every tensor, from the first byte of each file to its last: same rows are read together."""
    tensors = [files.stored[name] for name in places.boxes]
    for tensor in sorted(tensors, key=lambda tensor: (str(tensor.file), tensor.offset)):
        plan, itemsize = [], places.types[tensor.name].itemsize
        for (first, end), of_rows in groupby(sorted(set(places.boxes[tensor.name].values())), key=itemgetter(0)):
            wanted = tuple(of_rows)
            step = max(1, _PIECE_BYTES // max(1, itemsize * sum(map(_width, wanted))))
            plan += [((start, min(start + step, end)), wanted) for start in range(first, end, step)]
        for i, (rows, wanted) in enumerate(plan):
            yield _Piece(tensor, rows, wanted, is_last=i == len(plan) - 1)


def _read_piece(piece: _Piece, parts: dict[_Box, np.ndarray], buffers: _Buffers) -> None:
    """Read into matrices of the piece's rows by each box's columns; of a turned one the transpose is contiguous."""
    tensor, (first, end) = piece.tensor, piece.rows
    left, right = min(box[1][0] for box in parts), max(box[1][1] for box in parts)
    with open_tensors(tensor.file) as descriptor:
        if len(parts) == 1:
            (part,) = parts.values()
            if part.flags.c_contiguous and part.dtype == tensor.dtype:
                read_part(descriptor, tensor, piece.rows, (left, right), part)
                return
        step = max(1, _BLOCK_BYTES // max(1, (right - left) * tensor.dtype.itemsize))
        block = buffers.take((min(step, end - first), right - left), tensor.dtype)
        for start in range(first, end, step):
            stop = min(start + step, end)
            read = block[: stop - start]
            read_part(descriptor, tensor, (start, stop), (left, right), read)
            for (_, (column, column_end)), part in parts.items():
                _copy(read[:, column - left : column_end - left], tensor.name, part[start - first : stop - first])
        buffers.give_back([block])


def _copy(block: np.ndarray, name: str, part: np.ndarray) -> None:
    if part.flags.c_contiguous:
        cast(block, name, part)
        return
    for start in range(0, len(block), _TURNED_ROWS):
        strip = block[start : start + _TURNED_ROWS]
        if strip.dtype != part.dtype:  # numpy is slow at both in one step
            turnable = np.empty(strip.shape, part.dtype)
            cast(strip, name, turnable)
            strip = turnable
        np.copyto(part[start : start + _TURNED_ROWS], strip)


def _put(part: np.ndarray, first: int, box: _Box, device: Any, held: jax.Array | None, row: TensorName) -> jax.Array:
    """Return a device's part of a tensor with rows from `first` in it; waits for the device: the host's can go then."""
    if _may_be_used_as_it_is({box: part}, row):
        return jax.device_put(part, device).block_until_ready()
    if len(row.shape) == 1:
        part = part[:, 0]
    if len(part) == box[0][1] - box[0][0]:
        return jnp.array(part, copy=True, device=device).block_until_ready()
    if held is None:
        held = jnp.zeros((box[0][1] - box[0][0], *part.shape[1:]), part.dtype, device=device)
    return _write_rows(held, jax.device_put(part, device), first - box[0][0]).block_until_ready()


def _may_be_used_as_it_is(parts: dict[_Box, np.ndarray], row: TensorName) -> bool:
    """Return whether devices may use the host's buffers until the tensor is joined: it is turned then."""
    return row.is_turned and all(len(part) == end - first for ((first, end), _), part in parts.items())


@partial(jax.jit, donate_argnums=0)
def _write_rows(held: Array, part: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(held, part, start, axis=0)


def _join(row: TensorName, sharding: NamedSharding | None, on_devices: dict[Any, jax.Array]) -> jax.Array:
    """Return a tensor from what its devices hold, turned where the tree has it so."""
    if sharding is None:
        array = on_devices.pop(None)
        return (array.T if row.is_turned else array).block_until_ready()
    parts = [on_devices.pop(device) for device in list(on_devices)]
    array = jax.make_array_from_single_device_arrays(row.shape, _as_stored(row, sharding), parts)
    del parts
    return (_turning(sharding)(array) if row.is_turned else array).block_until_ready()


@cache
def _turning(sharding: NamedSharding) -> Any:
    """Return the program that turns a matrix where it lies: no device sends anything."""
    return jax.jit(lambda matrix: matrix.T, out_shardings=sharding)


def _one_ahead(read: Callable[[_Piece], _T], pieces: Iterator[_Piece]) -> Iterator[tuple[_Piece, _T]]:
    """Yield pieces with what `read` gives of each; while one is used, the next is read in a thread."""
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        upcoming: tuple[_Piece, Future[_T]] | None = None
        for piece in pieces:
            current, upcoming = upcoming, (piece, pool.submit(read, piece))
            if current:
                yield current[0], current[1].result()
        if upcoming:
            yield upcoming[0], upcoming[1].result()
