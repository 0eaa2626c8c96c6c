"""Rows of a feature cache as training reads them: a batch at a time, and none that is damaged.

In: the chats, their cache, and what to do about damage. Out: rows under the numbers that `ChatSource` gives them. Of
several processes each reads its own rows of a batch; what one of them finds damaged is lost for all (`share`). Knows
neither the target that computes a shard again nor how processes talk.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from domino_jax.data.feature_cache import FEATURE_TYPES, DamagedShardError, FeatureCache, FeatureCacheError
from domino_jax.data.pipeline import ChatSource
from domino_jax.records import ChatRow

Share = Callable[[list[Any]], list[list[Any]]]
"""Return the lists of JSON values that all processes call it with."""


class _Loss(NamedTuple):
    """A row that was found damaged, ready for JSON; `is_whole_shard`: its shard with it."""

    row: int
    is_whole_shard: bool
    reason: str


class FeatureSource:
    """Rows with features, for `pipeline.build_dataset`.

    Nothing is ever trained on a damaged record. With `rebuild` its shard is computed again on the spot. Without, the
    row keeps its place and its tokens but teaches nothing (loss mask 0): order and steps stay those of the whole data,
    and a saved position stays valid. A shard of which no record can be read is lost whole, from the batch on in which
    that is found.

    Attributes:
        index: of the rows, lost ones included.
    """

    def __init__(
        self,
        chats: ChatSource,
        cache: FeatureCache,
        with_hidden: bool,
        lost_shards: Iterable[int],
        rebuild: Callable[[int], None] | None,
        say: Callable[[str], None],
        share: Share | None = None,
    ) -> None:
        """Read rows from `cache`; those of `lost_shards` are known to be lost.

        With `share` every process reads a part of each batch, and all lose what any of them finds damaged.
        """
        self.index = chats.index
        self._chats, self._cache, self._with_hidden = chats, cache, with_hidden
        self._lost_shards, self._lost_rows = set(lost_shards), set[int]()
        self._rebuild, self._say, self._share = rebuild, say, share

    def __len__(self) -> int:
        """Return the number of usable rows, lost ones included."""
        return len(self._chats)

    def __getitem__(self, row: int) -> ChatRow:
        """Return one row, as `read` does."""
        return self.read([row])[0]

    def read(self, rows: Sequence[int]) -> list[ChatRow]:
        """Return rows with their features, or without anything to learn where they are lost.

        Raises:
            FeatureCacheError: a shard that was computed again is damaged again, or cannot be written.
        """
        whole, found = dict[int, ChatRow](), list[_Loss]()
        for row in rows:
            if row in whole or self._is_lost(row):
                continue
            try:
                whole[row] = self._read_whole(row)
            except DamagedShardError as damage:
                found.append(_Loss(row, damage.is_whole_shard, str(damage)))
                if not self._share:
                    self._lose(found[-1])
        if self._share:
            for values in chain.from_iterable(self._share(found)):
                self._lose(_Loss(*values))
        return [self._blank(row) if self._is_lost(row) else whole[row] for row in rows]

    def _is_lost(self, row: int) -> bool:
        return row in self._lost_rows or self._cache.shard_of(row) in self._lost_shards

    def _read_whole(self, row: int) -> ChatRow:
        """Return a row, from a shard that is computed again if need be.

        Raises:
            DamagedShardError: it is damaged and nothing is computed again.
        """
        try:
            return self._strip(self._cache.read(row))
        except DamagedShardError as damage:
            if self._rebuild is None:
                raise
            self._say(f"{damage}; computing this shard again")
            self._rebuild(damage.shard)
        try:
            return self._strip(self._cache.read(row))
        except DamagedShardError as damage:
            raise FeatureCacheError(
                f"{damage}, right after it was written again: the disk may be failing. Give another "
                "--config.data.feature_cache; training goes on from its last checkpoint"
            ) from damage

    def _strip(self, chat: ChatRow) -> ChatRow:
        return chat if self._with_hidden else replace(chat, last_hidden=None)

    def _lose(self, loss: _Loss) -> None:
        if self._is_lost(loss.row):
            return
        shard = self._cache.shard_of(loss.row)
        if loss.is_whole_shard:
            self._lost_shards.add(shard)
        else:
            self._lost_rows.add(loss.row)
        num_lost = len(self._cache.rows_of(shard)) if loss.is_whole_shard else 1
        self._say(f"{loss.reason}; {num_lost} of {len(self)} rows are skipped from now on")

    def _blank(self, row: int) -> ChatRow:
        chat, shape = self._chats[row], self._cache.shape
        dtype, num_tokens = FEATURE_TYPES[shape.dtype], len(chat.ids)
        features = np.zeros((num_tokens, shape.feature_width), dtype)
        last_hidden = np.zeros((num_tokens, shape.hidden_width), dtype) if self._with_hidden else None
        return ChatRow(chat.ids, [0] * num_tokens, chat.line_no, features, last_hidden)
