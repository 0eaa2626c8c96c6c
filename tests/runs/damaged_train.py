"""`train.py` in which one process, FAILS_IN, cannot read shard LOST_SHARD of the features from batch LOST_FROM on."""

import os
import sys

import jax

from domino_jax.data.feature_cache import DamagedShardError, FeatureCache
from domino_jax.data.feature_source import FeatureSource
from train import main

FAILS_IN, LOST_SHARD, LOST_FROM = (int(os.environ[name]) for name in ("FAILS_IN", "LOST_SHARD", "LOST_FROM"))
batches = []


def read_rows(self, rows):
    batches.append(rows)
    return source_read(self, rows)


def read_row(self, row):
    shard = self.shard_of(row)
    if jax.process_index() == FAILS_IN and shard == LOST_SHARD and len(batches) >= LOST_FROM:
        raise DamagedShardError(self.path(shard), shard, "stale file handle", is_whole_shard=True)
    return cache_read(self, row)


if __name__ == "__main__":
    source_read, FeatureSource.read = FeatureSource.read, read_rows
    cache_read, FeatureCache.read = FeatureCache.read, read_row
    sys.exit(main(sys.argv[1:]))
