"""Features that one of two processes cannot read in mid-training: both leave out the same rows, or both end."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from domino_jax.data import feature_cache as feature_cache_module
from domino_jax.data.chat_template import load_tokenizer
from domino_jax.data.pipeline import build_dataset
from domino_jax.run_config import DataConfig, DraftSettings, ObjectiveConfig, RunConfig, TargetSource, TrainConfig
from domino_jax.runs.errors import EXIT_MISTAKE
from domino_jax.runs.launch import EXIT_LOST
from domino_jax.runs.monitor import read_rows
from domino_jax.runs.training_run import cache_features
from tests.runs.many_processes import Processes, give_address

NUM_STEPS, LOST_SHARD, LOSS_TOLERANCE = 12, 2, 1e-5
PLACES_OF_SECOND = (2, 3, 6, 7)  # of a batch of 8 rows in 2 micro-steps


def make_config(material, output_dir, cache, **data):
    settings = {"max_length": 48, "batch_size": 8, "micro_steps": 2, "damaged_shards": "skip"} | data
    return RunConfig(
        name="run",
        output_dir=str(output_dir),
        target=TargetSource(str(material / "target")),
        draft=DraftSettings(num_hidden_layers=1, block_size=4, gru_hidden_dim=8, emb_dim=4, target_layer_ids=(0, 2)),
        data=DataConfig(str(material / "train.jsonl"), feature_cache=str(cache), **settings),
        objective=ObjectiveConfig(num_anchors=4, head_chunk=2),
        train=TrainConfig(num_steps=NUM_STEPS, log_every=1, checkpoint_every=NUM_STEPS),
    )


@pytest.fixture(scope="module")
def cache(material, tmp_path_factory):
    """A whole cache of 5 shards of 4 rows."""
    root = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(feature_cache_module, "SHARD_BYTES", 17_000)
        cache_features(make_config(material, root, root / "cache"))
    assert len(list((root / "cache").glob("*.arrayrecord"))) == 5
    return root / "cache"


def find_first_batch(config):
    """Return the first batch, counted from 1, after the third in which the second process reads a row of the shard."""
    tokenizer = load_tokenizer(config.target.path)
    batches, _, _ = build_dataset(config.data.train_path, tokenizer, config.data, len(tokenizer), config.seed)
    for number, batch in enumerate(islice(batches, NUM_STEPS - 3), 1):
        lines = batch.line_nos[list(PLACES_OF_SECOND)]
        if number > 3 and any((line - 1) // 4 == LOST_SHARD for line in lines):
            return number
    raise AssertionError("no batch has such a row")


def train(repository, config, count, fails_in, lost_from):
    environment = {"FAILS_IN": str(fails_in), "LOST_SHARD": str(LOST_SHARD), "LOST_FROM": str(lost_from)}
    run = Processes(
        repository,
        config,
        count,
        flags=give_address if count > 1 else lambda *_: [],
        environments=[environment] * count,
        module="damaged_train",
    )
    try:
        return run.statuses(), run.texts()
    finally:
        run.files.close()


def rows_of(config, output_dir):
    return [row for row in read_rows(output_dir / "run" / "metrics.jsonl") if row["stage"] == "draft"]


@pytest.mark.slow
def test_what_one_process_cannot_read_both_leave_out(repository, material, cache, tmp_path):
    config = make_config(material, tmp_path / "two", cache)
    lost_from = find_first_batch(config)
    statuses, texts = train(repository, config, 2, 1, lost_from)
    assert statuses == [0, 0], texts
    assert texts[0].count("stale file handle; 4 of 20 rows are skipped from now on") == 1, texts[0]
    alone = replace(config, output_dir=str(tmp_path / "one"))
    statuses, texts = train(repository, alone, 1, 0, lost_from)
    assert statuses == [0], texts
    ours, theirs = rows_of(config, tmp_path / "two"), rows_of(alone, tmp_path / "one")
    assert [row["num_blocks"] for row in ours] == [row["num_blocks"] for row in theirs]
    assert min(row["num_blocks"] for row in ours[lost_from - 1 :]) < max(
        row["num_blocks"] for row in ours[: lost_from - 1]
    )
    np.testing.assert_allclose([r["loss"] for r in ours], [r["loss"] for r in theirs], rtol=0, atol=LOSS_TOLERANCE)


@pytest.mark.slow
def test_what_would_have_to_be_computed_again_ends_both(repository, material, cache, tmp_path):
    config = make_config(material, tmp_path / "out", cache, damaged_shards="rebuild")
    statuses, texts = train(repository, config, 2, 1, find_first_batch(config))
    assert statuses == [EXIT_LOST, EXIT_MISTAKE], texts
    assert "is damaged, and one process alone cannot compute it while others train: run scripts/" in texts[1]
    assert "lost contact to another one" in texts[0]
