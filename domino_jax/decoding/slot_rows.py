"""Rows that change places: into a slot, out of it, and the whole batch to another shape."""

from functools import partial

import jax
import jax.numpy as jnp

from domino_jax.decoding.slots import SlotState
from domino_jax.ops.kv_cache import fit_cache, fit_length
from domino_jax.shapes import Array, Bool, Int
from domino_jax.sharding import constrain_tree


@partial(jax.jit, donate_argnums=0)
def insert_row(slots: SlotState, row: SlotState, index: Int[Array, ""]) -> SlotState:
    """Return `slots` with slot `index` taken by the one row of `row`, whose caches may be shorter; `slots` is donated.

    What the slot held is overwritten to the end of its cache: nothing of an earlier request stays.
    """
    return constrain_tree(jax.tree.map(lambda old, new: _write_row(old, new, index), slots, row))


# Jitted by themselves: the caches of many layers have one shape, which is then traced once.


@jax.jit
def _write_row(old: Array, new: Array, index: Array) -> Array:
    padding = [(0, 0)] + [(0, size - new_size) for size, new_size in zip(old.shape[1:], new.shape[1:], strict=True)]
    return jax.lax.dynamic_update_slice_in_dim(old, jnp.pad(new, padding), index, axis=0)


@jax.jit
def _take_rows(x: Array, rows: Array) -> Array:
    return x[rows]


@jax.jit
def extract_row(slots: SlotState, index: Int[Array, ""]) -> SlotState:
    """Return slot `index` as a state of one row."""
    return constrain_tree(jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1, axis=0), slots))


@partial(jax.jit, static_argnums=3)
def resize_slots(
    slots: SlotState, rows: Int[Array, " new"], is_used: Bool[Array, " new"], num_positions: int
) -> SlotState:
    """Return the slots `rows`, with caches cut or lengthened to `num_positions`; those not `is_used` are done."""
    slots = jax.tree.map(lambda x: _take_rows(x, rows), slots)
    decode = slots.decode
    decode = decode.replace(
        tokens=fit_length(decode.tokens, 1, num_positions),
        sources=fit_length(decode.sources, 1, num_positions),
        is_done=decode.is_done | ~is_used,
        target_cache=fit_cache(decode.target_cache, num_positions),
        draft_cache=decode.draft_cache and fit_cache(decode.draft_cache, num_positions),
    )
    return constrain_tree(slots.replace(decode=decode))
