"""Choices and look-ups over a vocabulary that devices may share; nobody gathers its logits or embeddings for them.

Each device looks at its own part, and what it found is exchanged in one collective. Where the vocabulary is whole on
every device these are plain argmax and indexing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from domino_jax.ops.products import take_rows
from domino_jax.ops.ranking import first_argmax, top_indices
from domino_jax.shapes import Array, Float, Int
from domino_jax.sharding import DATA, MODEL, count_shards, split_axes


def look_up(embedding: Float[Array, "V D"], token_ids: Int[Array, "*at"], dtype: jnp.dtype) -> Float[Array, "*at D"]:
    """Return the embeddings of tokens in `dtype`, from a table as `cast_weight` returns it."""
    if count_shards("vocab", embedding.shape[0]) == 1:
        return take_rows(embedding, token_ids, dtype)

    def add_own(part: Array, token_ids: Array) -> Array:
        at = token_ids - jax.lax.axis_index(MODEL) * part.shape[0]
        is_own = (at >= 0) & (at < part.shape[0])
        rows = part[jnp.where(is_own, at, 0)]
        return jax.lax.psum(jnp.where(is_own[..., None], rows, 0), MODEL)

    return _on_parts(add_own, (_PARTS, _rows(token_ids)), _rows(token_ids))(embedding, token_ids)


def choose(values: Float[Array, "*at V"]) -> Int[Array, "*at"]:
    """Return the argmax over the vocabulary, the lowest id among equals."""
    values = jax.lax.stop_gradient(values)
    if count_shards("vocab", values.shape[-1]) == 1:
        return first_argmax(values)

    def exchange(part: Array) -> Array:
        best, token_ids = _best_of(part)
        packed = jnp.stack([_to_words(best), _to_words(token_ids)], axis=-1)
        return _from_words(_take_best(packed)[..., 1], jnp.int32)

    return _on_parts(exchange, (_rows(values, MODEL),), _rows(values))(values)


def choose_top(values: Float[Array, "*at V"], num: int) -> Int[Array, "*at M"]:
    """Return the ids of the `num` largest values, the largest first; `num` is at most V.

    Which of equals come in, and their order, depends on how devices share the vocabulary.
    """
    if count_shards("vocab", values.shape[-1]) == 1:
        return top_indices(values, num)

    def exchange(part: Array) -> Array:
        own = top_indices(part, min(num, part.shape[-1]))
        best = jnp.take_along_axis(part, own, axis=-1).astype(jnp.float32)
        token_ids = own + jax.lax.axis_index(MODEL) * part.shape[-1]
        packed = jnp.stack([_to_words(best), _to_words(token_ids)])
        gathered = jax.lax.all_gather(packed, MODEL, axis=packed.ndim - 1, tiled=True)
        places = jax.lax.top_k(_from_words(gathered[0], jnp.float32), num)[1]
        return jnp.take_along_axis(_from_words(gathered[1], jnp.int32), places, axis=-1)

    return _on_parts(exchange, (_rows(values, MODEL),), _rows(values))(values)


def choose_and_look_up(
    values: Float[Array, "*at V"], embedding: Float[Array, "V D"], dtype: jnp.dtype
) -> tuple[Int[Array, "*at"], Float[Array, "*at D"]]:
    """Return `choose` of the values and `look_up` of the chosen tokens: both in the same collective."""
    if count_shards("vocab", values.shape[-1]) == 1:
        token_ids = choose(values)
        return token_ids, take_rows(embedding, token_ids, dtype)
    width = embedding.shape[1]
    # Rows of 16-bit numbers travel as pairs; of an odd width they are filled up.
    per_word = 4 // dtype.itemsize

    def exchange(part: Array, embedding_part: Array) -> tuple[Array, Array]:
        best, token_ids = _best_of(part)
        rows = embedding_part[token_ids - jax.lax.axis_index(MODEL) * part.shape[-1]]
        rows = jnp.pad(rows, ((0, 0),) * (rows.ndim - 1) + ((0, -width % per_word),))
        words = _to_words(rows if per_word == 1 else rows.reshape(*rows.shape[:-1], -1, per_word))
        packed = jnp.concatenate([_to_words(best)[..., None], _to_words(token_ids)[..., None], words], axis=-1)
        taken = _take_best(packed)
        rows = _from_words(taken[..., 2:], dtype).reshape(*token_ids.shape, -1)[..., :width]
        return _from_words(taken[..., 1], jnp.int32), rows

    return _on_parts(exchange, (_rows(values, MODEL), _PARTS), _rows(values))(values, embedding)


_PARTS = PartitionSpec(MODEL)


def _on_parts(function: Callable[..., Any], splits: tuple[PartitionSpec, ...], result: PartitionSpec) -> Any:
    """Return `function` run on every device's own rows and its part of the vocabulary.

    Its results are the same on all devices that share rows, which is not checked: an exchange makes them so.
    """
    return jax.shard_map(function, in_specs=splits, out_specs=result, axis_names=split_axes(), check_vma=False)


def _rows(x: Array, last: str | None = None) -> PartitionSpec:
    rows = DATA if count_shards("batch", x.shape[0]) > 1 else None
    return PartitionSpec(rows, *[None] * (x.ndim - 2), last) if last else PartitionSpec(rows)


def _best_of(part: Array) -> tuple[Array, Array]:
    token_ids = first_argmax(part) + jax.lax.axis_index(MODEL) * part.shape[-1]
    return jnp.max(part, axis=-1).astype(jnp.float32), token_ids


def _take_best(packed: Array) -> Array:
    """Return the words of the device whose first word, a float32, is highest; the first among equals."""
    gathered = jax.lax.all_gather(packed, MODEL)
    winner = jnp.argmax(_from_words(gathered[..., 0], jnp.float32), axis=0)
    return jnp.take_along_axis(gathered, winner[None, ..., None], axis=0)[0]


def _to_words(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _from_words(words: Array, dtype: Any) -> Array:
    return jax.lax.bitcast_convert_type(words, dtype)
