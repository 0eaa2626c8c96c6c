"""Rows of a feature cache as training reads them: mended, or left out, by one process or by several alike."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from domino_jax.data.feature_cache import DamagedShardError, FeatureCache, FeatureCacheError
from domino_jax.data.feature_source import FeatureSource
from domino_jax.data.pipeline import ChatSource
from domino_jax.data.responses import write_chats
from domino_jax.data.tokenizer import train_tokenizer
from domino_jax.records import ChatRow
from domino_jax.run_config import DataConfig
from tests.data.small_cache import SHAPE, assert_same, damage_file, make_cache, make_row


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
        self.directory = tmp_path / "cache"
        self.cache = self.open_cache()
        self.directory.mkdir()
        for shard in range(self.cache.num_shards):
            self.write(shard)
        self.cache.close()

    def open_cache(self) -> FeatureCache:
        bytes_per_shard = 3 * max(self.lengths) * SHAPE.bytes_per_token
        return make_cache(self.directory, lengths=self.lengths, shard_bytes=bytes_per_shard)

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


class Processes:
    """Two readers of the same batches, each with some rows of them, that share what they find as processes do."""

    def __init__(self, mended):
        self.said = [[], []]
        self._found, self._barrier = [None, None], threading.Barrier(2)
        self.caches = [mended.open_cache() for _ in range(2)]
        self.sources = [
            FeatureSource(
                mended.chats,
                self.caches[number],
                True,
                (),
                None,
                self.said[number].append,
                lambda found, number=number: self._share(number, found),
            )
            for number in range(2)
        ]

    def _share(self, number, found):
        self._found[number] = found
        self._barrier.wait(10)
        everyone = list(self._found)
        self._barrier.wait(10)
        return everyone

    def read(self, *rows):
        """Return for each process which of its rows teach something."""
        with ThreadPoolExecutor(2) as threads:
            batches = list(threads.map(lambda source, rows: source.read(rows), self.sources, rows))
        return [[any(chat.loss_mask) for chat in batch] for batch in batches]


def fail_in(cache, monkeypatch, damage):
    """Have one process fail to read rows, as where its own mount of the disk fails."""
    read = cache.read

    def read_or_fail(row):
        if row in damage:
            raise DamagedShardError(cache.path(cache.shard_of(row)), cache.shard_of(row), "no mount", damage[row])
        return read(row)

    monkeypatch.setattr(cache, "read", read_or_fail)


def test_what_one_process_finds_damaged_is_lost_for_all(mended, monkeypatch):
    both = Processes(mended)
    fail_in(both.caches[1], monkeypatch, {4: False, 7: True})
    assert both.read([0, 4], [1, 2]) == [[True, True], [True, True]]  # nobody has met it
    assert both.read([4, 5], [4, 6]) == [[False, True], [False, True]]  # a record: the other has read it
    assert both.read([6, 0], [3, 5]) == [[True, True], [True, True]]
    assert both.read([6, 8, 0], [7, 5, 1]) == [[False, False, True], [False, True, True]]  # its shard, in this batch
    assert both.read([7, 4], [8, 3]) == [[False, False], [False, True]]
    assert both.said[0] == both.said[1]
    assert ["1 of 9 rows are skipped" in line for line in both.said[0]] == [True, False]
    assert "no mount; 3 of 9 rows are skipped from now on" in both.said[0][1]


def test_both_find_the_same_and_count_it_once(mended):
    both = Processes(mended)
    damage_file(mended.cache.path(1), "truncated")
    assert both.read([3, 3], [5, 0]) == [[False, False], [False, True]]
    assert len(both.said[0]) == len(both.said[1]) == 1
