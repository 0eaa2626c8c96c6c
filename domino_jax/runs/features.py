"""The stage before the drafter's training that fills a feature cache, and what mends it while training goes on.

The target runs once over every row; its features go to the shards of `data.feature_cache`, from where every run with
the same rows, target and captured layers reads them. What is there is kept, what is missing or damaged is computed.

float32 features are computed on batches of the shapes that training would run the target on: XLA then gives the same
bits, and training from the cache the losses of training without one. Another shape rounds differently (measured: a few
1e-6 of the features, 1e-6 of the loss after 20 steps). bfloat16 features are rounded anyway; their batches hold rows
of similar length.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from domino_jax.checkpoints.fingerprint import fingerprint_target
from domino_jax.config import DraftConfig, TargetConfig, diff_configs
from domino_jax.data.feature_cache import (
    DamagedShardError,
    FeatureCache,
    FeatureCacheError,
    FeatureShape,
    check_array_record,
    plan_shards,
    read_index,
)
from domino_jax.data.feature_source import FeatureSource
from domino_jax.data.pipeline import ChatSource, pad_batch
from domino_jax.durable import find_room, format_bytes
from domino_jax.processes import share
from domino_jax.records import ChatRow
from domino_jax.run_config import DataConfig, RunConfig
from domino_jax.runs.errors import RunStopped, stop_requests
from domino_jax.runs.launch import check_same_settings
from domino_jax.runs.monitor import RunMonitor, StageProgress
from domino_jax.runs.target_model import TargetModel
from domino_jax.sharding import activate
from domino_jax.training.feature_step import make_feature_step

_SHORTEST_WIDTH = 32
_MISSING = "missing"
_BATCH_SHAPES = "batch_shapes"
"""Entry of `made_with` in the index: for every run that wrote, rows and width of the batches it computed on."""


def open_features(
    config: RunConfig,
    draft: DraftConfig,
    target: TargetModel,
    chats: ChatSource,
    monitor: RunMonitor,
    verify: bool = False,
) -> FeatureSource:
    """Fill what `data.feature_cache` lacks and return its rows; with `verify` every record that is there is read.

    Before the first byte is written the disk need is printed, and refused where it does not fit.

    Raises:
        RunStopped: the run was asked to stop; whole shards are kept.
        FeatureCacheError: the directory holds features of something else, the disk is too small or cannot be written,
            or no shard is left.
    """
    check_array_record()
    cache = _claim(config, draft, target, chats)
    data, say = config.data, monitor.say
    made_with = {"train_path": data.train_path, "target": target.path}
    forward = _FeatureForward(config, draft, target, cache, chats)
    damage = _find_damage(cache, verify)
    kept = _kept_damage(data, cache, damage)
    check_same_settings({"damaged shards": sorted(kept)}, "all processes need the same feature cache")
    missing = sorted(damage.keys() - kept)
    _tell_damage(cache, damage, kept, say)
    if jax.process_count() > 1 and (missing or not cache.is_complete):
        raise FeatureCacheError(
            f"{cache.directory} lacks {len(missing)} of {cache.num_shards} shards, which one process fills: "
            "scripts/cache_features.py with the same --config and settings; then start all processes"
        )
    _check_disk(cache, data, missing, len(damage), say)
    if missing or not cache.is_complete:
        cache.directory.mkdir(parents=True, exist_ok=True)
        with cache.lock(say):
            cache = forward.cache = _claim(config, draft, target, chats)  # another process may have written meanwhile
            _fill(cache, forward, missing, made_with, monitor)
    _tell_other_shapes(cache, forward, say)
    if len(kept) == cache.num_shards:
        raise FeatureCacheError(
            f"{cache.directory}: every shard is damaged or missing; --config.data.damaged_shards=rebuild computes them "
            "again"
        )

    def rebuild(shard: int) -> None:
        if jax.process_count() > 1:
            raise FeatureCacheError(
                f"shard {shard} of {cache.directory} is damaged, and one process alone cannot compute it while others "
                "train: run scripts/cache_features.py --verify, or give --config.data.damaged_shards=skip; then start "
                "all processes again"
            )
        with cache.lock(say):
            if not _is_whole(cache, shard):
                _note_shapes(cache, forward, made_with)
                cache.write_shard(shard, forward.compute(shard))

    heal = rebuild if data.damaged_shards == "rebuild" else None
    tell_others = share if heal is None and jax.process_count() > 1 else None
    return FeatureSource(chats, cache, config.objective.match != "none", kept, heal, say, tell_others)


def choose_feature_shape(config: RunConfig, draft: DraftConfig, target: TargetConfig) -> FeatureShape:
    """Return what is kept of a token: the captured streams, and the last hidden state where the objective needs it."""
    hidden_width = target.hidden_size if config.objective.match != "none" else 0
    return FeatureShape(target.hidden_size * len(draft.target_layer_ids), hidden_width, config.data.feature_dtype)


def _claim(config: RunConfig, draft: DraftConfig, target: TargetModel, chats: ChatSource) -> FeatureCache:
    """Return the cache of the run, which may be empty.

    Raises:
        FeatureCacheError: the directory holds another cache; the message lists every difference.
    """
    data, index = config.data, chats.index
    directory = Path(data.feature_cache)
    if directory.exists() and not directory.is_dir():
        raise FeatureCacheError(
            f"data.feature_cache is {data.feature_cache!r}, which is no directory; give another one"
        )
    stored = read_index(directory)
    shape = choose_feature_shape(config, draft, target.config)
    if stored and not shape.hidden_width:
        shape = replace(shape, hidden_width=stored["identity"].get("hidden_width", 0))  # one that holds more serves too
    identity = {
        "rows": index.fingerprint,
        "tokens": index.token_fingerprint,
        "num_rows": len(chats),
        "num_tokens": index.num_tokens,
        "max_length": data.max_length,
        "enable_thinking": data.enable_thinking,
        "target": fingerprint_target(Path(target.path)) | {"dtype": config.target.dtype},
        "target_layer_ids": list(draft.target_layer_ids),
        "feature_width": shape.feature_width,
        "hidden_width": shape.hidden_width,
        "dtype": shape.dtype,
    }
    if stored:
        differences = diff_configs(stored["identity"], identity)
        if differences:
            raise FeatureCacheError(
                f"{directory} holds features of something else; give another --config.data.feature_cache, or remove "
                "this one:\n  " + "\n  ".join(differences)
            )
    starts = stored["shard_starts"] if stored else plan_shards(index.lengths, shape)
    is_complete = bool(stored and stored["is_complete"])
    return FeatureCache(directory, index.lengths, shape, json.loads(json.dumps(identity)), starts, is_complete)


def _find_damage(cache: FeatureCache, verify: bool) -> dict[int, str]:
    """Return why shards cannot be used, by shard; `missing` where there is no file."""
    damage = cache.find_damage()
    if verify:
        for shard in set(range(cache.num_shards)) - damage.keys():
            try:
                cache.verify(shard)
            except DamagedShardError as error:
                damage[shard] = str(error)
    return damage


def _is_whole(cache: FeatureCache, shard: int) -> bool:
    """Return whether all of a shard can be read (another process may have written it by now), and remove it if not."""
    cache.close(shard)
    try:
        cache.verify(shard)
    except DamagedShardError:
        cache.remove(shard)
        return False
    return True


def _kept_damage(data: DataConfig, cache: FeatureCache, damage: dict[int, str]) -> set[int]:
    """Return the damaged shards that stay as they are."""
    if data.damaged_shards == "rebuild":
        return set()
    return {shard for shard, reason in damage.items() if reason != _MISSING or cache.is_complete}


def _tell_damage(cache: FeatureCache, damage: dict[int, str], kept: set[int], say: Callable[[str], None]) -> None:
    for shard, reason in sorted(damage.items()):
        if reason == _MISSING and not cache.is_complete:
            continue  # not written yet
        reason = f"{cache.path(shard)} is missing" if reason == _MISSING else reason
        outcome = f"its {len(cache.rows_of(shard))} rows are skipped" if shard in kept else "it is computed again"
        say(f"feature cache: {reason}; {outcome}")
    if kept:
        num_lost = sum(len(cache.rows_of(shard)) for shard in kept)
        num_rows = cache.rows_of(cache.num_shards - 1).stop
        say(f"feature cache: {num_lost} of {num_rows} rows are skipped (data.damaged_shards is 'skip')")


def _check_disk(
    cache: FeatureCache, data: DataConfig, missing: Sequence[int], num_damaged: int, say: Callable[[str], None]
) -> None:
    """Say what the cache needs on the disk.

    Raises:
        FeatureCacheError: there is less room.
    """
    shape = cache.shape
    total = sum(map(cache.expected_bytes, range(cache.num_shards)))
    need = sum(map(cache.expected_bytes, missing))
    num_tokens = sum(map(cache.num_tokens, range(cache.num_shards)))
    there, free = find_room(cache.directory)
    hidden = f" + {shape.hidden_width} of the last hidden state" if shape.hidden_width else ""
    say(
        f"feature cache {cache.directory}: {format_bytes(total)} ({num_tokens} tokens x {shape.feature_width} "
        f"values{hidden} in {shape.dtype}, {shape.bytes_per_token} bytes a token); {cache.num_shards - num_damaged} of "
        f"{cache.num_shards} shards are there, {format_bytes(need)} to write, {format_bytes(free)} free"
    )
    if need <= free:
        return
    smaller = "" if shape.dtype == "bfloat16" else "--config.data.feature_dtype=bfloat16 (half of it), "
    raise FeatureCacheError(
        f"the feature cache needs {format_bytes(need)} more and {there} has {format_bytes(free)} free: "
        f"{format_bytes(need - free)} are lacking. Make room, or use {smaller}a shorter data.max_length (now "
        f"{data.max_length}), fewer rows, another directory, or no cache (--config.data.feature_cache=)"
    )


def _fill(
    cache: FeatureCache,
    forward: "_FeatureForward",
    missing: Sequence[int],
    made_with: dict[str, Any],
    monitor: RunMonitor,
) -> None:
    cache.remove_parts()
    if missing:
        _note_shapes(cache, forward, made_with)
    total = sum(map(cache.num_tokens, range(cache.num_shards)))
    done = total - sum(map(cache.num_tokens, missing))
    with stop_requests() as stopped, monitor.stage("features (tokens)", total, done) as progress:
        for number, shard in enumerate(missing):
            if _is_whole(cache, shard):
                progress.advance(cache.num_tokens(shard))
            else:
                cache.write_shard(shard, forward.compute(shard, stopped, progress))
            if stopped and number + 1 < len(missing):
                _stop(cache, len(missing) - number - 1)
    if not cache.is_complete:
        cache.write_index(made_with | {_BATCH_SHAPES: _stored_shapes(cache)}, is_complete=True)


def _note_shapes(cache: FeatureCache, forward: "_FeatureForward", made_with: dict[str, Any]) -> None:
    """Have the index name the shapes that features are about to be computed on."""
    shapes = _stored_shapes(cache)
    if forward.batch_shapes not in shapes:
        cache.write_index(made_with | {_BATCH_SHAPES: [*shapes, forward.batch_shapes]}, cache.is_complete)


def _stored_shapes(cache: FeatureCache) -> list[list[list[int]]]:
    """Return the batch shapes of every run that has written into the cache."""
    index = read_index(cache.directory)
    return index["made_with"].get(_BATCH_SHAPES, []) if index else []


def _tell_other_shapes(cache: FeatureCache, forward: "_FeatureForward", say: Callable[[str], None]) -> None:
    others = [shapes for shapes in _stored_shapes(cache) if shapes != forward.batch_shapes]
    if others and cache.shape.dtype == "float32":
        theirs, ours = (
            ", ".join(f"{rows} x {width}" for rows, width in shapes) for shapes in (others[0], forward.batch_shapes)
        )
        say(
            f"feature cache {cache.directory}: features were computed on batches of {theirs} tokens, this run would "
            f"compute them on {ours}: its losses agree with those of training without a cache to about 1e-5 instead "
            "of 1e-6"
        )


def _stop(cache: FeatureCache, num_missing: int) -> None:
    raise RunStopped(
        f"stopped with {cache.num_shards - num_missing} of {cache.num_shards} shards of features in {cache.directory}; "
        "the same command goes on"
    )


class _FeatureForward:
    """Computes the rows of a shard with their features."""

    def __init__(
        self, config: RunConfig, draft: DraftConfig, target: TargetModel, cache: FeatureCache, chats: ChatSource
    ) -> None:
        self.cache = cache
        self._chats, self._weights, self._layout = chats, target.weights, target.layout
        self._rows_per_forward, self._max_length = (
            config.data.batch_size // config.data.micro_steps,
            config.data.max_length,
        )
        self._widths = choose_widths(config.data)
        self._step = make_feature_step(
            target.config,
            draft.target_layer_ids,
            cache.shape.hidden_width > 0,
            config.target.dtype,
            cache.shape.dtype,
        )

    @property
    def batch_shapes(self) -> list[list[int]]:
        """Rows and width of the batches that features are computed on."""
        return [[self._count_rows(width), width] for width in self._widths]

    def compute(self, shard: int, stopped: Sequence[int] = (), progress: StageProgress | None = None) -> list[ChatRow]:
        """Return the rows of a shard in their order.

        Raises:
            RunStopped: `stopped` is not empty any more.
        """
        rows = [self._chats[row] for row in self.cache.rows_of(shard)]
        by_width = defaultdict(list)
        for place, row in enumerate(rows):
            by_width[next(width for width in self._widths if width >= len(row.ids))].append(place)
        for width, places in sorted(by_width.items()):
            count = self._count_rows(width)
            for first in range(0, len(places), count):
                if stopped:
                    _stop(self.cache, len(self.cache.find_damage()))
                chosen = places[first : first + count]
                began = time.perf_counter()
                self._add_features(rows, chosen, width, count)
                if progress:
                    num_tokens = sum(len(rows[place].ids) for place in chosen)
                    progress.advance(num_tokens, **{"tokens/s": num_tokens / (time.perf_counter() - began)})
        return rows

    def _count_rows(self, width: int) -> int:
        """Return how many rows of a width the target runs on at a time: never more tokens than training gives it."""
        if self.cache.shape.dtype == "float32":
            return self._rows_per_forward
        return max(1, self._rows_per_forward * self._max_length // width)

    def _add_features(self, rows: list[ChatRow], chosen: Sequence[int], width: int, count: int) -> None:
        input_ids = np.zeros((count, width), np.int32)  # always the same shape: one compilation a width
        input_ids[: len(chosen)] = pad_batch([rows[place] for place in chosen], width).input_ids
        placed = self._layout.place({"tokens": input_ids})["tokens"] if self._layout else input_ids
        with activate(self._layout):
            features, last_hidden = self._step(self._weights.stacked(), placed)
        features, last_hidden = np.asarray(features), None if last_hidden is None else np.asarray(last_hidden)
        for number, place in enumerate(chosen):
            length = len(rows[place].ids)
            rows[place] = replace(
                rows[place],
                features=features[number, :length].copy(),  # not a view: the padding is to be freed
                last_hidden=None if last_hidden is None else last_hidden[number, :length].copy(),
            )


def choose_widths(data: DataConfig) -> tuple[int, ...]:
    """Return the widths that rows are padded to for the target, ascending; see the module's docstring."""
    if data.feature_dtype == "float32":
        return tuple(sorted({*data.bucket_widths, data.max_length}))
    widths = {data.max_length}
    while (shorter := round(min(widths) / 2**0.5)) >= _SHORTEST_WIDTH:
        widths.add(shorter)
    return tuple(sorted(widths))
