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
    FEATURE_TYPES,
    INDEX_FILE,
    DamagedShardError,
    FeatureCache,
    FeatureCacheError,
    FeatureShape,
    FeatureSource,
    plan_shards,
    read_index,
)
from domino_jax.data.pipeline import ChatSource
from domino_jax.data.responses import write_chats
from domino_jax.data.tokenizer import train_tokenizer
from domino_jax.records import ChatRow
from domino_jax.run_config import DataConfig

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


class Mended:
    """A source of chats with a cache of three shards beside it."""

    def __init__(self, tmp_path: Path) -> None:
        chats = [
            [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"number {i}"}] for i in range(9)
        ]
        write_chats(tmp_path / "chats.jsonl", chats)
        tokenizer = train_tokenizer(["what is number one of all numbers"] * 5, 300)
        self.chats = ChatSource(str(tmp_path / "chats.jsonl"), tokenizer, DataConfig(max_length=64), 300)
        self.lengths, self.said, self.rebuilt = list(self.chats.index.lengths), [], []
        bytes_per_shard = 3 * max(self.lengths) * SHAPE.bytes_per_token
        self.cache = make_cache(tmp_path / "cache", lengths=self.lengths, shard_bytes=bytes_per_shard)
        self.cache.directory.mkdir()
        for shard in range(self.cache.num_shards):
            self.write(shard)
        self.cache.close()

    def write(self, shard: int) -> None:
        self.cache.write_shard(shard, [self.row(row) for row in self.cache.rows_of(shard)])

    def row(self, row: int) -> ChatRow:
        made = make_row(row, self.lengths[row])
        return replace(self.chats[row], features=made.features, last_hidden=made.last_hidden)

    def rebuild(self, shard: int) -> None:
        self.rebuilt.append(shard)
        self.cache.remove(shard)
        self.write(shard)

    def source(self, with_hidden=True, lost=(), rebuild=None) -> FeatureSource:
        return FeatureSource(self.chats, self.cache, with_hidden, lost, rebuild, self.said.append)


@pytest.fixture
def mended(tmp_path) -> Mended:
    return Mended(tmp_path)


def test_a_source_gives_the_rows_of_the_chats(mended):
    source, bare = mended.source(), mended.source(with_hidden=False)
    assert len(source) == 9 and source.index is mended.chats.index and mended.cache.num_shards == 3
    for row in range(9):
        assert_same(source[row], mended.row(row))
        assert bare[row].last_hidden is None
    assert mended.said == []


@pytest.mark.parametrize("how", ["truncated", "deleted", "flipped"])
def test_a_shard_found_damaged_while_reading_is_written_again(mended, how):
    source = mended.source(rebuild=mended.rebuild)
    damage_file(mended.cache.path(1), how)
    for row in range(9):
        assert_same(source[row], mended.row(row))
    assert mended.rebuilt == [1]
    assert len(mended.said) == 1 and mended.cache.path(1).name in mended.said[0]


@pytest.mark.parametrize("how, num_lost", [("truncated", 3), ("deleted", 3), ("flipped", 1)])
def test_or_its_rows_keep_their_place_and_teach_nothing(mended, how, num_lost):
    source = mended.source()
    damage_file(mended.cache.path(1), how)
    lost = []
    for row in [*range(9), *range(9)]:
        chat, whole = source[row], mended.row(row)
        assert list(chat.ids) == list(whole.ids) and chat.line_no == whole.line_no
        if any(chat.loss_mask):
            assert_same(chat, whole)
        else:
            lost.append(row)
            assert not chat.features.any() and chat.features.shape == whole.features.shape
            assert not chat.last_hidden.any() and chat.last_hidden.shape == whole.last_hidden.shape
    assert len(lost) == 2 * num_lost and set(lost) <= set(mended.cache.rows_of(1))
    assert len(mended.said) == 1 and f"{num_lost} of 9 rows are skipped from now on" in mended.said[0]


def test_a_disk_that_damages_again_ends_the_run(mended):
    def rebuild(shard: int) -> None:
        mended.rebuild(shard)
        mended.cache.close()
        damage_file(mended.cache.path(shard), "flipped")

    damage_file(mended.cache.path(2), "flipped")
    source = mended.source(rebuild=rebuild)
    with pytest.raises(FeatureCacheError, match="right after it was written again: the disk may be failing"):
        [source[row] for row in range(9)]
