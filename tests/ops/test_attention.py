import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.ops.attention import apply_rope, attend, attend_blocks
from domino_jax.ops.cached_attention import (
    attend_beside,
    attend_cached,
    write_after,
    write_deferred,
    write_then_attend,
)
from domino_jax.ops.kv_cache import KVCache, init_cache, write_layer

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
BATCH, HEADS, KV_HEADS, WIDTH = 2, 4, 2, 8


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def naive_attend(queries, keys, values, mask):
    """One query, one head at a time; keys and values are [B, S, K, H]."""
    mixed = np.zeros(queries.shape)
    for b, t, n in np.ndindex(*queries.shape[:3]):
        kv = n // (queries.shape[2] // keys.shape[2])
        scores = keys[b, :, kv].astype(float) @ queries[b, t, n] / np.sqrt(queries.shape[-1])
        weights = np.where(mask[b, t], np.exp(scores - scores.max()), 0)
        mixed[b, t, n] = weights / weights.sum() @ values[b, :, kv]
    return mixed


def test_attend():
    queries, keys = normal(0, BATCH, 3, HEADS, WIDTH), normal(1, BATCH, 6, KV_HEADS, WIDTH)
    values = normal(2, *keys.shape)
    mask = np.random.default_rng(3).random((BATCH, 3, 6)) < 0.6
    mask[..., 0] = True
    got = jax.jit(attend)(
        jnp.asarray(queries),
        jnp.asarray(keys.transpose(0, 2, 3, 1)),
        jnp.asarray(values.transpose(0, 2, 1, 3)),
        jnp.asarray(mask),
    )
    np.testing.assert_allclose(got, naive_attend(queries, keys, values, mask), **TOLERANCE)


def test_a_query_that_sees_nothing_stays_finite():
    queries, keys = normal(0, 1, 2, HEADS, WIDTH), normal(1, 1, KV_HEADS, WIDTH, 5)
    values = normal(2, 1, KV_HEADS, 5, WIDTH)
    got = jax.jit(attend)(jnp.asarray(queries), jnp.asarray(keys), jnp.asarray(values), jnp.zeros((1, 2, 5), bool))
    wanted = np.repeat(values.mean(axis=2), HEADS // KV_HEADS, axis=1)[:, None]
    np.testing.assert_allclose(got, np.broadcast_to(wanted, got.shape), **TOLERANCE)


def test_large_scores_do_not_overflow():
    queries, keys = 1e4 * normal(0, 1, 1, HEADS, WIDTH), 1e4 * normal(1, 1, KV_HEADS, WIDTH, 5)
    got = jax.jit(attend)(
        jnp.asarray(queries), jnp.asarray(keys), jnp.ones((1, KV_HEADS, 5, WIDTH)), jnp.ones((1, 1, 5), bool)
    )
    np.testing.assert_allclose(got, 1.0, **TOLERANCE)


def test_attend_blocks_equals_one_dense_mask():
    """All blocks laid out in one long sequence under one mask; context strictly before the anchor, no other block."""
    anchors, slots, context = 3, 2, 7
    anchor_pos = np.array([[1, 4, 7], [0, 6, 2]])
    queries = normal(0, BATCH, anchors, slots, HEADS, WIDTH)
    context_keys = normal(1, BATCH, context, KV_HEADS, WIDTH)
    context_values = normal(2, *context_keys.shape)
    block_keys = normal(3, BATCH, anchors, slots, KV_HEADS, WIDTH)
    block_values = normal(4, *block_keys.shape)
    got = jax.jit(attend_blocks)(
        jnp.asarray(queries),
        jnp.asarray(context_keys.transpose(0, 2, 3, 1)),
        jnp.asarray(context_values.transpose(0, 2, 1, 3)),
        jnp.asarray(block_keys),
        jnp.asarray(block_values),
        jnp.asarray(anchor_pos),
    )
    mask = np.zeros((BATCH, anchors, slots, context + anchors * slots), bool)
    for b, a in np.ndindex(BATCH, anchors):
        mask[b, a, :, : anchor_pos[b, a]] = True
        mask[b, a, :, context + a * slots : context + (a + 1) * slots] = True
    flat = (BATCH, anchors * slots)
    wanted = naive_attend(
        queries.reshape(*flat, HEADS, WIDTH),
        np.concatenate([context_keys, block_keys.reshape(*flat, KV_HEADS, WIDTH)], axis=1),
        np.concatenate([context_values, block_values.reshape(*flat, KV_HEADS, WIDTH)], axis=1),
        mask.reshape(*flat, -1),
    )
    np.testing.assert_allclose(got, wanted.reshape(got.shape), **TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_of_anchors_change_nothing(chunk):
    """Values and gradients; chunks that need no context, all of it, or a part, in any order, the last one not full."""
    anchors, slots, context = 7, 2, 13
    anchor_pos = jnp.asarray([[0, 1, 3, 4, 9, 13, 0], [0, 0, 2, 12, 8, 13, 0]])
    arrays = (
        normal(0, BATCH, anchors, slots, HEADS, WIDTH),
        normal(1, BATCH, KV_HEADS, WIDTH, context),
        normal(2, BATCH, KV_HEADS, context, WIDTH),
        normal(3, BATCH, anchors, slots, KV_HEADS, WIDTH),
        normal(4, BATCH, anchors, slots, KV_HEADS, WIDTH),
    )
    weights = normal(5, *arrays[0].shape)

    def run(chunk):
        def loss(arrays):
            mixed = attend_blocks(*arrays, anchor_pos, chunk)
            return jnp.sum(mixed * weights), mixed

        return jax.jit(jax.grad(loss, has_aux=True))(tuple(map(jnp.asarray, arrays)))

    for got, wanted in zip(jax.tree.leaves(run(chunk)), jax.tree.leaves(run(None)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_chunks_hold_fewer_scores_and_leave_out_context_they_do_not_see():
    """The compiled gradient needs far less memory, and context after the last anchor may hold anything."""
    anchors, slots, context = 64, 4, 512
    arrays = (
        jnp.asarray(normal(0, 1, anchors, slots, HEADS, WIDTH)),
        jnp.asarray(normal(1, 1, KV_HEADS, WIDTH, context)).at[..., context // 4 :].set(jnp.nan),
        jnp.asarray(normal(2, 1, KV_HEADS, context, WIDTH)).at[:, :, context // 4 :].set(jnp.nan),
        jnp.asarray(normal(3, 1, anchors, slots, KV_HEADS, WIDTH)),
        jnp.asarray(normal(4, 1, anchors, slots, KV_HEADS, WIDTH)),
    )
    anchor_pos = jnp.sort(jnp.arange(anchors)[None] * 2)

    def compile_gradient(chunk):
        def loss(queries, *rest):
            return jnp.sum(attend_blocks(queries, *rest, chunk))

        return jax.jit(jax.grad(loss)).lower(*arrays, anchor_pos).compile()

    whole, chunked = compile_gradient(None), compile_gradient(8)
    temp_bytes = [c.memory_analysis().temp_size_in_bytes for c in (whole, chunked)]
    assert temp_bytes[1] < temp_bytes[0] / 3
    assert np.isnan(whole(*arrays, anchor_pos)).any() and np.isfinite(chunked(*arrays, anchor_pos)).all()


def test_rope_rotates_pairs_of_halves_by_position():
    x = normal(0, BATCH, 3, HEADS, WIDTH)
    positions = np.array([[0, 1, 7], [30, 1000, 5]])
    half = WIDTH // 2
    wanted = np.zeros(x.shape)
    for b, t in np.ndindex(*positions.shape):
        for i in range(half):
            angle = positions[b, t] * 1e4 ** (-2 * i / WIDTH)
            rotated = (x[b, t, :, i] + 1j * x[b, t, :, i + half]) * np.exp(1j * angle)
            wanted[b, t, :, i], wanted[b, t, :, i + half] = rotated.real, rotated.imag
    got = jax.jit(apply_rope, static_argnums=2)(jnp.asarray(x), jnp.asarray(positions), 1e4)
    np.testing.assert_allclose(got, wanted, atol=2e-4, rtol=2e-4)
    np.testing.assert_array_equal(got[0, 0], x[0, 0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_write(dtype):
    """Each row writes at its own start and nothing else changes; the caller's cache is not touched."""
    cache = init_cache(1, BATCH, KV_HEADS, WIDTH, 10, jnp.dtype(dtype))
    assert cache.num_positions == 10
    keys, values = normal(0, BATCH, 3, KV_HEADS, WIDTH), normal(1, BATCH, 3, KV_HEADS, WIDTH)
    start = np.array([7, 0])
    written = write_layer(cache, jnp.asarray(keys), jnp.asarray(values), jnp.asarray(start))
    assert not np.asarray(cache.keys[0]).any() and not np.asarray(cache.values[0]).any()
    for row in range(BATCH):
        span = slice(start[row], start[row] + 3)
        got_keys = np.asarray(written.keys[0][row]).transpose(2, 0, 1)
        got_values = np.asarray(written.values[0][row]).transpose(1, 0, 2)
        np.testing.assert_array_equal(got_keys[span], jnp.asarray(keys[row], dtype))
        np.testing.assert_array_equal(got_values[span], jnp.asarray(values[row], dtype))
        assert not np.delete(got_keys, range(10)[span], axis=0).any()
        assert not np.delete(got_values, range(10)[span], axis=0).any()


@pytest.mark.parametrize(("num_new", "dtype"), [(1, "float32"), (5, "float32"), (5, "bfloat16")])
def test_attention_before_and_after_the_write_are_the_same(num_new, dtype):
    """Rows start at their own positions, one at 0 and one that fills the cache; behind them lies what never matters."""
    positions, start, dtype = 12, np.array([0, 3, 12 - num_new], np.int32), jnp.dtype(dtype)
    cache = init_cache(2, 3, KV_HEADS, WIDTH, positions, dtype)
    cache = jax.tree.map(lambda x: jnp.asarray(normal(7, *x.shape), dtype), cache)
    queries = jnp.asarray(normal(8, 3, num_new, HEADS, WIDTH), dtype)
    keys, values = (normal(seed, 3, num_new, KV_HEADS, WIDTH) for seed in (9, 10))
    values[1, 0, 1] = np.inf  # of another head, so that nothing else is touched
    keys, values = jnp.asarray(keys, dtype), jnp.asarray(values, dtype)
    own, start = KVCache(cache.keys[1:], cache.values[1:]), jnp.asarray(start)
    unwritten, beside = jax.jit(attend_beside)(own, queries, keys, values, start)
    written, _ = jax.jit(write_after)(unwritten, ((keys, values),), start, beside)
    results = [jax.jit(write_then_attend)(own, queries, keys, values, start), (written, beside)]
    tolerance = TOLERANCE if dtype == jnp.float32 else {"atol": 0.03, "rtol": 0.03}
    for got, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got.astype(jnp.float32), expected.astype(jnp.float32), **tolerance)

    written, mixed = attend_cached(own, queries, keys, values, start)
    whole_cache = cache.with_layer(1, written)
    np.testing.assert_array_equal(whole_cache.keys[0], cache.keys[0])
    np.testing.assert_array_equal(whole_cache.layer(1).values[0], written.values[0])
    final, _ = write_deferred(whole_cache, [(keys, values)] * 2, start, mixed.reshape(3, num_new, -1))
    np.testing.assert_array_equal(final.keys[1], results[0][0].keys[0])
    np.testing.assert_array_equal(final.values[1], results[0][0].values[0])
    np.testing.assert_allclose(mixed.astype(jnp.float32), results[0][1].astype(jnp.float32), **tolerance)
    mask = np.arange(positions) <= (start[:, None] + np.arange(num_new))[..., None]
    whole = [np.asarray(x, np.float32) for x in (results[1][0].keys[0].transpose(0, 3, 1, 2),
                                                 results[1][0].values[0].transpose(0, 2, 1, 3))]  # fmt: skip
    by_hand = naive_attend(np.asarray(queries, np.float32), *whole, mask)
    np.testing.assert_allclose(results[1][1].astype(jnp.float32), by_hand, **tolerance)
