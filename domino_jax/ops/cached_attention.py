"""Attention of new tokens over a cache that takes them in, in the order that suits the backend.

Elsewhere tokens are written first and attended to where they lie. A TPU's compiler then moves the whole cache of a
layer to the chip's own memory, writes the few positions there, and moves all of it back: as much is written as is read.
There the cache is attended to as it was, the new tokens beside it, and written afterwards in its place.

Source: programs that libtpu 0.0.42 compiled for v5e, `docs/performance.md`.
"""

import jax
import jax.numpy as jnp

from domino_jax.ops.attention import attend, attend_beside_context
from domino_jax.ops.kv_cache import KVCache, finite_or_zero, write_layer
from domino_jax.shapes import Array, Float, Int


def write_and_attend(
    cache: KVCache,
    layer: int,
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    start: Int[Array, " B"],
) -> tuple[KVCache, Float[Array, "B T N H"]]:
    """Return the cache with T positions of a layer written at `start ..`, and attention over what lies up to each.

    `start + T` must fit the cache; what lies at later positions never matters. Values that are not finite count as 0,
    as `write_layer` stores them.
    """
    own = KVCache((cache.keys[layer],), (cache.values[layer],))
    own, mixed = _write_and_attend(own, queries, keys, values, start)
    return KVCache(
        cache.keys[:layer] + own.keys + cache.keys[layer + 1 :],
        cache.values[:layer] + own.values + cache.values[layer + 1 :],
    ), mixed


@jax.jit
def _write_and_attend(own: KVCache, queries: Array, keys: Array, values: Array, start: Array) -> tuple[KVCache, Array]:
    return jax.lax.platform_dependent(
        own, queries, keys, values, start, tpu=attend_then_write, default=write_then_attend
    )


def write_then_attend(own: KVCache, queries: Array, keys: Array, values: Array, start: Array) -> tuple[KVCache, Array]:
    """Return `write_and_attend` of a cache of one layer: attention reads the cache as it was written."""
    own = write_layer(own, 0, keys, values, start)
    positions = start[:, None] + jnp.arange(queries.shape[1])
    attend_mask = jnp.arange(own.num_positions) <= positions[..., None]
    return own, attend(queries, own.keys[0], own.values[0], attend_mask)


def attend_then_write(own: KVCache, queries: Array, keys: Array, values: Array, start: Array) -> tuple[KVCache, Array]:
    """Return `write_and_attend` of a cache of one layer: attention reads the cache before anything is written."""
    new_keys, new_values = keys.astype(own.keys[0].dtype), finite_or_zero(values).astype(own.values[0].dtype)
    new_keys, new_values, queries, anchor_pos = (x[:, None] for x in (new_keys, new_values, queries, start))
    context = own.keys[0], own.values[0]
    mixed = attend_beside_context(*context, queries, new_keys, new_values, anchor_pos, is_causal=True)
    return write_layer(own, 0, keys, values, start), mixed[:, 0]
