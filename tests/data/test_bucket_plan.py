"""Every row once an epoch whatever its width, and batches that only their number decides."""

import sys

import numpy as np
import pytest

from domino_jax.data.bucket_plan import BucketPlan

LENGTHS = np.random.default_rng(0).choice([3, 8, 9, 16, 30, 40], size=101, p=[0.3, 0.2, 0.2, 0.2, 0.08, 0.02])
WIDTHS = (8, 16, 40)
BATCH = 4


def count_rows(batches) -> np.ndarray:
    return np.bincount(np.concatenate([batch.rows for batch in batches]), minlength=len(LENGTHS))


@pytest.mark.parametrize("num_epochs", [1, 2, 3.5, 4])
def test_every_row_once_an_epoch(num_epochs):
    """4 epochs of 101 rows fill 101 batches of 4 exactly; otherwise fewer than a batch is left over, and said."""
    plan = BucketPlan(LENGTHS, WIDTHS, BATCH, 0, num_epochs)
    batches = [plan[i] for i in range(len(plan))]
    assert len(plan) == plan.num_batches == round(num_epochs * 101) // BATCH
    assert plan.num_left == round(num_epochs * 101) - BATCH * len(plan) < BATCH
    counts = count_rows(batches)
    assert counts.max() <= np.ceil(num_epochs)
    assert np.maximum(np.floor(num_epochs) - counts, 0).sum() <= plan.num_left
    if num_epochs == 4:
        assert (counts == 4).all()


def test_a_row_comes_again_only_when_all_of_its_width_have_come():
    plan = BucketPlan(LENGTHS, WIDTHS, BATCH, 0, None)
    for width, shortest in zip(WIDTHS, (0, *WIDTHS), strict=False):
        inside = np.flatnonzero((shortest < LENGTHS) & (width >= LENGTHS))
        came = np.concatenate([b.rows for b in (plan[i] for i in range(300)) if b.width == width])
        epochs = len(came) // len(inside)
        assert epochs >= 5
        for epoch in came[: epochs * len(inside)].reshape(epochs, -1):
            np.testing.assert_array_equal(np.sort(epoch), inside)


def test_epochs_run_at_the_same_pace_in_every_width():
    """After any number of batches no width is ahead of another by more than what its queue holds."""
    plan = BucketPlan(LENGTHS, WIDTHS, BATCH, 0, None)
    taken, sizes = np.zeros(len(WIDTHS)), np.array(plan.num_rows_by_width)
    for number in range(300):
        taken[plan.widths.index(plan[number].width)] += BATCH
        if (number + 1) * BATCH % 101 < BATCH:  # near the end of an epoch
            np.testing.assert_array_less(np.abs(taken - (number + 1) * BATCH / 101 * sizes), 4 * BATCH)


def test_widths():
    plan = BucketPlan(LENGTHS, WIDTHS, BATCH, 0, 3)
    assert plan.widths == WIDTHS and sum(plan.num_rows_by_width) == 101
    batches = [plan[i] for i in range(len(plan))]
    fitting = np.array(WIDTHS)[np.searchsorted(WIDTHS, LENGTHS)]
    mixed = [i for i, b in enumerate(batches) if len(set(fitting[b.rows])) > 1]
    assert all(b.width == fitting[b.rows].max() for b in batches)
    assert len(mixed) <= len(WIDTHS) - 1 and all(i >= len(plan) - len(WIDTHS) for i in mixed)
    assert BucketPlan(LENGTHS, (*WIDTHS, 100), BATCH, 0, 3).widths == WIDTHS
    with pytest.raises(ValueError, match="up to 40 tokens do not fit"):
        BucketPlan(LENGTHS, (8, 16), BATCH, 0, 3)


def test_only_the_number_decides():
    plan, other = BucketPlan(LENGTHS, WIDTHS, BATCH, 5, 3), BucketPlan(LENGTHS, WIDTHS, BATCH, 5, 3)
    numbers = np.random.default_rng(1).permutation(len(plan))
    forwards = [plan[i] for i in range(len(plan))]
    for i in numbers.tolist():
        assert other[i].width == forwards[i].width
        np.testing.assert_array_equal(other[i].rows, forwards[i].rows)
    changed = [BucketPlan(LENGTHS, WIDTHS, BATCH, 6, 3)[i].rows.tolist() for i in range(len(plan))]
    assert changed != [b.rows.tolist() for b in forwards]
    with pytest.raises(IndexError):
        plan[len(plan)]


def test_a_width_rarer_than_a_batch_and_a_stream_without_end():
    """Its queue fills over several epochs: the batch holds the row more than once, from successive epochs."""
    plan = BucketPlan([5] * 11 + [20], (8, 32), BATCH, 0, None)
    assert len(plan) == sys.maxsize and plan.num_batches is None
    batches = [plan[i] for i in range(24)]  # 96 rows: 8 epochs of 12
    wide = [i for i, b in enumerate(batches) if b.width == 32]
    assert len(wide) == 2 and all(set(batches[i].rows) == {11} for i in wide)
    assert plan[10**6].width in (8, 32)


def test_a_plan_of_many_rows_is_small():
    lengths = np.random.default_rng(0).integers(1, 3073, 200_000)
    plan = BucketPlan(lengths, (512, 1024, 2048, 3072), 32, 0, 6)
    assert len(plan) == 37_500
    batch = plan[37_000]
    assert len(batch.rows) == 32 and lengths[batch.rows].max() <= batch.width
    held = [v for v in vars(plan).values() if isinstance(v, np.ndarray)] + plan._rows
    assert sum(v.nbytes for v in held) < 8 * len(lengths)
