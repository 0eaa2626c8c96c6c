"""Rotary positions and grouped-query attention.

Queries of one key/value head are the rows of one matrix product, and cached keys
lie transposed (`[B, K, H, S]`): on CPU this is several times faster than a product
a query head, and on accelerators it is what the matrix unit wants anyway.
Sums of scores and the softmax are done in float32 whatever the inputs are.

Source: RoPE (arXiv 2104.09864) in the half-split form of Hugging Face Qwen3; GQA (arXiv 2305.13245).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from domino_jax.ops.products import einsum_in_float32
from domino_jax.shapes import Array, Bool, Float, Int
from domino_jax.sharding import on_own_rows

_MASKED_SCORE = -1e30

_NUM_PREFIXES = 4
"""Static lengths the context of a chunk of anchors is cut to, beside none at all; each is compiled on its own."""


def apply_rope(
    x: Float[Array, "*batch T heads H"], positions: Int[Array, "*batch T"], rope_theta: float
) -> Float[Array, "*batch T heads H"]:
    """Rotate `x` by its absolute positions; angles are computed in float32."""
    half = x.shape[-1] // 2
    frequencies = rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def attend(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B K H S"],
    values: Float[Array, "B K S H"],
    attend_mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Return grouped-query attention; `attend_mask` True means that query t may see position s.

    A query that may see nothing gets the mean of all values: finite, and of weight 0 wherever it can occur.
    """
    batch, num_queries, num_heads, head_dim = queries.shape
    num_kv = keys.shape[1]
    groups = num_heads // num_kv
    grouped = queries.reshape(batch, num_queries, num_kv, groups, head_dim).transpose(0, 2, 3, 1, 4)
    rows = grouped.reshape(batch, num_kv, groups * num_queries, head_dim)
    scores = einsum_in_float32("bkqh,bkhs->bkqs", rows, keys) * head_dim**-0.5
    scores = scores.reshape(batch, num_kv, groups, num_queries, -1)
    scores = jnp.where(attend_mask[:, None, None], scores, _MASKED_SCORE)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    weights = weights.reshape(batch, num_kv, groups * num_queries, -1)
    mixed = jnp.einsum("bkqs,bksh->bkqh", weights, values)
    mixed = mixed.reshape(batch, num_kv, groups, num_queries, head_dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, num_queries, num_heads, head_dim)


def attend_causal(
    queries: Float[Array, "B T N H"], keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"]
) -> Float[Array, "B T N H"]:
    """Return grouped-query attention of whole sequences, every token seeing those up to itself.

    Where cuDNN has a fused kernel for the type and the device at hand, it is used: scores are then never written to
    memory. Everywhere else they are.
    """
    if _has_fused_attention(queries.dtype, queries.shape[-1]):
        return jax.nn.dot_product_attention(queries, keys, values, is_causal=True, implementation="cudnn")
    length = queries.shape[1]
    attend_mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (queries.shape[0], length, length))
    return attend(queries, keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3), attend_mask)


@functools.cache
def _has_fused_attention(dtype: jnp.dtype, head_dim: int) -> bool:
    if jax.default_backend() != "gpu" or jnp.dtype(dtype).itemsize != 2:
        return False
    shape = jax.ShapeDtypeStruct((1, 128, 1, head_dim), dtype)
    attend_fused = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    try:
        jax.eval_shape(attend_fused, shape, shape, shape)
    except (RuntimeError, ValueError, NotImplementedError):  # this cuDNN or this device has no kernel for it
        return False
    return True


def attend_blocks(
    queries: Float[Array, "B A P N H"],
    context_keys: Float[Array, "B K H S"],
    context_values: Float[Array, "B K S H"],
    block_keys: Float[Array, "B A P K H"],
    block_values: Float[Array, "B A P K H"],
    anchor_pos: Int[Array, "B A"],
    anchor_chunk: int | None = None,
) -> Float[Array, "B A P N H"]:
    """Return attention of many draft blocks of a sequence at once.

    A query of block a sees the context positions before `anchor_pos[a]` and all of its own block, nothing else;
    one softmax runs over both parts, and no score between two blocks is ever computed. Scores exist for `anchor_chunk`
    anchors a row at a time (None: for all) and are computed again in the backward pass. A chunk leaves out most of the
    context after its last anchor: sorted anchors cost little more than half of unsorted ones.

    Source: Domino, arXiv 2605.29707, training attention mask.
    """
    rows = (context_keys, context_values, queries, block_keys, block_values, anchor_pos)
    if anchor_chunk is None or anchor_chunk >= anchor_pos.shape[1]:
        return jax.checkpoint(attend_beside_context)(*rows)
    return on_own_rows(lambda _, own: _attend_in_chunks(anchor_chunk, *own), None, rows)


def _attend_in_chunks(
    anchor_chunk: int, context_keys: Array, context_values: Array, *per_anchor: Array
) -> Float[Array, "B A P N H"]:
    queries, anchor_pos = per_anchor[0], per_anchor[-1]
    batch, num_anchors, context_len = *anchor_pos.shape, context_keys.shape[-1]
    num_chunks = -(-num_anchors // anchor_chunk)
    prefixes = [context_len * i // _NUM_PREFIXES for i in range(_NUM_PREFIXES + 1)]

    def split(x: Array) -> Array:
        missing = num_chunks * anchor_chunk - num_anchors
        padded = jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, num_chunks, anchor_chunk, *x.shape[2:]), 1, 0)

    # Checkpointed twice: outside, or the loop would stack the context of every chunk; inside, or the switch would keep
    # the scores of all its branches side by side. Each pass is a loop of its own, so there is nothing to merge.
    checkpoint = functools.partial(jax.checkpoint, prevent_cse=False)

    def attend_prefix(prefix: int) -> Callable[..., Array]:
        return checkpoint(
            lambda keys, values, *inputs: attend_beside_context(keys[..., :prefix], values[:, :, :prefix], *inputs)
        )

    @checkpoint
    def attend_in_chunk(inputs: tuple) -> Array:
        needed = jnp.searchsorted(jnp.array(prefixes), jnp.minimum(jnp.max(inputs[-1]), context_len))
        branches = [attend_prefix(prefix) for prefix in prefixes]
        return jax.lax.switch(needed, branches, context_keys, context_values, *inputs)

    mixed = jnp.moveaxis(jax.lax.map(attend_in_chunk, jax.tree.map(split, per_anchor)), 0, 1)
    return mixed.reshape(batch, num_chunks * anchor_chunk, *queries.shape[2:])[:, :num_anchors]


def attend_beside_context(
    context_keys: Float[Array, "B K H S"],
    context_values: Float[Array, "B K S H"],
    queries: Float[Array, "B A P N H"],
    block_keys: Float[Array, "B A P K H"],
    block_values: Float[Array, "B A P K H"],
    anchor_pos: Int[Array, "B A"],
    is_causal: bool = False,
) -> Float[Array, "B A P N H"]:
    """Return `attend_blocks`, all of whose scores exist at the same time.

    With `is_causal` a query sees of its own block what lies up to itself.
    """
    batch, num_anchors, block, num_heads, head_dim = queries.shape
    num_kv = context_keys.shape[1]
    groups = num_heads // num_kv
    scale = head_dim**-0.5
    grouped = queries.reshape(batch, num_anchors, block, num_kv, groups, head_dim).transpose(0, 3, 4, 1, 2, 5)
    context_scores = einsum_in_float32("bkgaph,bkhs->bkgaps", grouped, context_keys)
    is_before = jnp.arange(context_keys.shape[-1]) < anchor_pos[..., None]
    context_scores = jnp.where(is_before[:, None, None, :, None], context_scores * scale, _MASKED_SCORE)
    block_scores = einsum_in_float32("bkgaph,baqkh->bkgapq", grouped, block_keys) * scale
    if is_causal:
        block_scores = jnp.where(jnp.tril(jnp.ones((block, block), bool)), block_scores, _MASKED_SCORE)
    # One softmax over both parts without joining them: the joined scores would be written once more, and its quotient
    # is taken of the mixed values, which are fewer.
    largest = jnp.max(block_scores, axis=-1, keepdims=True)
    if context_keys.shape[-1]:
        largest = jnp.maximum(largest, jnp.max(context_scores, axis=-1, keepdims=True))
    largest = jax.lax.stop_gradient(largest)
    context_weights, block_weights = jnp.exp(context_scores - largest), jnp.exp(block_scores - largest)
    total = jnp.sum(context_weights, axis=-1, keepdims=True) + jnp.sum(block_weights, axis=-1, keepdims=True)
    mixed = einsum_in_float32("bkgaps,bksh->bkgaph", context_weights.astype(queries.dtype), context_values)
    mixed = mixed + einsum_in_float32("bkgapq,baqkh->bkgaph", block_weights.astype(queries.dtype), block_values)
    mixed = (mixed / total).astype(queries.dtype)
    return mixed.transpose(0, 3, 4, 1, 2, 5).reshape(queries.shape)
