"""Leaves of a training's state, as Orbax stores them and as they come back.

In: any pytree of arrays, numbers and PRNG keys. Out: arrays under names, and from what is read leaves of the same kind.
"""

from typing import Any

import jax
import numpy as np

from domino_jax.checkpoints.safetensors_io import CheckpointError


def name_leaves(state: Any) -> dict[str, Any]:
    """Return the leaves of a tree by their dotted path.

    Raises:
        CheckpointError: two have the same.
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "value"
        if name in named:
            raise CheckpointError(f"two leaves of the state are called {name}; rename one")
        named[name] = leaf
    return named


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def as_stored(leaf: Any) -> Any:
    """Return the array that is stored of a leaf: of a PRNG key its data."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def as_abstract(leaf: Any) -> Any:
    """Return what Orbax reads into: a placed shape for device arrays, an empty host array for anything else."""
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return np.empty_like(np.asarray(leaf))


def as_like(stored: Any, like: Any) -> Any:
    """Return a leaf of the kind of `like` from what was stored of one."""
    if _is_key(like):
        return jax.random.wrap_key_data(stored, impl=jax.random.key_impl(like))
    if isinstance(like, jax.Array):
        return stored
    if isinstance(like, bool | int | float):
        return type(like)(np.asarray(stored).item())
    return np.asarray(stored)
