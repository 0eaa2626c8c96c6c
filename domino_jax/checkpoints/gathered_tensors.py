"""Tensors that several processes hold parts of, each whole on the host of the first process, one at a time.

In: arrays by name, in every process. Out: numpy arrays, in the first process alone, which writes them. The devices
exchange their parts of a tensor when it is asked for, and each holds it whole until it is written; no other host has a
copy, and none has two. A write that fails is told to all. Knows no file format and no model.

Source: `jax.experimental.multihost_utils.process_allgather`, which leaves a copy on the host of every process.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from domino_jax.processes import is_first, on_first

Read = Callable[[str], np.ndarray]


def write_gathered(arrays: Mapping[str, Any], turned: set[str], write: Callable[[Read], None]) -> None:
    """Call `write(read)` in the first process, where `read` returns an array by name; all processes call this.

    Those in `turned` come transposed. With several processes `write` asks for each array once, in the order of names.

    Raises:
        ProcessError: `write` failed in the first process, which raises its own error.
        ValueError: it asked for arrays in another order.
    """
    if jax.process_count() == 1:
        write(lambda name: np.asarray(arrays[name].T if name in turned else arrays[name]))
        return
    upcoming = iter(sorted(arrays))

    def gather(name: str) -> Any:
        return _gather(arrays[name], name in turned)

    def read(name: str) -> np.ndarray:
        expected = next(upcoming, None)
        whole = None if expected is None else gather(expected)  # the others do it now, whatever is asked for
        if name != expected:
            raise ValueError(f"{name} is asked for where {expected} is next: names are gathered in their order")
        return _to_host(whole)

    def write_all() -> None:
        try:
            write(read)
        finally:
            for name in upcoming:  # which the others wait for
                gather(name)

    if not is_first():
        for name in upcoming:
            gather(name)
    on_first(write_all)


def _gather(leaf: Any, is_turned: bool) -> Any:
    """Return an array whole on every device of its mesh, when it is there."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        whole = np.asarray(leaf)
        return whole.T if is_turned else whole
    return _gathering(leaf.sharding.mesh, is_turned)(leaf).block_until_ready()


@cache
def _gathering(mesh: Any, is_turned: bool) -> Any:
    return jax.jit(lambda array: array.T if is_turned else array, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _to_host(whole: Any) -> np.ndarray:
    return np.asarray(whole)
