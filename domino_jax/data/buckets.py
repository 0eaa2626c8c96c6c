"""Batches of similar lengths, for training a small target on short chats without paying for padding.

In: tokenised chats. Out: `TrainBatch`es of a few fixed widths with about the same number of tokens each,
so that a jitted step compiles once a width. The batch of a step is a function of (seed, step): a stopped run goes on
where it was without stored positions. Knows nothing about tokenizers or models.
"""

from collections.abc import Sequence

import numpy as np

from domino_jax.data.pipeline import pad_batch
from domino_jax.records import ChatRow, TrainBatch


class LengthBuckets:
    """Rows sorted by length into widths; `batch(step)` draws one.

    Attributes:
        num_dropped: rows longer than the widest bucket.
        steps_per_epoch: batches in which every kept row appears about once.
    """

    def __init__(self, rows: Sequence[ChatRow], widths: Sequence[int], tokens_per_batch: int, seed: int) -> None:
        """Sort `rows`; a batch of width w has `tokens_per_batch // w` rows.

        Raises:
            ValueError: no row fits, or a batch has no room for a row of the widest bucket.
        """
        if tokens_per_batch < max(widths):
            raise ValueError(f"tokens_per_batch is {tokens_per_batch}; it must be at least the width {max(widths)}")
        self._seed = seed
        self._buckets: list[tuple[int, int, list[ChatRow]]] = []
        shortest = 0
        for width in sorted(widths):
            inside = [row for row in rows if shortest < len(row.ids) <= width]
            shortest = width
            if inside:
                self._buckets.append((width, tokens_per_batch // width, inside))
        self.num_dropped = sum(len(row.ids) > shortest for row in rows)
        if not self._buckets:
            raise ValueError(f"none of {len(rows)} rows has 1 to {shortest} tokens; raise max_length")
        self._num_batches = [-(-len(inside) // size) for _, size, inside in self._buckets]
        self.steps_per_epoch = sum(self._num_batches)

    def batch(self, step: int) -> TrainBatch:
        """Return the batch of optimizer step `step`; every epoch has an order of its own."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = np.random.default_rng((self._seed, epoch))
        order = np.repeat(np.arange(len(self._buckets)), self._num_batches)
        generator.shuffle(order)
        chosen = order[place]
        turn = int(np.sum(order[:place] == chosen))
        width, size, inside = self._buckets[chosen]
        shuffled = np.random.default_rng((self._seed, epoch, int(chosen))).permutation(len(inside))
        rows = [inside[i] for i in np.resize(shuffled[turn * size : (turn + 1) * size], size)]
        return pad_batch(rows, width)
