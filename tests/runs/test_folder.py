"""A run's folder: parts of the configuration are fixed by results that come from them, and only by those."""

import json
from dataclasses import replace

import pytest

from domino_jax.run_config import CorpusConfig, RunConfig
from domino_jax.runs.folder import RunError, open_run


def make_config(tmp_path) -> RunConfig:
    return RunConfig(name="run", output_dir=str(tmp_path), corpus=CorpusConfig())


def test_a_mistyped_configuration_is_replaced_while_nothing_was_built(tmp_path):
    config = make_config(tmp_path)
    folder = open_run(config)
    open_run(replace(config, seed=7))
    assert json.loads(folder.config.read_text())["seed"] == 7


def test_a_built_corpus_fixes_what_it_was_built_from(tmp_path):
    config = make_config(tmp_path)
    folder = open_run(config)
    folder.train_chats.parent.mkdir()
    folder.train_chats.write_text("{}\n")
    open_run(replace(config, draft=replace(config.draft, block_size=5)))
    with pytest.raises(RunError, match=r"corpus\.vocab_size: stored 2048, now 512"):
        open_run(replace(config, corpus=CorpusConfig(vocab_size=512)))
    with pytest.raises(RunError, match=r"seed: stored 0, now 1"):
        open_run(replace(config, seed=1))


def test_responses_fix_how_chats_are_read_and_a_checkpoint_fixes_all(tmp_path):
    config = make_config(tmp_path)
    folder = open_run(config)
    folder.train_chats.parent.mkdir()
    folder.train_chats.write_text("{}\n")
    folder.responses.write_text("{}\n")
    with pytest.raises(RunError, match=r"data\.enable_thinking"):
        open_run(replace(config, data=replace(config.data, enable_thinking=True)))
    open_run(replace(config, train=replace(config.train, num_steps=3)))
    (folder.checkpoints / "2").mkdir(parents=True)
    with pytest.raises(RunError, match=r"train\.num_steps: stored 3, now 0"):
        open_run(config)


def test_where_features_lie_may_change_and_their_type_may_not(tmp_path):
    config = make_config(tmp_path)
    (open_run(config).checkpoints / "2").mkdir(parents=True)
    cached = replace(config, data=replace(config.data, feature_cache="a", damaged_shards="skip"))
    open_run(cached)
    open_run(config)
    with pytest.raises(RunError, match=r"data\.feature_dtype: stored 'float32', now 'bfloat16'"):
        open_run(replace(config, data=replace(cached.data, feature_dtype="bfloat16")))
