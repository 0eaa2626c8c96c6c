"""Shards of features: what comes back, what is refused, and what damage leads to."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import grain
import numpy as np
import pytest

from domino_jax.data.feature_cache import (
    INDEX_FILE,
    DamagedShardError,
    FeatureCache,
    FeatureCacheError,
    FeatureShape,
    plan_shards,
    read_index,
)
from tests.data.small_cache import LENGTHS, SHAPE, assert_same, damage_file, fill, make_cache, make_row


@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, hidden_width=0), replace(SHAPE, dtype="bfloat16")])
def test_rows_come_back_bit_for_bit_in_any_order(tmp_path, shape):
    fill(make_cache(tmp_path, shape, shard_bytes=300))
    cache = make_cache(tmp_path, shape, shard_bytes=300)
    assert cache.num_shards > 2
    for row in (6, 0, 3, 3, 1, 5, 2, 4):
        assert_same(cache.read(row), make_row(row, LENGTHS[row], shape))


def test_grain_reads_the_shards(tmp_path):
    cache = fill(make_cache(tmp_path))
    source = grain.sources.ArrayRecordDataSource([str(cache.path(shard)) for shard in range(cache.num_shards)])
    records = list(grain.MapDataset.source(source).shuffle(1))
    assert len(records) == len(LENGTHS)
    assert sorted(map(len, records)) == sorted(48 + n * SHAPE.bytes_per_token for n in LENGTHS)


def test_shards_hold_whole_rows_up_to_their_size():
    shape = FeatureShape(10, 0, "float32")  # 45 bytes a token
    assert plan_shards([2, 2, 2, 9, 1], shape, 200) == [0, 2, 3, 4]
    assert plan_shards([1] * 1000, shape) == [0]


@pytest.mark.parametrize("shape", [FeatureShape(300, 100, "float32"), FeatureShape(64, 0, "bfloat16")])
def test_the_need_is_what_is_written(tmp_path, shape):
    lengths = np.random.default_rng(0).integers(3, 60, 400).tolist()
    cache = fill(make_cache(tmp_path, shape, lengths, shard_bytes=8_000_000), lengths)
    cache.write_index({}, is_complete=True)
    need = sum(map(cache.expected_bytes, range(cache.num_shards)))
    assert need == pytest.approx(sum(path.stat().st_size for path in tmp_path.iterdir()), rel=0.02)


@pytest.mark.parametrize("how", ["truncated", "emptied", "deleted", "flipped", "flipped end"])
def test_damage_is_named(tmp_path, how):
    cache = fill(make_cache(tmp_path))
    cache.close()
    damage_file(cache.path(1), how)
    rows, intact = cache.rows_of(1), [row for row in range(len(LENGTHS)) if row not in cache.rows_of(1)]
    with pytest.raises(DamagedShardError, match=rf"{cache.path(1).name} is damaged") as caught:
        cache.verify(1)
    assert caught.value.shard == 1 and caught.value.is_whole_shard == (how != "flipped")
    for row in intact:
        assert_same(cache.read(row), make_row(row, LENGTHS[row]))
    if how != "flipped":
        assert list(cache.find_damage()) == [1]
        with pytest.raises(DamagedShardError):
            cache.read(rows[-1])


def test_a_checksum_of_our_own_guards_what_array_record_takes_for_whole(tmp_path):
    """A record whose bytes changed before ArrayRecord hashed them, as by bad memory."""
    cache = make_cache(tmp_path)
    record = bytearray(cache._encode(make_row(0, 5), 0))
    assert_same(cache._decode(bytes(record), 0, 0), make_row(0, 5))
    for place in (0, 5, 9, 20, 60, len(record) - 1):
        wrong = bytearray(record)
        wrong[place] ^= 1
        with pytest.raises(DamagedShardError, match="row 0"):
            cache._decode(bytes(wrong), 0, 0)


def test_shards_of_another_cache_or_place_are_not_taken(tmp_path):
    lengths = [4] * 6
    ours, other = (make_cache(tmp_path / name, lengths=lengths, shard_bytes=180) for name in ("ours", "other"))
    other = make_cache(tmp_path / "other", lengths=lengths, shard_bytes=180, weights="new")
    for cache in (ours, other):
        cache.directory.mkdir()
        fill(cache, lengths)
        cache.close()
    other.path(0).replace(ours.path(0))
    ours.path(2).replace(ours.path(1))
    damage = ours.find_damage()
    assert "made from something else" in damage[0] and "made from something else" in damage[1]
    assert damage[2] == "missing"


def test_a_row_without_its_arrays_is_not_written(tmp_path):
    cache = make_cache(tmp_path)
    rows = [make_row(row, LENGTHS[row]) for row in cache.rows_of(0)]
    with pytest.raises(ValueError, match="last_hidden of row 0: None, the cache holds float32"):
        cache.write_shard(0, [replace(rows[0], last_hidden=None), *rows[1:]])
    with pytest.raises(ValueError, match="features of row 0: float64"):
        cache.write_shard(0, [replace(rows[0], features=rows[0].features.astype(np.float64)), *rows[1:]])
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_cannot_be_written_is_told_and_leaves_nothing(tmp_path):
    """The process may not write files of more than 100 kB, as on a full disk."""
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
import numpy as np
from domino_jax.data.feature_cache import *
from domino_jax.records import ChatRow
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
cache = FeatureCache(Path({str(tmp_path)!r}), [100], FeatureShape(1000, 0, "float32"), {{}}, [0])
cache.write_shard(0, [ChatRow([1] * 100, [1] * 100, 1, np.ones((100, 1000), np.float32))])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "FeatureCacheError" in result.stderr and "cannot be written: " in result.stderr, result.stderr
    assert "File too large" in result.stderr and "free disk space" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_index_comes_back_or_is_refused(tmp_path):
    assert read_index(tmp_path) is None
    cache = make_cache(tmp_path)
    cache.write_index({"target": "there"}, is_complete=False)
    index = read_index(tmp_path)
    assert index["identity"] == {"rows": "abc"} and index["shard_starts"] == cache.shard_starts
    assert index["made_with"] == {"target": "there"} and index["is_complete"] is False
    for text in ("{", "[]", "{}"):
        (tmp_path / INDEX_FILE).write_text(text)
        with pytest.raises(FeatureCacheError, match=r"index\.json cannot be read"):
            read_index(tmp_path)
    (tmp_path / INDEX_FILE).write_text('{"format": 9, "identity": {}, "shard_starts": [], "is_complete": true}')
    with pytest.raises(FeatureCacheError, match="has format 9, this version reads 1"):
        read_index(tmp_path)
    with pytest.raises(FeatureCacheError, match=r"do not cover rows 0 \.\. 6"):
        FeatureCache(tmp_path, LENGTHS, SHAPE, {}, [0, 9])


def test_the_lock_ends_with_the_process_that_holds_it(tmp_path):
    code = f"""
import signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from domino_jax.data.feature_cache import *
with FeatureCache(Path({str(tmp_path)!r}), [1], FeatureShape(1, 0, "float32"), {{}}, [0]).lock(print):
    print("held", flush=True)
    signal.pause()
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    said = []

    def say_and_kill(text: str) -> None:
        said.append(text)
        os.kill(holder.pid, signal.SIGKILL)

    with make_cache(tmp_path).lock(say_and_kill):
        assert len(said) == 1 and re.search("process is filling this feature cache; waiting|process \\d+ on ", said[0])
    holder.stdout.close()
    holder.wait()


def test_many_shards_are_not_open_at_once(tmp_path):
    lengths = [2] * 100
    cache = fill(make_cache(tmp_path, lengths=lengths, shard_bytes=1), lengths)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    for row in range(100):
        assert_same(cache.read(row), make_row(row, 2))
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) - before <= 70
