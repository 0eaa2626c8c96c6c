"""A feature cache of a few rows, and damage to its files."""

from pathlib import Path

import numpy as np

from domino_jax.data.feature_cache import FEATURE_TYPES, FeatureCache, FeatureShape, plan_shards
from domino_jax.records import ChatRow

LENGTHS = [5, 9, 3, 12, 7, 4, 8]
SHAPE = FeatureShape(feature_width=6, hidden_width=2, dtype="float32")


def make_row(row: int, length: int, shape: FeatureShape = SHAPE) -> ChatRow:
    generator = np.random.default_rng(row)
    dtype = FEATURE_TYPES[shape.dtype]

    def draw(width: int) -> np.ndarray | None:
        return generator.standard_normal((length, width), np.float32).astype(dtype) if width else None

    ids, mask = generator.integers(0, 300, length).tolist(), (np.arange(length) > 1).astype(int).tolist()
    return ChatRow(ids, mask, row + 1, draw(shape.feature_width), draw(shape.hidden_width))


def make_cache(directory: Path, shape: FeatureShape = SHAPE, lengths=LENGTHS, shard_bytes=500, **identity):
    return FeatureCache(directory, lengths, shape, {"rows": "abc"} | identity, plan_shards(lengths, shape, shard_bytes))


def fill(cache: FeatureCache, lengths=LENGTHS) -> FeatureCache:
    for shard in range(cache.num_shards):
        cache.write_shard(shard, [make_row(row, lengths[row], cache.shape) for row in cache.rows_of(shard)])
    return cache


def assert_same(left: ChatRow, right: ChatRow) -> None:
    assert (list(left.ids), list(left.loss_mask), left.line_no) == (
        list(right.ids),
        list(right.loss_mask),
        right.line_no,
    )
    for name in ("features", "last_hidden"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def damage_file(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "deleted":
        path.unlink()
    else:
        content[400 if how == "flipped" else -(2**16) + 10] ^= 4  # a record; the block that says where records are
        path.write_bytes(content)
