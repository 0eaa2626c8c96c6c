"""Blocks of cached positions that rows can share: a prefix that was computed once is copied, not computed again.

A block holds what both models know of a run of positions: the target's keys and values and the draft's context, so a
row that starts from blocks goes on as if it had run the prompt itself. Which block holds which tokens is the caller's
business.

Source: block-hashed prefix caching of vLLM.
"""

from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp

from domino_jax.decoding.slots import SlotState
from domino_jax.decoding.state import DecodeSettings
from domino_jax.models.draft_backbone import init_draft_cache
from domino_jax.models.qwen3 import init_target_cache
from domino_jax.ops.kv_cache import KVCache
from domino_jax.shapes import Array, Bool, Int
from domino_jax.sharding import constrain_tree


@no_type_check  # see `domino_jax.shapes`
@flax.struct.dataclass
class PrefixPool:
    """Keys and values by block: caches whose rows are blocks; `draft` is None without a drafter."""

    target: KVCache
    draft: KVCache | None


def init_pool(settings: DecodeSettings, num_blocks: int, block_len: int) -> PrefixPool:
    """Return an empty pool of `num_blocks` blocks of `block_len` positions."""
    dtype = jnp.dtype(settings.dtype)
    return PrefixPool(
        target=init_target_cache(settings.target, num_blocks, block_len, dtype),
        draft=init_draft_cache(settings.draft, num_blocks, block_len, dtype) if settings.draft else None,
    )


def _load(pool: KVCache, row: KVCache, block_ids: Int[Array, " n"], is_loaded: Bool[Array, " n"]) -> KVCache:
    def keys(blocks: Array, old: Array) -> Array:
        num_heads, head_dim, block_len = blocks.shape[1:]
        end = block_ids.shape[0] * block_len
        loaded = blocks[block_ids].transpose(1, 2, 0, 3).reshape(1, num_heads, head_dim, end)
        return old.at[..., :end].set(jnp.where(jnp.repeat(is_loaded, block_len), loaded, old[..., :end]))

    def values(blocks: Array, old: Array) -> Array:
        num_heads, block_len, head_dim = blocks.shape[1:]
        end = block_ids.shape[0] * block_len
        loaded = blocks[block_ids].transpose(1, 0, 2, 3).reshape(1, num_heads, end, head_dim)
        is_kept = jnp.repeat(is_loaded, block_len)[:, None]
        return old.at[:, :, :end].set(jnp.where(is_kept, loaded, old[:, :, :end]))

    return KVCache(
        keys=tuple(keys(blocks, old) for blocks, old in zip(pool.keys, row.keys, strict=True)),
        values=tuple(values(blocks, old) for blocks, old in zip(pool.values, row.values, strict=True)),
    )


def _store(pool: KVCache, row: KVCache, block_ids: Int[Array, " n"]) -> KVCache:
    def keys(blocks: Array, written: Array) -> Array:
        num_heads, head_dim, block_len = blocks.shape[1:]
        num_parts = block_ids.shape[0]
        parts = written[0, :, :, : num_parts * block_len].reshape(num_heads, head_dim, num_parts, block_len)
        return blocks.at[block_ids].set(parts.transpose(2, 0, 1, 3), mode="drop")

    def values(blocks: Array, written: Array) -> Array:
        num_heads, block_len, head_dim = blocks.shape[1:]
        num_parts = block_ids.shape[0]
        parts = written[0, :, : num_parts * block_len].reshape(num_heads, num_parts, block_len, head_dim)
        return blocks.at[block_ids].set(parts.transpose(1, 0, 2, 3), mode="drop")

    return KVCache(
        keys=tuple(keys(blocks, written) for blocks, written in zip(pool.keys, row.keys, strict=True)),
        values=tuple(values(blocks, written) for blocks, written in zip(pool.values, row.values, strict=True)),
    )


def _load_blocks(
    pool: PrefixPool, row: SlotState, block_ids: Int[Array, " n"], is_loaded: Bool[Array, " n"]
) -> SlotState:
    state = row.decode
    draft = _load(pool.draft, state.draft_cache, block_ids, is_loaded) if pool.draft else None
    loaded = state.replace(target_cache=_load(pool.target, state.target_cache, block_ids, is_loaded), draft_cache=draft)
    return constrain_tree(row.replace(decode=loaded))


def _store_blocks(pool: PrefixPool, row: SlotState, block_ids: Int[Array, " n"]) -> PrefixPool:
    draft = _store(pool.draft, row.decode.draft_cache, block_ids) if pool.draft else None
    return constrain_tree(PrefixPool(_store(pool.target, row.decode.target_cache, block_ids), draft))


load_blocks = jax.jit(_load_blocks, donate_argnums=1)
"""Copy pool blocks to the start of a one-row state, block i where `is_loaded[i]`; the state is donated."""

store_blocks = jax.jit(_store_blocks, donate_argnums=0)
"""Copy the first blocks of a one-row state into the pool, block i to `block_ids[i]`; ids past the pool: not at all.

The pool is donated.
"""
