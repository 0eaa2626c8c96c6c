"""Rows that change places: into a slot, out of it, and the whole batch to another shape."""

from functools import partial

import jax
import jax.numpy as jnp

from domino_jax.decoding.slots import SlotState
from domino_jax.ops.kv_cache import KVCache
from domino_jax.shapes import Array, Bool, Int
from domino_jax.sharding import constrain_tree


@partial(jax.jit, donate_argnums=0)
def insert_row(slots: SlotState, row: SlotState, index: Int[Array, ""]) -> SlotState:
    """Return `slots` with slot `index` taken by the one row of `row`, whose caches may be shorter; `slots` is donated.

    What the slot held is overwritten to the end of its cache: nothing of an earlier request stays.
    """

    def write(old: Array, new: Array) -> Array:
        padding = [(0, 0)] + [(0, size - new_size) for size, new_size in zip(old.shape[1:], new.shape[1:], strict=True)]
        return jax.lax.dynamic_update_slice_in_dim(old, jnp.pad(new, padding), index, axis=0)

    return constrain_tree(jax.tree.map(write, slots, row))


@jax.jit
def extract_row(slots: SlotState, index: Int[Array, ""]) -> SlotState:
    """Return slot `index` as a state of one row."""
    return constrain_tree(jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1, axis=0), slots))


@partial(jax.jit, static_argnums=3)
def resize_slots(
    slots: SlotState, rows: Int[Array, " new"], is_used: Bool[Array, " new"], num_positions: int
) -> SlotState:
    """Return the slots `rows`, with caches cut or lengthened to `num_positions`; those not `is_used` are done."""
    old_positions = slots.decode.tokens.shape[1]

    def gather(x: Array) -> Array:
        return x[rows]

    def fit(axis: int, x: Array) -> Array:
        kept = jax.lax.slice_in_dim(x[rows], 0, min(num_positions, old_positions), axis=axis)
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, max(num_positions - old_positions, 0))
        return jnp.pad(kept, padding)

    def fit_cache(cache: KVCache | None) -> KVCache | None:
        if cache is None:
            return None
        return KVCache(tuple(fit(3, keys) for keys in cache.keys), tuple(fit(2, values) for values in cache.values))

    state = slots.decode
    resized = jax.tree.map(gather, slots.replace(decode=state.replace(target_cache=None, draft_cache=None)))
    decode = resized.decode.replace(
        tokens=fit(1, state.tokens),
        sources=fit(1, state.sources),
        is_done=resized.decode.is_done | ~is_used,
        target_cache=fit_cache(state.target_cache),
        draft_cache=fit_cache(state.draft_cache),
    )
    return constrain_tree(resized.replace(decode=decode))
