"""Attention of new tokens over a cache that takes them in, in the order that suits the backend.

Elsewhere tokens are written first and attended to where they lie. A TPU's compiler then moves the whole cache of a
layer to the chip's own memory, writes the few positions there, and moves all of it back: as much is written as is read.
There the cache is attended to as it was, the new tokens beside it, and written when all layers have been run: a layer's
cache that is written right after it was attended to is still written in the chip's own memory where layers are many.

Source: programs that libtpu 0.0.42 compiled for v5e, v6e and v5p, `docs/performance.md`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from domino_jax.ops import cpu_kernels
from domino_jax.ops.attention import attend, attend_beside_context
from domino_jax.ops.kv_cache import KVCache, finite_or_zero, write_layer, write_layers
from domino_jax.shapes import Array, Float, Int


def attend_cached(
    own: KVCache,
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    start: Int[Array, " B"],
) -> tuple[KVCache, Float[Array, "B T N H"]]:
    """Return the cache of a layer, and its attention of T tokens at positions `start ..` over what lies up to each.

    The returned cache holds the tokens only after `write_deferred`, which every forward pass has to call once.
    `start + T` must fit the cache; what lies at later positions never matters. Values that are not finite count as 0,
    as `write_layer` stores them.
    """
    by_platform = {"tpu": attend_beside}
    if queries.dtype == own.keys[0].dtype and cpu_kernels.has_kernels_for(queries.dtype):
        by_platform["cpu"] = _write_then_attend_by_kernel
    return jax.lax.platform_dependent(own, queries, keys, values, start, default=write_then_attend, **by_platform)


def write_deferred(
    cache: KVCache,
    entries: Sequence[tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]],
    start: Int[Array, " B"],
    x: Float[Array, "B T D"],
) -> tuple[KVCache, Float[Array, "B T D"]]:
    """Return the cache of `attend_cached` with every layer's keys and values in it, and the last layer's output `x`.

    Nothing is written before `x` is there.
    """
    entries = tuple(entries)
    return jax.lax.platform_dependent(
        cache, entries, start, x, tpu=write_after, default=lambda cache, entries, start, x: (cache, x)
    )


def write_after(cache: KVCache, entries: tuple, start: Array, x: Array) -> tuple[KVCache, Array]:
    """Return `write_deferred` of a cache that holds nothing of the entries yet."""
    entries, x = jax.lax.optimization_barrier((entries, x))
    return write_layers(cache, entries, start), x


def write_then_attend(own: KVCache, queries: Array, keys: Array, values: Array, start: Array) -> tuple[KVCache, Array]:
    """Return `attend_cached`; attention reads the cache as it was written."""
    own = write_layer(own, keys, values, start)
    return own, _attend_written(queries, own.keys[0], own.values[0], start)


def _attend_written(queries: Array, keys: Array, values: Array, start: Array) -> Array:
    positions = start[:, None] + jnp.arange(queries.shape[1])
    return attend(queries, keys, values, jnp.arange(keys.shape[3]) <= positions[..., None])


def _write_then_attend_by_kernel(
    own: KVCache, queries: Array, keys: Array, values: Array, start: Array
) -> tuple[KVCache, Array]:
    own = write_layer(own, keys, values, start)
    return own, _attend_by_kernel(queries, own.keys[0], own.values[0], start)


@jax.custom_jvp
def _attend_by_kernel(queries: Array, keys: Array, values: Array, start: Array) -> Array:
    return cpu_kernels.attend_cached(queries, keys, values, start)


@_attend_by_kernel.defjvp
def _attend_by_kernel_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    *factors, start = primals
    return jax.jvp(lambda *factors: _attend_written(*factors, start), factors, list(tangents[:3]))


def attend_beside(own: KVCache, queries: Array, keys: Array, values: Array, start: Array) -> tuple[KVCache, Array]:
    """Return `attend_cached`; attention reads the cache as it was, and nothing is written."""
    new_keys, new_values = keys.astype(own.keys[0].dtype), finite_or_zero(values).astype(own.values[0].dtype)
    new_keys, new_values, queries, anchor_pos = (x[:, None] for x in (new_keys, new_values, queries, start))
    context = own.keys[0], own.values[0]
    mixed = attend_beside_context(*context, queries, new_keys, new_values, anchor_pos, is_causal=True)
    return own, mixed[:, 0]
