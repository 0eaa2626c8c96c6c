"""Key/value caches of static size, one pair of arrays a layer.

A cache holds no lengths: which positions count is decided by the caller's
committed length, so a rejected entry is overwritten later and never erased.
Layers are separate arrays in tuples because a stacked cache is copied by `scan`.
"""

from collections.abc import Sequence
from functools import partial
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp

from domino_jax.shapes import Array, Float, Int
from domino_jax.sharding import constrain, on_own_rows


@no_type_check  # see `domino_jax.shapes`
@flax.struct.dataclass
class KVCache:
    """Keys and values of every layer at every position.

    Attributes:
        keys: one array a layer, after k-norm and RoPE, transposed for the score product.
        values: one array a layer.
    """

    keys: tuple[Float[Array, "B K H S"], ...]
    values: tuple[Float[Array, "B K S H"], ...]

    @property
    def num_positions(self) -> int:
        """Positions a row can hold."""
        return self.keys[0].shape[-1]

    def layer(self, number: int) -> "KVCache":
        """Return the cache of one layer."""
        return KVCache((self.keys[number],), (self.values[number],))

    def with_layer(self, number: int, own: "KVCache") -> "KVCache":
        """Return this cache with that of one layer in the place of its own."""
        return KVCache(
            self.keys[:number] + own.keys + self.keys[number + 1 :],
            self.values[:number] + own.values + self.values[number + 1 :],
        )


def init_cache(
    num_layers: int, batch: int, num_kv_heads: int, head_dim: int, num_positions: int, dtype: jnp.dtype
) -> KVCache:
    """Return an empty cache."""
    keys = tuple(jnp.zeros((batch, num_kv_heads, head_dim, num_positions), dtype) for _ in range(num_layers))
    values = tuple(jnp.zeros((batch, num_kv_heads, num_positions, head_dim), dtype) for _ in range(num_layers))
    return KVCache(keys, values)


@partial(jax.jit, static_argnums=(1, 2))
def fit_length(x: Array, axis: int, length: int) -> Array:
    """Return `x` cut or filled with zeros to `length` along an axis."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, max(length - x.shape[axis], 0))
    return jnp.pad(jax.lax.slice_in_dim(x, 0, min(length, x.shape[axis]), axis=axis), padding)


def fit_cache(cache: KVCache, num_positions: int) -> KVCache:
    """Return a cache cut or lengthened to `num_positions`."""
    keys = tuple(fit_length(x, 3, num_positions) for x in cache.keys)
    return KVCache(keys, tuple(fit_length(x, 2, num_positions) for x in cache.values))


@jax.jit  # layers of equal shapes are traced once
def write_layer(
    own: KVCache, keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"], start: Int[Array, " B"]
) -> KVCache:
    """Write T positions at each row's own `start` into the cache of one layer.

    The caller keeps `start + T` within the cache: a slice that would leave it is moved back by XLA and would
    overwrite older entries. Values that are not finite are stored as 0, because a position that a query may not see has
    weight 0, and 0 times NaN would be NaN: their token's own output has to tell.
    """
    (old_keys,), (old_values,) = own.keys, own.values
    new_keys = keys.transpose(0, 2, 3, 1).astype(old_keys.dtype)
    new_values = finite_or_zero(values).transpose(0, 2, 1, 3).astype(old_values.dtype)
    written_keys = _write_rows(old_keys, new_keys, start, axis=2)
    written_values = _write_rows(old_values, new_values, start, axis=1)
    return KVCache((constrain(written_keys, "cache"),), (constrain(written_values, "cache"),))


def write_layers(
    cache: KVCache,
    entries: Sequence[tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]],
    start: Int[Array, " B"],
) -> KVCache:
    """Write T positions of every layer, keys and values, as `write_layer` does those of one.

    Every group of devices writes its own rows, so that one which has a single row knows it.
    """

    def write(_: None, own: tuple) -> KVCache:
        cache, entries, start = own
        for i, (keys, values) in enumerate(entries):
            cache = cache.with_layer(i, write_layer(cache.layer(i), keys, values, start))
        return cache

    return on_own_rows(write, None, (cache, tuple(entries), start))


def finite_or_zero(values: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return values as a cache stores them: 0 for those that are not finite."""
    return jnp.where(jnp.isfinite(values), values, 0)


def _write_rows(old: Array, new: Array, start: Int[Array, " B"], axis: int) -> Array:
    """Return `old` with `new` written at each row's own `start` along an axis of a row."""

    def write(row: Array, entries: Array, at: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(row, entries, at, axis)

    def write_all(old: Array, new: Array, start: Array) -> Array:
        if old.shape[0] == 1:  # as a scatter, XLA gives the cache of a TPU another layout, and copies it into that
            return jax.lax.dynamic_update_slice_in_dim(old, new, start[0], axis + 1)
        return jax.vmap(write)(old, new, start)

    if new.shape[0] > 1 or new.shape[axis + 1] > 1 or not jax.sharding.get_abstract_mesh().empty:
        return write_all(old, new, start)

    # XLA's CPU backend fuses the write of a single position with the reshape before the score product, does it twice
    # and copies the whole cache four times a step. It fuses nothing across a branch.
    def write_in_branch(old: Array, new: Array, start: Array) -> Array:
        return jax.lax.cond(start[0] >= 0, write_all, lambda old, *_: old, old, new, start)

    return jax.lax.platform_dependent(old, new, start, cpu=write_in_branch, default=write_all)
