"""Tensors of a checkpoint, each read straight to where it will live.

In: the files of a checkpoint, the names of tensors with their place in a parameter tree, and a layout. Out: arrays, one
at a time, in the order of the files. Of every tensor a process reads what its own devices hold and nothing else, in
pieces of some rows, cast on the way into one host buffer a device. A device's part that is larger than a piece is put
together on the device; turning happens there too. The next piece is read while one is put in place, so the host holds
three pieces, or what its devices hold of one tensor that is turned, however large a file or the checkpoint is. Knows no
model.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from operator import attrgetter
from threading import Lock
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

_BLOCK_BYTES = 8 << 20
"""Read at once: large enough for a disk, small enough for the caches of a CPU."""

_PIECE_BYTES = 128 << 20
"""Held by the host of one tensor, all devices together, unless a single row is larger."""

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
    """Rows of one tensor, cast.

    Attributes:
        first: its first row.
        parts: columns of those rows, by the box they belong to.
        is_last: of this tensor.
    """

    name: str
    first: int
    parts: dict[_Box, np.ndarray]
    is_last: bool


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
        if raw is None:
            raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        return raw[start : start + num_bytes].view(float_type).reshape(shape)

    def give_back(self, arrays: Iterable[np.ndarray]) -> None:
        """Take arrays of `take` back that no device reads any more; the largest are kept, up to a piece in all."""
        with self._lock:
            free = sorted((*self._free, *(array.base for array in arrays)), key=len)
            while sum(map(len, free)) > _PIECE_BYTES + _ALIGNMENT:
                free.pop(0)
            self._free = free


def iterate_placed(
    files: TensorFiles, table: Iterable[TensorName], float_type: np.dtype, layout: Layout | None = None
) -> Iterator[tuple[TensorName, jax.Array]]:
    """Yield every tensor of a table, all of which the files hold; without a layout on the default device.

    Raises:
        CheckpointError: a file can no longer be read, or a value does not fit `float_type`.
        ValueError: the layout knows no place for a path.
    """
    rows = {row.public: row for row in table}
    shardings: dict[str, NamedSharding] = {}
    if layout:
        shapes = {"/".join(row.path): jax.ShapeDtypeStruct(row.tree_shape, float_type) for row in rows.values()}
        shardings = layout.shardings(shapes)
    boxes = {name: _find_boxes(row, shardings.get("/".join(row.path))) for name, row in rows.items()}
    buffers = _Buffers()
    on_devices: dict[Any, jax.Array] = {}
    in_use: list[np.ndarray] = []
    for piece in _one_ahead(_read_pieces(files, boxes, float_type, buffers)):
        row = rows[piece.name]
        for device, box in boxes[piece.name].items():
            if box in piece.parts:
                on_devices[device] = _put(piece, box, device, on_devices.get(device), row)
        in_use += piece.parts.values()
        array = None
        if piece.is_last:
            array = _join(row, shardings.get("/".join(row.path)), on_devices)
        if piece.is_last or not _is_taken_over(piece, row):
            buffers.give_back(in_use)
            in_use.clear()
        if array is not None:
            yield row, array


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


def _read_pieces(
    files: TensorFiles, boxes: dict[str, dict[Any, _Box]], float_type: np.dtype, buffers: _Buffers
) -> Iterator[_Piece]:
    """Yield the pieces of every tensor, from the first byte of each file to its last."""
    stored = sorted((files.stored[name] for name in boxes), key=lambda tensor: (str(tensor.file), tensor.offset))
    for file, tensors in groupby(stored, key=attrgetter("file")):
        with open_tensors(file) as descriptor:
            for tensor in tensors:
                plan = _plan_pieces(set(boxes[tensor.name].values()), float_type.itemsize)
                for i, ((first, end), wanted) in enumerate(plan):
                    parts = _read_rows(descriptor, tensor, (first, end), wanted, float_type, buffers)
                    yield _Piece(tensor.name, first, parts, is_last=i == len(plan) - 1)


def _plan_pieces(boxes: set[_Box], itemsize: int) -> list[tuple[tuple[int, int], list[_Box]]]:
    """Return the rows of each piece with the boxes it belongs to: those of the same rows are read together."""
    plan = []
    for (first, end), of_rows in groupby(sorted(boxes), key=lambda box: box[0]):
        wanted = list(of_rows)
        row_bytes = itemsize * sum(right - left for _, (left, right) in wanted)
        step = max(1, _PIECE_BYTES // max(1, row_bytes))
        plan += [((start, min(start + step, end)), wanted) for start in range(first, end, step)]
    return plan


def _read_rows(
    descriptor: int,
    tensor: StoredTensor,
    rows: tuple[int, int],
    boxes: list[_Box],
    float_type: np.dtype,
    buffers: _Buffers,
) -> dict[_Box, np.ndarray]:
    first, end = rows
    parts = {box: buffers.take((end - first, box[1][1] - box[1][0]), float_type) for box in boxes}
    left, right = min(box[1][0] for box in boxes), max(box[1][1] for box in boxes)
    if len(boxes) == 1 and tensor.dtype == float_type:
        read_part(descriptor, tensor, rows, (left, right), parts[boxes[0]])
        return parts
    step = max(1, _BLOCK_BYTES // max(1, (right - left) * tensor.dtype.itemsize))
    block = buffers.take((min(step, end - first), right - left), tensor.dtype)
    for start in range(first, end, step):
        stop = min(start + step, end)
        read = block[: stop - start]
        read_part(descriptor, tensor, (start, stop), (left, right), read)
        for (_, (column, column_end)), part in parts.items():
            cast(read[:, column - left : column_end - left], tensor.name, part[start - first : stop - first])
    buffers.give_back([block])
    return parts


def _put(piece: _Piece, box: _Box, device: Any, held: jax.Array | None, row: TensorName) -> jax.Array:
    """Return a device's part of a tensor with a piece in it; waits for the device, so that the host's can go."""
    part = piece.parts[box] if len(row.shape) > 1 else piece.parts[box][:, 0]
    if _is_taken_over(piece, row):
        return jax.device_put(part, device).block_until_ready()
    if len(part) == box[0][1] - box[0][0]:
        return jnp.array(part, copy=True, device=device).block_until_ready()
    if held is None:
        first, end = box[0]
        held = jnp.zeros((end - first, *part.shape[1:]), part.dtype, device=device)
    return _write_rows(held, jax.device_put(part, device), piece.first - box[0][0]).block_until_ready()


def _is_taken_over(piece: _Piece, row: TensorName) -> bool:
    """Return whether devices may use the host's buffers as they are, until the tensor is joined: it is turned then."""
    return row.is_turned and all(len(part) == end - first for ((first, end), _), part in piece.parts.items())


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


def _one_ahead(items: Iterator[_T]) -> Iterator[_T]:
    """Yield what an iterator gives; while one is used, the next is made in a thread."""
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        upcoming = pool.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = pool.submit(next, items, None)
            yield item
