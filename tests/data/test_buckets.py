"""Length buckets: every row once an epoch, static shapes, and a batch that only its step decides."""

import numpy as np
import pytest

from domino_jax.data.buckets import LengthBuckets
from domino_jax.records import ChatRow

ROWS = [ChatRow([i + 4] * n, [0] * (n - 1) + [1]) for i, n in enumerate([3, 5, 8, 9, 12, 16, 2, 8, 15, 40])]


def test_an_epoch_shows_every_row_that_fits():
    buckets = LengthBuckets(ROWS, (8, 16), 32, seed=0)
    assert buckets.num_dropped == 1
    batches = [buckets.batch(step) for step in range(buckets.steps_per_epoch)]
    assert {batch.input_ids.shape for batch in batches} == {(4, 8), (2, 16)}
    assert {int(row[0]) for batch in batches for row in batch.input_ids} == {i + 4 for i in range(9)}
    for batch in batches:
        assert (np.count_nonzero(batch.input_ids, axis=1) == batch.lengths).all()
        assert (batch.loss_mask.sum(axis=1) == 1).all()


def test_the_step_decides():
    first, again = (LengthBuckets(ROWS, (8, 16), 32, seed=1) for _ in range(2))
    for step in (0, 3, 17):
        assert (first.batch(step).input_ids == again.batch(step).input_ids).all()


def test_impossible_sizes_are_named():
    with pytest.raises(ValueError, match="tokens_per_batch is 8"):
        LengthBuckets(ROWS, (8, 16), 8, seed=0)
    with pytest.raises(ValueError, match="none of 1 rows"):
        LengthBuckets(ROWS[-1:], (8, 16), 32, seed=0)
