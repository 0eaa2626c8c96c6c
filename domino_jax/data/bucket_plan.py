"""Which rows make up which batch when rows of similar length are batched together.

In: the lengths of the rows, the widths batches may have, a seed. Out: for every batch number its width and its rows, a
pure function that is computed where it is asked for: nothing is stored per batch, a stream may have no end.

Every epoch shuffles its rows into one queue a width; a queue that holds a batch's rows gives a batch. Rows that fill
none wait for the next epoch, and after the last one the rows still waiting are batched across widths, the longest
first; fewer than a batch of the shortest ones is left over. Knows nothing about files, tokens or Grain.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class PlannedBatch:
    """One batch before its rows are read.

    Attributes:
        width: tokens every row is padded to.
        rows: numbers of its rows.
    """

    width: int
    rows: np.ndarray


class BucketPlan(Sequence[PlannedBatch]):
    """The batches of a whole training run; `plan[n]` is batch n.

    Attributes:
        widths: those of `widths` that some row needs.
        num_rows_by_width: rows of the file in each of them.
        num_batches: batches of all epochs; None when there is no end.
        num_left: rows of all epochs that no batch holds, fewer than a batch.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        widths: Sequence[int],
        batch_size: int,
        seed: int,
        num_epochs: int | float | None,
    ) -> None:
        """Sort rows of `lengths` tokens into `widths`, each batch of `batch_size` rows; `num_epochs` None: no end.

        Raises:
            ValueError: there is no row, or a row is longer than the widest bucket.
        """
        lengths = np.asarray(lengths)
        if len(lengths) == 0 or lengths.max() > max(widths):
            raise ValueError(f"{len(lengths)} rows of up to {lengths.max(initial=0)} tokens do not fit widths {widths}")
        fitting = np.sort(np.asarray(widths))
        used, bucket_of = np.unique(np.searchsorted(fitting, lengths), return_inverse=True)
        self.widths = tuple(fitting[used].tolist())
        self._bucket_of = bucket_of.astype(np.int16)
        self._rows = [np.flatnonzero(bucket_of == i).astype(np.int32) for i in range(len(used))]
        self._sizes = np.array([len(rows) for rows in self._rows])
        self.num_rows_by_width = tuple(self._sizes.tolist())
        self._batch_size, self._seed = batch_size, seed
        # A batch lies in one epoch or in two neighbours; only a rare width reaches back further.
        self._find_full_queues = lru_cache(maxsize=2)(self._find_full_queues)
        self._shuffle_bucket = lru_cache(maxsize=2 * len(used))(self._shuffle_bucket)
        self.num_batches, self.num_left = None, 0
        if num_epochs is not None:
            num_all = round(num_epochs * len(lengths))
            epochs, rest = divmod(num_all, len(lengths))
            last = np.bincount(self._shuffle_buckets(epochs)[:rest], minlength=len(used))
            self._num_taken = epochs * self._sizes + last
            self.num_batches, self.num_left = divmod(num_all, batch_size)

    def __len__(self) -> int:
        """Return the number of batches, the largest possible one when there is no end."""
        return sys.maxsize if self.num_batches is None else self.num_batches

    def __getitem__(self, number: int) -> PlannedBatch:
        """Return batch `number`.

        Raises:
            IndexError: the plan has fewer batches.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        if self.num_batches is not None:
            num_full = int(np.sum(self._num_taken // self._batch_size))
            if number >= num_full:
                return self._mix_left_over(number - num_full)
        # Waiting rows put a batch off, so it may lie in a later epoch than its number says, never in an earlier one.
        epoch = number * self._batch_size // len(self._bucket_of)
        while self._count_before(epoch + 1) <= number:
            epoch += 1
        buckets, turns = self._find_full_queues(epoch)
        at = number - self._count_before(epoch)
        bucket, turn = int(buckets[at]), int(turns[at])
        rows = self._take(bucket, turn * self._batch_size, (turn + 1) * self._batch_size)
        return PlannedBatch(self.widths[bucket], rows)

    def _count_before(self, epoch: int) -> int:
        """Return the number of batches that are full before an epoch begins."""
        return int(np.sum(epoch * self._sizes // self._batch_size))

    def _shuffle_buckets(self, epoch: int) -> np.ndarray:
        """Return the buckets in the order in which an epoch's rows come."""
        return np.random.default_rng((self._seed, epoch, 0)).permutation(self._bucket_of)

    def _shuffle_bucket(self, bucket: int, epoch: int) -> np.ndarray:
        """Return a bucket's rows in the order in which an epoch takes them."""
        return np.random.default_rng((self._seed, epoch, 1 + bucket)).permutation(self._rows[bucket])

    def _find_full_queues(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return bucket and turn (the bucket's how manieth batch) of all batches that an epoch fills, in order."""
        order, size = self._shuffle_buckets(epoch), self._batch_size
        ends, buckets, turns = [], [], []
        for bucket, num_rows in enumerate(self._sizes.tolist()):
            num_full, num_waiting = divmod(epoch * num_rows, size)
            filled = np.flatnonzero(order == bucket)[size - 1 - num_waiting :: size]
            ends.append(filled)
            buckets.append(np.full(len(filled), bucket))
            turns.append(num_full + np.arange(len(filled)))
        by_time = np.argsort(np.concatenate(ends))
        return np.concatenate(buckets)[by_time], np.concatenate(turns)[by_time]

    def _take(self, bucket: int, start: int, stop: int) -> np.ndarray:
        """Return rows `start .. stop` of a bucket, counted on over the epochs."""
        epochs, places = np.divmod(np.arange(start, stop), self._sizes[bucket])
        taken = np.empty(stop - start, np.int32)
        for epoch in np.unique(epochs).tolist():
            taken[epochs == epoch] = self._shuffle_bucket(bucket, epoch)[places[epochs == epoch]]
        return taken

    def _mix_left_over(self, number: int) -> PlannedBatch:
        """Return batch `number` of the rows that wait when the last epoch ends."""
        waiting, widths = [], []
        for bucket in reversed(range(len(self.widths))):
            stop = int(self._num_taken[bucket])
            waiting.append(self._take(bucket, stop - stop % self._batch_size, stop))
            widths += [self.widths[bucket]] * len(waiting[-1])
        first = number * self._batch_size
        return PlannedBatch(widths[first], np.concatenate(waiting)[first : first + self._batch_size])
